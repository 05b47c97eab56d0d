"""RMSNorm on a GPU, in Triton: a row a program, with what is added to it.

Backward: each of a few programs per multiprocessor walks over many rows and keeps the weight's
gradient in registers; torch adds up the partial sums. No atomics.

Shapes: R rows, H columns, P programs.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case


@triton.jit
def _forward(
    x, added, weight, total, y, scale, eps, H,
    ADD: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    live = column < H
    at = tl.program_id(0).to(tl.int64) * H + column
    row = tl.load(x + at, mask=live, other=0.0)
    if ADD:
        row = row + tl.load(added + at, mask=live, other=0.0)
        tl.store(total + at, row, mask=live)
    wide = row.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide) / H + eps)
    if SCALE:
        tl.store(scale + tl.program_id(0), inverse)
    w = tl.load(weight + column, mask=live, other=0.0)
    # Rounded before the multiplication by the weight, as the models were trained.
    tl.store(y + at, (wide * inverse).to(w.dtype) * w, mask=live)


@triton.jit
def _backward(
    on_y, on_total, x, weight, scale, on_x, on_weight, R, H, each,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    live = column < H
    w = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    on_w = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.program_id(0) * each
    for row in range(first, tl.minimum(first + each, R)):
        at = tl.cast(row, tl.int64) * H + column
        g = tl.load(on_y + at, mask=live, other=0.0).to(tl.float32)
        inverse = tl.load(scale + row)
        hat = tl.load(x + at, mask=live, other=0.0).to(tl.float32) * inverse
        on_w += g * hat
        mean = tl.sum(g * hat * w) / H
        slope = (g * w - hat * mean) * inverse
        if ADD:
            slope += tl.load(on_total + at, mask=live, other=0.0).to(tl.float32)
        tl.store(on_x + at, slope.to(on_x.dtype.element_ty), mask=live)
    place = tl.program_id(0).to(tl.int64) * H + column
    tl.store(on_weight + place, on_w, mask=live)


def forward(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    total: Tensor | None,
    y: Tensor,
    scale: Tensor | None,
    eps: float,
) -> None:
    """Write y, and x + added into `total`, and the scales of the rows; each may be None but y."""
    rows, width = x.shape
    if rows:
        _forward[(rows,)](
            x, x if added is None else added, weight, x if total is None else total, y,
            x if scale is None else scale, eps, width,
            ADD=added is not None, SCALE=scale is not None,
            BLOCK=triton.next_power_of_2(width), num_warps=warps(width),
        )  # fmt: skip


def backward(
    on_y: Tensor, on_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, on_x: Tensor
) -> Tensor:
    """Write the gradient of x into `on_x`; returns partial sums of the weight's, fp32 [P, H]."""
    rows, width = x.shape
    processors = 4
    if x.device.type == "cuda":
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    each = max(1, triton.cdiv(rows, 4 * processors))
    programs = max(1, triton.cdiv(rows, each))
    parts = x.new_zeros(programs, width, dtype=torch.float32)
    _backward[(programs,)](
        on_y, x if on_total is None else on_total, x, weight, scale, on_x, parts, rows, width, each,
        ADD=on_total is not None, BLOCK=triton.next_power_of_2(width), num_warps=warps(width),
    )  # fmt: skip
    return parts


def warps(width: int) -> int:
    """So many that a thread holds 16 to 32 columns of a row."""
    return min(16, max(1, triton.next_power_of_2(width) // 1024))


def _case(name: str, dtype: str, width: int) -> Case:
    kernel = _forward if name == "forward" else _backward
    types = dict.fromkeys(
        ("x", "added", "weight", "total", "y", "on_y", "on_total", "on_x"), f"*{dtype}"
    )
    types |= {"scale": "*fp32", "on_weight": "*fp32", "eps": "fp32", "R": "i32", "H": "i32"}
    types |= {"each": "i32"}
    names = kernel.arg_names
    chosen = {key: kind for key, kind in types.items() if key in names}
    constants = {"ADD": True, "BLOCK": triton.next_power_of_2(width)}
    if name == "forward":
        constants["SCALE"] = True
    aligned = tuple(key for key, kind in chosen.items() if kind.startswith("*") or key == "H")
    return Case(
        f"rmsnorm {name} {dtype} H={width}", kernel, chosen, constants, aligned, warps=warps(width)
    )


CASES = [
    _case(name, dtype, width)
    for dtype, width in (("bf16", 3584), ("bf16", 8192), ("fp32", 576))
    for name in ("forward", "backward")
]
