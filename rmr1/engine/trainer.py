"""One update of a model: forward, token log-probabilities, loss, backward, clip, step.

The trainer knows nothing of prompts or rewards. A stage gives it packed batches and a loss; the
loss divides by the token count of the whole update, so micro-batches only bound memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmr1.engine.model import CausalLM
from rmr1.engine.optim_config import OptimConfig, learning_rate
from rmr1.engine.optimizer import make_optimizer
from rmr1.engine.packing import Batch, Counts, Responses
from rmr1.engine.phases import Phases
from rmr1.engine.scorer import Scorer

# (log-probabilities [R], the response tokens they belong to, the counts of the whole update)
# -> loss, and statistics, both of which add up over the parts of an update
Loss = Callable[[Tensor, Responses, Counts], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one update did. `entropy` is the mean per response token, in nats."""

    loss: float
    entropy: float
    grad_norm: float
    learning_rate: float
    extra: dict[str, float]


class Trainer:
    """A model with its optimiser. `updates` counts the updates made since the run began."""

    def __init__(
        self,
        model: CausalLM,
        config: OptimConfig,
        *,
        total_updates: int,
        max_micro_tokens: int = 8192,
        temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.scorer = Scorer(model)
        self.config = config
        self.optimizer = make_optimizer(model, config)
        self.total_updates = total_updates
        self.max_micro_tokens = max_micro_tokens
        self.temperature = temperature
        self.updates = 0
        self.phases = Phases(model.lm_head_weight.device)

    def update(self, batch: Batch, loss: Loss, *, per_token: bool = False) -> StepStats:
        """Make one optimiser step on `batch`, in micro-batches of `max_micro_tokens`.

        `per_token` says that the loss of a token depends on no other token's log-probability: it is
        then asked chunk by chunk, and the head multiplies three times instead of four
        (rmr1/kernels/token_loss.py). A gradient that is not finite leaves the weights alone and is
        reported as such.
        """
        counts = batch.counts
        stats: dict[str, Tensor] = {}
        device = self.model.lm_head_weight.device
        for part in batch.micro_batches(self.max_micro_tokens):
            self._add_gradient(part.to(device), loss, counts, per_token, stats)
        sums = {name: value.item() for name, value in stats.items()}
        with self.phases("optimizer"):
            norm, rate = self._step()
        self.updates += 1
        return StepStats(sums.pop("loss"), sums.pop("entropy"), norm.item(), rate, sums)

    def _add_gradient(
        self, batch: Batch, loss: Loss, counts: Counts, per_token: bool, stats: dict[str, Tensor]
    ) -> None:
        """Add the gradient of one micro-batch to the parameters', and its figures to `stats`."""
        responses = batch.responses

        def part_loss(logprobs: Tensor, rows: slice) -> Tensor:
            value, more = loss(logprobs, responses.rows(rows), counts)
            _accumulate(stats, {"loss": value.detach(), **more})
            return value

        with self.phases("forward"):
            if per_token:
                value, entropy = self.scorer(batch, self.temperature, part_loss)
            else:
                logprobs, entropy = self.scorer(batch, self.temperature)
                value = part_loss(logprobs, slice(0, len(logprobs)))
        with self.phases("backward"):
            torch.autograd.backward(value)
        _accumulate(stats, {"entropy": entropy.detach().sum() / counts.tokens})

    def _step(self) -> tuple[Tensor, float]:
        """Clip, step and forget the gradient: its norm before clipping, and the learning rate."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        rate = learning_rate(self.config, self.updates, self.total_updates)
        if bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, rate


def _accumulate(sums: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
    """Add up means over the parts of an update; keep the extremes of extremes."""
    for name, value in stats.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            sums[name] = torch.maximum(sums[name], value)
        elif name.endswith("_min"):
            sums[name] = torch.minimum(sums[name], value)
        else:
            sums[name] = sums[name] + value


@torch.no_grad()
def score(
    model: CausalLM, batch: Batch, *, max_micro_tokens: int = 8192, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the response tokens without a gradient, [R] on the host."""
    device = model.lm_head_weight.device
    micros = batch.micro_batches(max_micro_tokens)
    scorer = Scorer(model)
    scored = [scorer(micro.to(device), temperature)[0] for micro in micros]
    return torch.cat(scored).cpu()
