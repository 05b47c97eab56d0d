"""One update of a model: forward, token log-probabilities, loss, backward, clip, step.

The trainer knows nothing of prompts or rewards. A stage gives it packed batches and a loss; the
loss divides by the token count of the whole update, so micro-batches only bound memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmr1.engine.balance import shares
from rmr1.engine.model import CausalLM
from rmr1.engine.optim_config import OptimConfig, ZeroConfig, learning_rate
from rmr1.engine.out_of_memory import advising
from rmr1.engine.packing import Batch, Counts, Responses
from rmr1.engine.phases import Phases
from rmr1.engine.ranks import Ranks
from rmr1.engine.scorer import Scorer
from rmr1.engine.updater import Local, Updater
from rmr1.engine.zero import Zero

# (log-probabilities [R], the response tokens they belong to, the counts of the whole update)
# -> loss, and statistics, both of which add up over the parts of an update
Loss = Callable[[Tensor, Responses, Counts], tuple[Tensor, dict[str, Tensor]]]


class NotFinite(Exception):
    """Too many updates in a row had a gradient that is not finite; `batch` is the last one's."""

    def __init__(self, batch: Batch, count: int) -> None:
        super().__init__(f"the gradients of {count} updates in a row were not finite")
        self.batch = batch


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one update did. `entropy` is the mean per response token, in nats."""

    loss: float
    entropy: float
    grad_norm: float
    learning_rate: float
    extra: dict[str, float]


class Trainer:
    """A model with its optimiser. `updates` counts the updates made since the run began.

    With several ranks every one of them is given the same batches and works on its share. `advice`
    says what to change where memory runs out; it ends an error's sentence.
    """

    def __init__(
        self,
        model: CausalLM,
        config: OptimConfig,
        *,
        total_updates: int,
        max_micro_tokens: int = 8192,
        temperature: float = 1.0,
        ranks: Ranks | None = None,
        zero: ZeroConfig | None = None,
        advice: str | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks or Ranks()
        self.updater: Updater = (
            Local(model, config)
            if self.ranks.size == 1
            else Zero(model, config, zero or ZeroConfig(), self.ranks)
        )
        self.total_updates = total_updates
        self.max_micro_tokens = max_micro_tokens
        self.temperature = temperature
        self.advice = advice or _memory_advice(max_micro_tokens)
        self.updates = 0
        self.skipped = 0  # of those, the last ones in a row whose gradient was not finite
        self.device = model.lm_head_weight.device
        self.phases = Phases(self.device)

    def update(self, batch: Batch, loss: Loss, *, per_token: bool = False) -> StepStats:
        """Make one optimiser step on `batch`, in micro-batches of `max_micro_tokens`.

        `per_token` says that the loss of a token depends on no other token's log-probability: it is
        then asked chunk by chunk, and the head multiplies three times instead of four
        (rmr1/kernels/token_loss.py). A gradient that is not finite leaves the weights alone and is
        reported as such.

        Raises:
            NotFinite: that was the case `OptimConfig.max_skipped` times in a row.
        """
        counts = batch.counts
        stats: dict[str, Tensor] = {}
        runs = shares(batch.groups, self.max_micro_tokens, self.ranks.size)[self.ranks.rank]
        for number, run in enumerate(runs):
            # A rank that has nothing to do joins in: the others gather and reduce with it.
            part = batch.slice(*(run or (0, 1))).to(self.device)
            last = number == len(runs) - 1
            with advising(self.advice):
                self._add_gradient(
                    part, loss, counts, per_token, stats, empty=run is None, last=last
                )
        sums = self.ranks.reduce({name: value.item() for name, value in stats.items()})
        with self.phases("optimizer"), advising(self.advice):
            rate = learning_rate(self.config, self.updates, self.total_updates)
            norm = self.updater.step(rate)
        self.updates += 1
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped >= self.config.max_skipped:
            raise NotFinite(batch, self.skipped)
        return StepStats(sums.pop("loss"), sums.pop("entropy"), norm, rate, sums)

    def _add_gradient(
        self,
        batch: Batch,
        loss: Loss,
        counts: Counts,
        per_token: bool,
        stats: dict[str, Tensor],
        *,
        empty: bool,
        last: bool,
    ) -> None:
        """Add the gradient of one micro-batch to the parameters', and its figures to `stats`.

        One that is `empty` adds nothing.
        """
        responses = batch.responses
        weight = 0.0 if empty else 1.0

        def part_loss(logprobs: Tensor, rows: slice) -> Tensor:
            value, more = loss(logprobs, responses.rows(rows), counts)
            value = value * weight
            extremes = {n: v for n, v in more.items() if n.endswith(("_max", "_min"))}
            sums = {n: v * weight for n, v in more.items() if n not in extremes}
            _accumulate(stats, {"loss": value.detach(), **sums, **extremes})
            return value

        with self.phases("forward"):
            if per_token:
                value, entropy = self.updater.score(batch, self.temperature, part_loss)
            else:
                logprobs, entropy = self.updater.score(batch, self.temperature)
                value = part_loss(logprobs, slice(0, len(logprobs)))
        with self.phases("backward"):
            self.updater.backward(value, last=last)
        _accumulate(stats, {"entropy": entropy.detach().sum() * weight / counts.tokens})

    def score(self, batch: Batch) -> Tensor:
        """Log-probabilities under the policy, without a gradient: [R] on the host, of all ranks."""
        return _score(
            self.updater.score,
            batch,
            self.device,
            self.max_micro_tokens,
            self.temperature,
            self.ranks,
            self.advice,
        )


def _memory_advice(max_micro_tokens: int) -> str:
    return f"lower max_micro_tokens (now {max_micro_tokens})"


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


def score(
    model: CausalLM,
    batch: Batch,
    *,
    max_micro_tokens: int = 8192,
    temperature: float = 1.0,
    ranks: Ranks | None = None,
    advice: str | None = None,
) -> Tensor:
    """Log-probabilities under a model that is whole, without a gradient: [R] on the host.

    Each rank scores its share of the batch, which all of them were given, and gets all. `advice`
    is as in `Trainer`.
    """
    return _score(
        Scorer(model),
        batch,
        model.lm_head_weight.device,
        max_micro_tokens,
        temperature,
        ranks or Ranks(),
        advice or _memory_advice(max_micro_tokens),
    )


@torch.no_grad()
def _score(
    scorer: Callable[..., tuple[Tensor, Tensor]],
    batch: Batch,
    device: torch.device,
    max_micro_tokens: int,
    temperature: float,
    ranks: Ranks,
    advice: str,
) -> Tensor:
    found = [torch.empty(0)]
    with advising(advice):
        for run in shares(batch.groups, max_micro_tokens, ranks.size)[ranks.rank]:
            logprobs = scorer(batch.slice(*(run or (0, 1))).to(device), temperature)[0]
            if run is not None:
                found.append(logprobs.cpu())
    return ranks.gather(torch.cat(found))
