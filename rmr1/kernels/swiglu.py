"""SwiGLU: silu(gate) * up, the gated activation between the two halves of the MLP.

In fp32, rounded once to the dtype of the inputs. The gradient is made in one pass from gate and up,
instead of torch's three passes and a saved copy of silu(gate).

Shapes: I inner size; all tensors [..., I]. Source: Shazeer, "GLU Variants Improve Transformer"
(arXiv 2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.nn.functional import silu

from rmr1 import _C
from rmr1.kernels.dispatch import Backend, choose


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The op in plain torch."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Args:
        gate, up: [..., I] in one floating dtype, on one device; not scalars.

    Returns:
        [..., I] in their dtype, differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"swiglu: gate and up must be alike, got {list(gate.shape)} {gate.dtype} on"
            f" {gate.device} and {list(up.shape)} {up.dtype} on {up.device}."
        )
    if not gate.is_floating_point() or gate.ndim == 0:
        raise ValueError(
            f"swiglu: gate and up must be floating [..., I], got {gate.dtype} of shape"
            f" {list(gate.shape)}."
        )
    backend = choose("swiglu", gate, native=gate.dtype == torch.float32)
    if backend == "reference":
        return reference(gate, up)
    if torch.compiler.is_compiling():
        return _op(gate, up, backend)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out = _Swiglu.apply(gate, up, backend)
        assert isinstance(out, Tensor)
        return out
    return _forward(gate, up, backend)


def _forward(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    rows = (_rows(gate), _rows(up), _rows(out))
    if backend == "triton":
        from rmr1.kernels import swiglu_triton

        swiglu_triton.forward(*rows)
    else:
        _C.swiglu(*rows, torch.get_num_threads())
    return out


def _rows(x: Tensor) -> Tensor:
    """[..., I] -> [R, I]."""
    return x.view(-1, x.shape[-1]) if x.numel() else x.view(0, max(x.shape[-1], 1))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _forward(gate, up, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, on_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return (*_gradients(on_out, gate, up, ctx.backend), None)


def _gradients(on_out: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    on_out, gate, up = on_out.contiguous(), gate.contiguous(), up.contiguous()
    on_gate, on_up = torch.empty_like(gate), torch.empty_like(up)
    given = (_rows(on_out), _rows(gate), _rows(up))
    found = (_rows(on_gate), _rows(on_up))
    if backend == "triton":
        from rmr1.kernels import swiglu_triton

        swiglu_triton.backward(*given, *found)
    else:
        _C.swiglu_backward(*given, *found, torch.get_num_threads())
    return on_gate, on_up


# The same for torch.compile, which cannot look into C++. Called in eager mode an op costs several
# times what an autograd.Function does, and a token being generated passes through dozens.


@custom_op("rmr1::swiglu", mutates_args=())
def _op(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return _forward(gate, up, backend)


@_op.register_fake
def _(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@custom_op("rmr1::swiglu_backward", mutates_args=())
def _backward_op(on_out: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _gradients(on_out, gate, up, backend)


@_backward_op.register_fake
def _(on_out: Tensor, gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


@once_differentiable
def _differentiate(ctx: Any, on_out: Tensor) -> tuple[Tensor, Tensor, None]:
    gate, up = ctx.saved_tensors
    return (*_backward_op(on_out, gate, up, ctx.backend), None)


_op.register_autograd(_differentiate, setup_context=_save)
