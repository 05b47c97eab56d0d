"""The fused log-probability on a CPU: BLAS makes a tile of logits, C++ works on it while it is hot.

A tile is [ROWS, COLUMNS] floats, half of a second-level cache, and large enough that its GEMM runs
at the speed of a large one. What C++ does between the GEMMs stands in csrc/token_logprob.cpp.

Shapes: T tokens, R of them with a gradient, H hidden size, V words; x is [.., H], w a strip [C, H].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rmr1 import _C

ROWS, COLUMNS = 512, 1024


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy (empty unless wanted), peak and log_sum, fp32 [T] each."""
    count = hidden.shape[0]
    peak, total, target = (torch.zeros(count) for _ in range(3))
    dot = torch.zeros(count) if with_entropy else None
    peak.fill_(-torch.inf)
    buffer = tile_buffer(count, weight.shape[0])
    for rows in spans(count, ROWS):
        x = scaled(hidden[rows], temperature)
        for columns in spans(weight.shape[0], COLUMNS):
            z = logits(x, weight[columns].float(), buffer)
            _C.logit_stats(
                z,
                columns.start,
                targets[rows],
                peak[rows],
                total[rows],
                None if dot is None else dot[rows],
                target[rows],
                torch.get_num_threads(),
            )
    log_sum = total.log()
    entropy = torch.zeros(0) if dot is None else log_sum - dot / total
    return (target - peak) - log_sum, entropy, peak, log_sum


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    live: Tensor,
    *,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight from those of log-probability and entropy; `live` [R] are the
    rows that have one. `saved`: peak, log_sum and entropy of the forward.

    The vocabulary is the outer loop, so each strip of the weight's gradient is written once.
    """
    every = len(live) == len(hidden)  # then nothing is copied
    peak, log_sum = (value[live] for value in saved[:2])
    on_logprob, on_entropy = (None if grad is None else grad[live].float() for grad in grads)
    entropy = saved[2][live] if on_entropy is not None else None
    words, x = targets[live], scaled(hidden if every else hidden[live], temperature)
    grad_x = torch.zeros_like(x) if need_hidden else None  # [R, H]
    grad_weight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    buffer = tile_buffer(len(live), weight.shape[0])
    for columns in spans(weight.shape[0], COLUMNS):
        w = weight[columns].float()
        # Summed in fp32 and rounded once.
        strip = torch.zeros_like(w) if need_weight and len(live) else None
        for rows in spans(len(live), ROWS):
            z = logits(x[rows], w, buffer)
            _C.logit_gradient(
                z,
                columns.start,
                words[rows],
                peak[rows],
                log_sum[rows],
                None if entropy is None else entropy[rows],
                None if on_logprob is None else on_logprob[rows],
                None if on_entropy is None else on_entropy[rows],
                torch.get_num_threads(),
            )
            accumulate(z, x[rows], w, None if grad_x is None else grad_x[rows], strip)
        if strip is not None:
            grad_weight[columns] = strip
    if grad_x is None:
        return hidden.new_empty(0), grad_weight
    grad_x = grad_x.div_(temperature).to(hidden.dtype)
    if every:
        return grad_x, grad_weight
    return hidden.new_zeros(hidden.shape).index_copy_(0, live, grad_x), grad_weight


def accumulate(
    z: Tensor, x: Tensor, w: Tensor, grad_x: Tensor | None, grad_w: Tensor | None
) -> None:
    """Add what d loss / d logits z says of x and w, the factors that z was made of."""
    if grad_x is not None:
        grad_x.addmm_(z, w)
    if grad_w is not None:
        grad_w.addmm_(z.T, x)


def scaled(hidden: Tensor, temperature: float) -> Tensor:
    """Rows of hidden in fp32, by the temperature."""
    return hidden.float() if temperature == 1.0 else hidden.float() / temperature


def logits(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
    """x w^T in the corner of `buffer`: a tile that the next one overwrites."""
    return torch.mm(x, w.T, out=buffer[: x.shape[0], : w.shape[0]])


def tile_buffer(rows: int, words: int) -> Tensor:
    """Room for the largest tile."""
    return torch.empty(min(rows, ROWS), min(words, COLUMNS))


def spans(count: int, size: int) -> Iterator[slice]:
    """0..count-1 in runs of `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
