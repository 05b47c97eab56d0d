"""The rotary embedding on a GPU, in Triton: all heads of a token a program.

Shapes: T tokens, N heads, D head size.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case


@triton.jit
def _kernel(
    x, cos, sin, y, x_stride, N, HALF,
    BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    live = (head < N) & (column < HALF)
    c = tl.load(cos + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + column, mask=column < HALF, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    at = head * (2 * HALF) + column
    a = tl.load(x + token * x_stride + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x + token * x_stride + at + HALF, mask=live, other=0.0).to(tl.float32)
    to = y + token * (N * 2 * HALF) + at
    tl.store(to, (a * c - b * s).to(y.dtype.element_ty), mask=live)
    tl.store(to + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=live)


def turn(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, back: bool) -> None:
    """Write x [T, N, D] turned by cos and sin [T, D / 2] into y, contiguous [T, N, D]."""
    tokens, heads, width = x.shape
    if not tokens:
        return
    _kernel[(tokens,)](
        x, cos, sin, y, x.stride(0), heads, width // 2,
        BACK=back, HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(width // 2),
    )  # fmt: skip


CASES = [
    Case(
        f"rope {dtype}",
        _kernel,
        {**dict.fromkeys(("x", "cos", "sin", "y"), f"*{dtype}"),
         "x_stride": "i32", "N": "i32", "HALF": "i32"},
        {"BACK": False, "HEADS": 32, "BLOCK": 64},
        ("x", "cos", "sin", "y", "x_stride", "HALF"),
    )
    for dtype in ("bf16", "fp32")
]  # fmt: skip
