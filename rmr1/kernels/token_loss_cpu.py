"""A chunk of `token_loss` on a CPU: BLAS makes its logits strip by strip, C++ takes the statistics
of a strip, or turns it into its gradient, while it is in the cache.

Shapes: C rows, R of them with a gradient, H hidden size, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmr1 import _C
from rmr1.kernels import token_logprob_cpu as tiles

# Logits of one chunk: what a call needs beyond its gradients.
CHUNK_BYTES = 48 * 1024**2


class Chunk:
    """The logits z [C, V] of some rows, their log-probabilities and, at the end, their gradient."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, buffer: Tensor
    ) -> None:
        self.x, self.weight, self.targets = tiles.scaled(hidden, temperature), weight, targets
        self.temperature = temperature
        self.z = buffer[: len(hidden)]
        self.peak = torch.full((len(hidden),), -torch.inf)
        total, dot, target = (torch.zeros(len(hidden)) for _ in range(3))
        for columns in tiles.spans(len(weight), tiles.COLUMNS):
            tile = torch.mm(self.x, weight[columns].float().T, out=self.z[:, columns])
            _C.logit_stats(
                tile, columns.start, targets, self.peak, total, dot, target,
                torch.get_num_threads(),
            )  # fmt: skip
        self.log_sum = total.log()
        self.logprobs = (target - self.peak) - self.log_sum
        self.entropy = self.log_sum - dot / total

    def backward(
        self, slope: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
    ) -> None:
        """Write the gradient of these rows into grad_hidden [C, H] (zeros until now) and add that
        of the weight to grad_weight [V, H] fp32. The logits may be overwritten.
        """
        live = slope.nonzero().squeeze(1)  # [R]; NaN counts
        every = len(live) == len(slope)
        x, targets, peak, log_sum, slope = (
            value if every else value[live]
            for value in (self.x, self.targets, self.peak, self.log_sum, slope)
        )
        grad_x = None if grad_hidden is None else torch.zeros_like(x)
        for columns in tiles.spans(len(self.weight) if len(live) else 0, tiles.COLUMNS):
            tile = self.z[:, columns] if every else self.z[:, columns][live]
            _C.logit_gradient(
                tile, columns.start, targets, peak, log_sum, None, slope, None,
                torch.get_num_threads(),
            )  # fmt: skip
            strip = None if grad_weight is None else grad_weight[columns]
            tiles.accumulate(tile, x, self.weight[columns].float(), grad_x, strip)
        if grad_hidden is not None and grad_x is not None:
            grad_hidden[live] = grad_x.div_(self.temperature).to(grad_hidden.dtype)


def buffer(rows: int, weight: Tensor) -> Tensor:
    """Room for the logits of one chunk of at most `rows` rows, fp32 [C, V]."""
    words = max(1, len(weight))
    return torch.empty(min(max(1, CHUNK_BYTES // (4 * words)), max(1, rows)), words)
