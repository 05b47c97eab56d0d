"""One update of a model: forward, token log-probabilities, loss, backward, clip, step.

The trainer knows nothing of prompts or rewards. A stage gives it packed batches and a loss; the
loss divides by the token count of the whole update, so micro-batches only bound memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmr1.engine.attention import PackedAttention
from rmr1.engine.model import CausalLM
from rmr1.engine.optim_config import OptimConfig, learning_rate
from rmr1.engine.optimizer import make_optimizer
from rmr1.engine.packing import Batch
from rmr1.kernels.token_logprob import token_logprobs

# (log-probabilities of the response tokens [R], their micro-batch, R of the whole update)
# -> loss, and statistics that add up over micro-batches
Loss = Callable[[Tensor, Batch, int], tuple[Tensor, dict[str, Tensor]]]


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
        self.config = config
        self.optimizer = make_optimizer(model, config)
        self.total_updates = total_updates
        self.max_micro_tokens = max_micro_tokens
        self.temperature = temperature
        self.updates = 0

    def update(self, batch: Batch, loss: Loss) -> StepStats:
        """Make one optimiser step on `batch`, in micro-batches of `max_micro_tokens`.

        A gradient that is not finite leaves the weights alone and is reported as such.
        """
        count = batch.response_tokens
        total = 0.0
        sums: dict[str, float] = {"entropy": 0.0}
        device = self.model.lm_head_weight.device
        for part in batch.micro_batches(self.max_micro_tokens):
            micro = part.to(device)
            logprobs, entropy = response_logprobs(self.model, micro, self.temperature)
            value, stats = loss(logprobs, micro, count)
            torch.autograd.backward(value)
            total += value.item()
            sums["entropy"] += entropy.detach().sum().item() / count
            _accumulate(sums, stats)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        rate = learning_rate(self.config, self.updates, self.total_updates)
        if bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        entropy_mean = sums.pop("entropy")
        return StepStats(total, entropy_mean, norm.item(), rate, sums)


def _accumulate(sums: dict[str, float], stats: dict[str, Tensor]) -> None:
    """Add up means over micro-batches; keep the extremes of extremes."""
    for name, value in stats.items():
        if name.endswith("_max"):
            sums[name] = max(sums.get(name, -torch.inf), value.item())
        elif name.endswith("_min"):
            sums[name] = min(sums.get(name, torch.inf), value.item())
        else:
            sums[name] = sums.get(name, 0.0) + value.item()


def response_logprobs(
    model: CausalLM, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token, [R] each, with autograd."""
    hidden = model(batch.token_ids, batch.positions, PackedAttention(batch.lengths))  # [T, H]
    logprobs, entropy = token_logprobs(
        hidden[batch.predict_index],
        model.lm_head_weight,
        batch.targets,
        temperature=temperature,
        return_entropy=True,
    )
    return logprobs, entropy


@torch.no_grad()
def score(
    model: CausalLM, batch: Batch, *, max_micro_tokens: int = 8192, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the response tokens without a gradient, [R] on the host."""
    device = model.lm_head_weight.device
    micros = batch.micro_batches(max_micro_tokens)
    scored = [response_logprobs(model, micro.to(device), temperature)[0] for micro in micros]
    return torch.cat(scored).cpu()
