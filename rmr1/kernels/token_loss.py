"""Loss and gradient in one go, for losses that depend on one token's log-probability alone.

`token_logprobs` makes the logits twice, in the forward and again in the backward: four GEMMs. When
the loss of a token is a function of its own log-probability (GRPO, NLL, any clipped or
KL-penalised token loss; not GSPO, whose ratio is the sequence's), its gradient is known as soon as
the token's logits are, so a chunk of rows makes them once, asks for the loss, and turns them into
gradients: three GEMMs. The chunk holds the logits of a few hundred rows, never [T, V]. Rows whose
slope is zero cost no gradient.

Shapes: T tokens, C rows of a chunk, H hidden size, V words. Idea: Liger-Kernel's fused linear
cross-entropy, opened to any token loss, with fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmr1.kernels import token_loss_cpu
from rmr1.kernels.dispatch import Backend, choose
from rmr1.kernels.token_logprob import autocasted, check_shapes, check_values, reference
from rmr1.kernels.token_logprob_cpu import spans

# (log-probabilities [C] with autograd, the rows of the batch that they belong to) -> their loss,
# a scalar that adds up over the chunks
ChunkLoss = Callable[[Tensor, slice], Tensor]


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: ChunkLoss,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `loss` over chunks of rows, with its gradient already made.

    Args:
        hidden: [T, H], fp32, bf16 or fp16 (or fp64, then all is fp64).
        weight: [V, H] in the dtype of hidden: the language-model head.
        targets: [T] int64, each in [0, V).
        loss: called once a chunk with its log-probabilities [C] and its rows, a slice of T. What it
            returns is differentiated in the log-probabilities and in nothing else.
        temperature: divides the logits; above 0.

    Returns:
        The loss (scalar fp32, differentiable once in hidden and weight), and log-probabilities and
        entropies [T] fp32 without a gradient.

    Raises:
        ValueError: as `token_logprobs`; or a loss that is no scalar, or does not depend on the
            log-probabilities it was given.
    """
    hidden, weight = autocasted(hidden), autocasted(weight)
    check_shapes("token_loss", hidden, weight, targets, temperature)
    check_values("token_loss", hidden, weight, targets)
    backend = choose("token_loss", hidden, native=hidden.dtype != torch.float64)
    if backend == "reference":
        logprobs, entropy = reference(hidden, weight, targets, temperature)
        value = loss(logprobs, slice(0, len(targets)))
        return value, logprobs.detach(), entropy.detach()
    value, logprobs, entropy = _TokenLoss.apply(hidden, weight, targets, loss, temperature, backend)
    return value, logprobs, entropy


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: ChunkLoss,
        temperature: float,
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels, count = _kernels(backend), hidden.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # Summed over chunks, so in fp32 whatever the dtype of the weight.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        logprobs, entropy = hidden.new_empty(2, count, dtype=torch.float32)
        value = hidden.new_zeros((), dtype=torch.float32)
        buffer = kernels.buffer(count, weight)
        for rows in spans(count, len(buffer)):
            chunk = kernels.Chunk(hidden[rows], weight, targets[rows], temperature, buffer)
            logprobs[rows], entropy[rows] = chunk.logprobs, chunk.entropy
            part, slope = _differentiate(loss, chunk.logprobs, rows)
            value += part
            if need_hidden or need_weight:
                chunk.backward(
                    slope, None if grad_hidden is None else grad_hidden[rows], grad_weight
                )
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        )
        ctx.mark_non_differentiable(logprobs, entropy)
        return value, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grads = ctx.saved_tensors
        # A scaled loss, such as one of several that are added up. To look whether it is one would
        # wait for a GPU.
        if grad.device.type != "cpu" or grad != 1:
            grads = [None if g is None else g * grad.to(g.dtype) for g in grads]
        return grads[0], grads[1], None, None, None, None


def _kernels(backend: Backend) -> ModuleType:
    """Triton is imported when it is needed first: it is there on Linux only."""
    if backend == "triton":
        from rmr1.kernels import token_loss_triton

        return token_loss_triton
    return token_loss_cpu


def _differentiate(loss: ChunkLoss, logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The loss of a chunk, and its derivative in every log-probability [C]."""
    with torch.enable_grad():
        given = logprobs.detach().requires_grad_()
        value = loss(given, rows)
    if value.ndim or not value.requires_grad:
        raise ValueError(
            "token_loss: loss must return a scalar that depends on the log-probabilities it was"
            f" given, got shape {list(value.shape)}, requires_grad {value.requires_grad}."
        )
    (slope,) = torch.autograd.grad(value, given)
    return value.detach(), slope.float()
