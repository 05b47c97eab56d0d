"""SwiGLU on a GPU, in Triton: element by element, a row and BLOCK columns a program.

Shapes: R rows, I inner size; all tensors are contiguous [R, I].
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case

BLOCK = 2048  # 128 bits of bf16 for each of 256 threads


@triton.jit
def _place(columns, BLOCK: tl.constexpr):
    """Where this program's elements stand, and which of its columns there are."""
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row * columns + column, column < columns


@triton.jit
def _forward(gate, up, out, columns, BLOCK: tl.constexpr):
    at, live = _place(columns, BLOCK)
    g = tl.load(gate + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=live)


@triton.jit
def _backward(on_out, gate, up, on_gate, on_up, columns, BLOCK: tl.constexpr):
    at, live = _place(columns, BLOCK)
    d = tl.load(on_out + at, mask=live, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=live, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    on_g = d * u * (s + silu * (1.0 - s))
    tl.store(on_up + at, (d * silu).to(on_up.dtype.element_ty), mask=live)
    tl.store(on_gate + at, on_g.to(on_gate.dtype.element_ty), mask=live)


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up into `out`."""
    if out.numel():
        _forward[(_programs(out),)](gate, up, out, out.shape[1], BLOCK=BLOCK)


def backward(on_out: Tensor, gate: Tensor, up: Tensor, on_gate: Tensor, on_up: Tensor) -> None:
    """Write the gradients of gate and up into `on_gate` and `on_up`."""
    if gate.numel():
        grid = (_programs(gate),)
        _backward[grid](on_out, gate, up, on_gate, on_up, gate.shape[1], BLOCK=BLOCK)


def _programs(x: Tensor) -> int:
    return x.shape[0] * triton.cdiv(x.shape[1], BLOCK)


CASES = [
    Case(
        f"swiglu {name} {dtype}",
        kernel,
        {**{one: f"*{dtype}" for one in tensors}, "columns": "i32"},
        {"BLOCK": BLOCK},
        (*tensors, "columns"),
    )
    for dtype in ("bf16", "fp32")
    for name, kernel, tensors in (
        ("forward", _forward, ("gate", "up", "out")),
        ("backward", _backward, ("on_out", "gate", "up", "on_gate", "on_up")),
    )
]
