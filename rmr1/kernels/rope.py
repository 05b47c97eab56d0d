"""Rotary position embedding: inverse frequencies under each published scaling, and the rotation.

The two halves of a head are the real and imaginary parts of D/2 complex numbers; pair i of the
token at position p is turned by the angle p * frequency[i].

Shapes: T tokens, N heads, D head size.
Sources: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); yarn (arXiv
2309.00071); llama3 (the Llama 3.1 release); dynamic NTK (see `RopeScaling`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from rmr1 import _C
from rmr1.kernels.dispatch import Backend, choose

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model stretches its positions; fields a kind does not use keep their defaults.

    `dynamic` depends on the length a sequence will have in the end: up to the trained length its
    frequencies are the default ones. Beyond it they would have to change while keys are already
    cached and would differ between the sequences of one packed batch, so here that is an error of
    the model (`CausalLM.forward`), not a silent approximation. On a GPU, whose positions are not
    read, hidden states become NaN instead; whoever makes sequences knows their lengths and refuses
    those that are too long (the generator, `rmr1 logprobs`, the trainers).
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return the D/2 frequencies in radians per position, fp32 [D/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    if scaling.kind == "yarn":
        return _yarn(frequencies, head_dim, theta, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Interpolate pairs that turn less than beta_slow times, keep those that turn beta_fast."""

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    stretch = ((pairs - low) / width).clamp(0.0, 1.0)
    return stretch * frequencies / scaling.factor + (1.0 - stretch) * frequencies


def rope_tables(
    positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every token's angles, each [T, 1, D/2] in `dtype`.

    positions: [T], whole numbers or NaN; frequencies: fp32 [D/2]. Angles are taken in fp32: in a
    16-bit dtype positions past a few hundred would already collide.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies  # [T, D/2]
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(dtype)[:, None, :], sin.to(dtype)[:, None, :]


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The turn in plain torch: x [T, N, D] by the tables of `rope_tables`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    (real, imaginary), cos, sin = x.to(wide).chunk(2, dim=-1), cos.to(wide), sin.to(wide)
    turned = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return turned.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, N, D] by the tables of `rope_tables`; the result has the shape and dtype of x.

    Differentiable once in x; the tables get no gradient. ValueError for shapes, dtypes or devices
    that do not go together.
    """
    table = (x.shape[0], 1, x.shape[-1] // 2)
    if x.ndim != 3 or x.shape[-1] % 2 or cos.shape != table or sin.shape != table:
        raise ValueError(
            f"rope: x must be [T, N, D] with an even D and the tables [T, 1, D / 2], got"
            f" {list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}."
        )
    if not x.is_floating_point():
        raise ValueError(f"rope: x must be floating, got {x.dtype}.")
    if not (x.dtype == cos.dtype == sin.dtype and x.device == cos.device == sin.device):
        raise ValueError(
            f"rope: x and the tables must share dtype and device, got {x.dtype} on {x.device},"
            f" {cos.dtype} on {cos.device} and {sin.dtype} on {sin.device}."
        )
    backend = choose("rope", x, native=x.dtype == torch.float32)
    if backend == "reference":
        return reference(x, cos, sin)
    if torch.compiler.is_compiling():
        return _op(x, cos, sin, backend, False)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _turn(x, cos, sin, backend, back=False)
    y = _Rope.apply(x, cos, sin, backend)
    assert isinstance(y, Tensor)
    return y


def _turn(x: Tensor, cos: Tensor, sin: Tensor, backend: str, *, back: bool) -> Tensor:
    # Heads stand next to each other; tokens may be further apart, as in one projection of q, k, v.
    if x.stride()[1:] != (x.shape[2], 1):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    cos, sin = cos.squeeze(1).contiguous(), sin.squeeze(1).contiguous()
    if backend == "triton":
        from rmr1.kernels import rope_triton

        rope_triton.turn(x, cos, sin, y, back)
    else:
        _C.rope(x, cos, sin, y, back, torch.get_num_threads())
    return y


class _Rope(torch.autograd.Function):
    """The gradient of a turn is the turn back; autograd alone would take it apart step by step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.backend = backend
        return _turn(x, cos, sin, backend, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.backend, back=True), None, None, None


# The same for torch.compile, which cannot look into C++. Called in eager mode an op costs several
# times what an autograd.Function does, and a token being generated passes through dozens.


@custom_op("rmr1::rope", mutates_args=())
def _op(x: Tensor, cos: Tensor, sin: Tensor, backend: str, back: bool) -> Tensor:
    return _turn(x, cos, sin, backend, back=back)


@_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, backend: str, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.backend, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


@once_differentiable
def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return _op(grad, cos, sin, ctx.backend, not ctx.back), None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)
