"""Loss and gradient in one go, for losses that depend on one token's log-probability alone.

`token_logprobs` makes the logits twice, in the forward and again in the backward: four GEMMs. When
the loss of a token is a function of its own log-probability (GRPO, NLL, any clipped or
KL-penalised token loss; not GSPO, whose ratio is the sequence's), its gradient is known as soon as
the token's logits are, so a chunk of rows makes them once, asks for the loss, and turns them into
gradients in place: three GEMMs. The chunk holds the logits of a few hundred rows, never [T, V].

Shapes: T tokens, C rows of a chunk, H hidden size, V words. Idea: Liger-Kernel's fused linear
cross-entropy, opened to any token loss, with fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmr1 import _C
from rmr1.kernels import token_logprob_cpu as tiles
from rmr1.kernels.dispatch import choose
from rmr1.kernels.token_logprob import check_shapes, check_values, reference

# (log-probabilities [C] with autograd, the rows of the batch that they belong to) -> their loss,
# a scalar that adds up over the chunks
ChunkLoss = Callable[[Tensor, slice], Tensor]

# Logits of one chunk.
CHUNK_BYTES = 48 * 1024**2


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
    check_shapes("token_loss", hidden, weight, targets, temperature)
    check_values("token_loss", hidden, weight, targets)
    backend = choose("token_loss", hidden, native=hidden.dtype != torch.float64)
    if backend == "reference":
        logprobs, entropy = reference(hidden, weight, targets, temperature)
        value = loss(logprobs, slice(0, len(targets)))
        return value, logprobs.detach(), entropy.detach()
    value, logprobs, entropy = _TokenLoss.apply(hidden, weight, targets, loss, temperature)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, words = hidden.shape[0], weight.shape[0]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        # Summed over chunks, so in fp32 whatever the dtype of the weight.
        grad_weight = torch.zeros(weight.shape) if need_weight else None
        logprobs, entropy = torch.empty(count), torch.empty(count)
        value = torch.zeros(())
        size = min(max(1, CHUNK_BYTES // (4 * words)), max(1, count))
        z = torch.empty(size, words)
        for rows in tiles.spans(count, size):
            x = tiles.scaled(hidden[rows], temperature)
            chunk = _Chunk(x, weight, targets[rows], z[: len(x)])
            logprobs[rows], entropy[rows] = chunk.logprobs, chunk.entropy
            part, slope = _differentiate(loss, chunk.logprobs, rows)
            value += part
            grad_x = torch.zeros_like(x) if need_hidden else None
            chunk.backward(slope, grad_x, grad_weight)
            if grad_hidden is not None and grad_x is not None:
                grad_hidden[rows] = grad_x.div_(temperature)
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        )
        ctx.mark_non_differentiable(logprobs, entropy)
        return value, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grads = ctx.saved_tensors
        if grad != 1:  # a scaled loss, such as one of several that are added up
            grads = [None if g is None else g * grad for g in grads]
        return grads[0], grads[1], None, None, None


class _Chunk:
    """The logits z [C, V] of some rows, their log-probabilities and, at the end, their gradient."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, z: Tensor) -> None:
        self.x, self.weight, self.targets, self.z = x, weight, targets, z
        self.peak = torch.full((len(x),), -torch.inf)
        total, dot, target = (torch.zeros(len(x)) for _ in range(3))
        for columns in tiles.spans(len(weight), tiles.COLUMNS):
            tile = torch.mm(x, weight[columns].float().T, out=z[:, columns])
            _C.logit_stats(
                tile, columns.start, targets, self.peak, total, dot, target,
                torch.get_num_threads(),
            )  # fmt: skip
        self.log_sum = total.log()
        self.logprobs = (target - self.peak) - self.log_sum
        self.entropy = self.log_sum - dot / total

    def backward(self, slope: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None) -> None:
        """Overwrite the logits with their gradient and add it to grad_x [C, H], grad_weight."""
        for columns in tiles.spans(len(self.weight), tiles.COLUMNS):
            tile = self.z[:, columns]
            _C.logit_gradient(
                tile, columns.start, self.targets, self.peak, self.log_sum, None, slope, None,
                torch.get_num_threads(),
            )  # fmt: skip
            w = self.weight[columns].float()
            strip = None if grad_weight is None else grad_weight[columns]
            tiles.accumulate(tile, self.x, w, grad_x, strip)


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
