"""Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * weight, over the last axis.

Statistics in fp32 whatever the dtype of x (fp64 for fp64), the result in the dtype of x. The
gradient is written out: it keeps one number a row instead of three copies of x.
`add_rmsnorm` takes the norm of a sum, the residual stream and what a block adds to it, and returns
both, so that the sum is not read again.

Shapes: R rows, H size of the last axis.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from rmr1 import _C
from rmr1.kernels.dispatch import Backend, choose

# Partial sums of the weight's gradient on a CPU: enough for any number of threads, and the same for
# all of them, so that the result is too.
_PARTS = 16


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op in plain torch."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    # Rounded before the multiplication by the weight, as the models were trained.
    return (wide * scale).to(x.dtype) * weight


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last axis of x.

    Args:
        x: [..., H], any floating dtype.
        weight: [H] in the dtype of x.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of x; differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or a negative eps.
    """
    _check(x, weight, eps)
    backend = choose("rmsnorm", x, native=x.dtype == torch.float32)
    if backend == "reference":
        return reference(x, weight, eps)
    return _run(x, None, weight, eps, backend)[0]


def add_rmsnorm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + added, and x + added itself.

    Args:
        x, added: [..., H] in one floating dtype.
        weight, eps: as in `rmsnorm`.

    Returns:
        ([..., H], [..., H]) in the dtype of x; differentiable once.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or a negative eps.
    """
    _check(x, weight, eps)
    if added.shape != x.shape or added.dtype != x.dtype or added.device != x.device:
        raise ValueError(
            f"add_rmsnorm: added must be like x, {list(x.shape)} {x.dtype} on {x.device}, got"
            f" {list(added.shape)} {added.dtype} on {added.device}."
        )
    backend = choose("add_rmsnorm", x, native=x.dtype == torch.float32)
    if backend == "reference":
        total = x + added
        return reference(total, weight, eps), total
    y, both = _run(x, added, weight, eps, backend)
    assert both is not None
    return y, both


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if x.ndim == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"rmsnorm: x must be floating [..., H] with H above 0, got {x.dtype} of shape"
            f" {list(x.shape)}."
        )
    if not eps >= 0:
        raise ValueError(f"rmsnorm: eps must be at least 0, got {eps}.")
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"rmsnorm: weight must be [H] like the last axis of x, {list(x.shape)} {x.dtype} on"
            f" {x.device}, got {list(weight.shape)} {weight.dtype} on {weight.device}."
        )


def _run(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    if torch.compiler.is_compiling():
        y, total, _ = _op(x, added, weight, eps, backend)
        return y, total
    if torch.is_grad_enabled():
        y, total = _RmsNorm.apply(x, added, weight, eps, backend)
        return y, total
    y, total, _ = _forward(x, added, weight, eps, backend, with_scale=False)
    return y, total


def _forward(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
    backend: str,
    *,
    with_scale: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, x + added (None without `added`), and 1 / root-mean-square of every row, [R] fp32."""
    shape = x.shape
    x = x.reshape(-1, shape[-1]).contiguous()
    y = torch.empty_like(x)
    if added is not None:
        added = added.reshape(-1, shape[-1]).contiguous()
    total = None if added is None else torch.empty_like(x)
    scale = x.new_empty(len(x), dtype=torch.float32) if with_scale else None
    if backend == "triton":
        from rmr1.kernels import rmsnorm_triton

        rmsnorm_triton.forward(x, added, weight, total, y, scale, eps)
    else:
        _C.rmsnorm(x, added, weight, total, y, scale, eps, torch.get_num_threads())
    return y.view(shape), None if total is None else total.view(shape), scale


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float, backend: Backend
    ) -> tuple[Tensor, Tensor | None]:
        y, total, scale = _forward(x, added, weight, eps, backend, with_scale=True)
        ctx.save_for_backward(x if total is None else total, weight, scale)
        ctx.backend, ctx.with_sum = backend, total is not None
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, on_y: Tensor | None, on_total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        return _chain(ctx, on_y, on_total, _backward)


def _chain(
    ctx: Any, on_y: Tensor | None, on_total: Tensor | None, backward: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    """Gradients of x, added and weight, by `_backward` or the op that is the same."""
    if on_y is None:
        return on_total, on_total if ctx.with_sum else None, None, None, None
    x, weight, scale = ctx.saved_tensors
    on_x, on_weight = backward(on_y, on_total, x, weight, scale, ctx.backend)
    return on_x, on_x if ctx.with_sum else None, on_weight, None, None


def _backward(
    on_y: Tensor, on_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    shape, width = x.shape, x.shape[-1]
    x, on_y = x.reshape(-1, width).contiguous(), on_y.reshape(-1, width).contiguous()
    if on_total is not None:
        on_total = on_total.reshape(-1, width).contiguous()
    on_x = torch.empty_like(x)
    if backend == "triton":
        from rmr1.kernels import rmsnorm_triton

        parts = rmsnorm_triton.backward(on_y, on_total, x, weight, scale, on_x)
    else:
        parts = x.new_empty(max(1, min(_PARTS, len(x))), width)
        _C.rmsnorm_backward(on_y, on_total, x, weight, scale, on_x, parts, torch.get_num_threads())
    return on_x.view(shape), parts.sum(dim=0).to(weight.dtype)


# The same for torch.compile, which cannot look into C++. Called in eager mode an op costs several
# times what an autograd.Function does, and a token being generated passes through dozens.


@custom_op("rmr1::rmsnorm", mutates_args=())
def _op(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + added (empty without `added`), and the scales."""
    y, total, scale = _forward(x, added, weight, eps, backend, with_scale=True)
    assert scale is not None
    return y, x.new_empty(0) if total is None else total, scale


@_op.register_fake
def _(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if added is None else x.shape)
    scale = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), total, scale


@custom_op("rmr1::rmsnorm_backward", mutates_args=())
def _backward_op(
    on_y: Tensor, on_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _backward(on_y, on_total, x, weight, scale, backend)


@_backward_op.register_fake
def _(
    on_y: Tensor, on_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, added, weight, _, ctx.backend = inputs
    ctx.with_sum = added is not None
    ctx.save_for_backward(output[1] if ctx.with_sum else x, weight, output[2])
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(
    ctx: Any, on_y: Tensor | None, on_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    return _chain(ctx, on_y, on_total if ctx.with_sum else None, _backward_op)


_op.register_autograd(_differentiate, setup_context=_save)
