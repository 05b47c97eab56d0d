"""Log-probability of given tokens straight from hidden states: linear head and log-softmax fused.

With z = hidden @ weight.T / temperature, m = max z and s = sum exp(z - m):

    logp = (z[target] - m) - log s        entropy = log s - sum exp(z - m) (z - m) / s

in fp32. (z_t - m) - log s and not z_t - logsumexp(z): the latter loses the small digits when all
logits share a large offset. No [T, V] tensor lives: the forward keeps m and log s of each row, the
backward makes the logits again, tile by tile. `rmr1/kernels/token_loss.py` saves that second
making where the loss allows it.

Shapes: T tokens, H hidden size, V words. Source: Cut Cross-Entropy (arXiv 2411.09009).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from rmr1.kernels import token_logprob_cpu
from rmr1.kernels.dispatch import choose


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The op in plain torch: log-probability and entropy, [T] each, in fp32 (fp64 for fp64)."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with exact(hidden):
        z = hidden.to(wide) @ weight.to(wide).T / temperature  # [T, V]
    logp = z.log_softmax(dim=1)
    entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(dim=1)  # 0 * -inf would be NaN
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    mask: Tensor | None = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log p(target) of every row, in nats.

    Args:
        hidden: [T, H], fp32, bf16, fp16 (or fp64, then all is fp64).
        weight: [V, H] in the dtype of hidden: the language-model head.
        targets: [T] int64, each in [0, V) where the mask is True.
        temperature: divides the logits; above 0.
        mask: [T] bool: rows where it is False (prompt, padding) never reach the head. Their
            log-probability and entropy are 0, and so is their gradient.
        return_entropy: also return the entropy of each row's distribution.

    Returns:
        [T] fp32, or that and the entropy [T] fp32. Both are differentiable once, in hidden and
        weight; the gradients are summed in fp32 and rounded to their dtype at the end. Rows whose
        gradient is zero cost nothing in the backward.

    Raises:
        ValueError: shapes, dtypes, devices, a target or a temperature that cannot be meant, or
            hidden states that are not finite.
    """
    hidden, weight = autocasted(hidden), autocasted(weight)
    check_shapes("token_logprobs", hidden, weight, targets, temperature)
    rows = None
    if mask is not None:
        if mask.shape != targets.shape or mask.dtype != torch.bool or mask.device != hidden.device:
            raise ValueError(
                f"token_logprobs: mask must be [T] bool on {hidden.device} with T ="
                f" {len(targets)}, got {list(mask.shape)} {mask.dtype} on {mask.device}."
            )
        rows = mask.nonzero().squeeze(1)  # [R]
        hidden, targets = hidden[rows], targets[rows]
    backend = choose("token_logprobs", hidden, native=hidden.dtype != torch.float64)
    if backend == "reference":
        if not torch.compiler.is_compiling():  # a look at the values would break the graph
            check_values("token_logprobs", hidden, weight, targets)
        logprobs, entropy = reference(hidden, weight, targets, temperature)
    else:
        logprobs, entropy, _, _ = _forward(
            hidden, weight, targets, temperature, return_entropy, backend
        )
    if mask is not None and rows is not None:
        logprobs = _spread(logprobs, rows, len(mask))
        entropy = _spread(entropy, rows, len(mask)) if return_entropy else entropy
    return (logprobs, entropy) if return_entropy else logprobs


def _spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """[R] -> [T], 0 elsewhere."""
    return values.new_zeros(count).index_copy(0, rows, values)


def autocasted(x: Tensor) -> Tensor:
    """What autocast would do to an input of a linear layer: nothing to fp64 and integers."""
    kind = x.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return x
    casts = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if casts else x


def exact(x: Tensor) -> torch.autocast:
    """No autocast inside: it would round fp32 factors that were chosen on purpose."""
    return torch.autocast(x.device.type, enabled=False)


def check_shapes(
    op: str, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> None:
    """Refuse what cannot be meant, as far as it shows without a look at the values."""
    alike = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not alike or hidden.shape[1] == 0:
        raise ValueError(
            f"{op}: hidden must be [T, H] and weight [V, H], H above 0, with one H, "
            f"got {list(hidden.shape)} and {list(weight.shape)}."
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{op}: targets must be [T] int64 with T = {hidden.shape[0]}, "
            f"got {list(targets.shape)} {targets.dtype}."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"{op}: hidden and weight must share one floating dtype, "
            f"got {hidden.dtype} and {weight.dtype}."
        )
    if not (hidden.device == weight.device == targets.device):
        raise ValueError(
            f"{op}: hidden, weight and targets must be on one device, "
            f"got {hidden.device}, {weight.device} and {targets.device}."
        )
    if not 0 < temperature < math.inf:  # math.isfinite would break a traced graph
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}.")


def check_values(op: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Refuse targets out of range and hidden states that are not finite; one wait for the GPU."""
    if not targets.numel():
        return
    low, high = torch.aminmax(targets)
    # NaN survives a maximum, and a bare sum of large finite states could overflow.
    largest = hidden.detach().abs().amax()
    low, high, largest = torch.stack([low.double(), high.double(), largest.double()]).tolist()
    if low < 0 or high >= weight.shape[0]:
        raise ValueError(
            f"{op}: targets must be in [0, {weight.shape[0]}), got values from "
            f"{int(low)} to {int(high)}; give a mask of the rows to score."
        )
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(hidden)).any(dim=1).sum())
        raise ValueError(f"{op}: hidden must be finite, got NaN or inf in {bad} of its rows.")


@custom_op("rmr1::token_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy (empty unless wanted), and what the backward needs: peak, log_sum."""
    check_values("token_logprobs", hidden, weight, targets)
    with exact(hidden):
        return _kernels(backend).forward(hidden, weight, targets, temperature, with_entropy)


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    sizes = (rows, rows if with_entropy else 0, rows, rows)
    logprobs, entropy, peak, log_sum = (
        hidden.new_empty(size, dtype=torch.float32) for size in sizes
    )
    return logprobs, entropy, peak, log_sum


@custom_op("rmr1::token_logprob_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    on_logprob: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, each empty unless needed."""
    rows = live_rows(on_logprob, on_entropy)
    with exact(hidden):
        return _kernels(backend).backward(
            hidden,
            weight,
            targets,
            (peak, log_sum, entropy),
            (on_logprob, on_entropy),
            rows,
            temperature=temperature,
            need_hidden=need_hidden,
            need_weight=need_weight,
        )


@_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    on_logprob: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _kernels(backend: str) -> ModuleType:
    """Triton is imported when it is needed first: it is there on Linux only."""
    if backend == "triton":
        from rmr1.kernels import token_logprob_triton

        return token_logprob_triton
    return token_logprob_cpu


def live_rows(*grads: Tensor | None) -> Tensor:
    """Indices of the rows with a gradient: masked ones, and those of zero advantage, have none."""
    live = [grad != 0 for grad in grads if grad is not None]
    return torch.stack(live).any(dim=0).nonzero().squeeze(1)  # [R]; NaN counts as a gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, ctx.temperature, ctx.with_entropy, ctx.backend = inputs
    _, entropy, peak, log_sum = output
    ctx.save_for_backward(hidden, weight, targets, peak, log_sum, entropy)
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate(
    ctx: Any, on_logprob: Tensor | None, on_entropy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:
        on_entropy = None
    nothing = (None,) * 6
    if on_logprob is None and on_entropy is None:
        return nothing
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _backward(
        *ctx.saved_tensors,
        on_logprob,
        on_entropy,
        ctx.temperature,
        need_hidden,
        need_weight,
        ctx.backend,
    )
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight else None,
        *nothing[2:],
    )


_forward.register_autograd(_differentiate, setup_context=_save)
