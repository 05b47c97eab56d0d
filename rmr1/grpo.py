"""One step of GRPO, whatever the prompts and the reward: sample, reward, score, update.

Departures from the published RM-R1 code: one global token count normalises the loss (theirs is a
mean per micro-batch), and a prompt is computed once for all of its samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.model import CausalLM
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import Batch, Counts, Responses, pack
from rmr1.engine.phases import Phases
from rmr1.engine.trainer import Loss, StepStats, Trainer, score
from rmr1.grpo_config import GrpoConfig, RolloutConfig
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss

# Rewards [N] of the samples of a step: those of the first prompt, then those of the second, ...
Reward = Callable[[list[Rollout]], Tensor]


@dataclass(frozen=True, slots=True)
class GrpoStep:
    """What a step did. `seconds` by phase; N samples, those of a prompt side by side."""

    rollouts: list[Rollout]
    rewards: Tensor  # [N]
    groups: Tensor  # [N] int64, the prompt of each
    batch: Batch
    updates: list[StepStats]
    seconds: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Of rewards, lengths, updates and time, by TRL's names."""
        return {
            **_reward_figures(self.rewards, self.groups),
            **_length_figures(self.rollouts),
            **_update_figures(self.updates),
            **_mismatch_figures(self.batch, self.updates[0]),
            "num_tokens": self.batch.response_tokens,
            **{f"{name}_time": seconds for name, seconds in self.seconds.items()},
        }


class Grpo:
    """A policy with what trains it. `reference` is the model that the KL is measured to."""

    def __init__(
        self,
        policy: CausalLM,
        tokenizer: Any,
        *,
        reference: CausalLM | None,
        rollout: RolloutConfig,
        grpo: GrpoConfig,
        optim: OptimConfig,
        total_updates: int,
        max_micro_tokens: int,
    ) -> None:
        if (reference is None) != (grpo.beta == 0):
            raise ValueError(
                f"a reference is needed if, and only if, beta > 0; beta is {grpo.beta}"
            )
        self.reference, self.rollout, self.config = reference, rollout, grpo
        self.max_micro_tokens = max_micro_tokens
        self.trainer = Trainer(
            policy,
            optim,
            total_updates=total_updates,
            max_micro_tokens=max_micro_tokens,
            temperature=rollout.temperature,
        )
        self.generator = Generator(policy, tokenizer, kv_memory_gb=rollout.kv_memory_gb)
        self.sampling = SamplingParams(
            n=rollout.samples,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
        )
        self.objective = objective_of(grpo, rollout.max_new_tokens)
        self.loss = _loss(self.objective)
        self.phases = Phases(policy.lm_head_weight.device)

    def step(self, prompts: list[list[int]], reward: Reward, *, seed: int) -> GrpoStep:
        """One rollout and the updates made of it."""
        phase, samples = self.phases, self.rollout.samples
        with phase("rollout"):
            sampling = replace(self.sampling, seed=seed)
            rollouts = list(chain(*self.generator.generate(prompts, sampling)))
        with phase("reward"):
            rewards = reward(rollouts)
            groups = torch.arange(len(prompts)).repeat_interleave(samples)
            advantages = group_advantages(
                rewards, groups, scale=self.config.scale, baseline=self.config.baseline
            )
        batch = pack(  # a prompt once, its samples behind it
            prompts,
            [rollout.token_ids for rollout in rollouts],
            samples=samples,
            advantages=advantages,
            rollout_logprobs=[rollout.logprobs for rollout in rollouts],
        )
        with phase("reference"):
            ref = None if self.reference is None else self._score(self.reference, batch)
        with phase("old_logprobs"):
            recompute = self.config.old_logprobs == "recompute"
            old = self._score(self.trainer.model, batch) if recompute else batch.rollout_logprobs
        batch = batch.with_logprobs(old=old, ref=ref)
        with phase("update"):
            updates = [
                self.trainer.update(mini, self.loss, per_token=self.objective.per_token)
                for mini in batch.split(self.config.minibatches)
            ]
        with phase("sync"):  # its own parameters: what it has cached is stale
            self.generator.sync(self.trainer.model)
        seconds = phase.take() | self.trainer.phases.take()
        return GrpoStep(rollouts, rewards, groups, batch, updates, seconds)

    def _score(self, model: CausalLM, batch: Batch) -> Tensor:
        return score(
            model,
            batch,
            max_micro_tokens=self.max_micro_tokens,
            temperature=self.rollout.temperature,
        )


def objective_of(grpo: GrpoConfig, max_new_tokens: int) -> PolicyLossConfig:
    """The loss that a configuration names."""
    fields = {field.name for field in dataclasses.fields(PolicyLossConfig)} - {"max_length"}
    return PolicyLossConfig(
        **{name: getattr(grpo, name) for name in fields},
        max_length=max_new_tokens if grpo.normalize == "fixed" else None,
    )


def _loss(objective: PolicyLossConfig) -> Loss:
    def loss(
        logprobs: Tensor, tokens: Responses, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert tokens.old_logprobs is not None
        assert tokens.rollout_logprobs is not None
        value, stats = policy_loss(
            logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            tokens.sequence_ids,
            ref_logprobs=tokens.ref_logprobs,
            rollout_logprobs=None if objective.correction == "none" else tokens.rollout_logprobs,
            config=objective,
            token_count=counts.tokens,
            sequence_count=counts.sequences,
            sequence_lengths=tokens.lengths,
        )
        apart = (logprobs.detach() - tokens.rollout_logprobs).abs()
        mismatch = {
            "logprob_mismatch": apart.sum() / counts.tokens,
            "logprob_mismatch_max": apart.max(),
        }
        return value, {**stats, **mismatch}

    return loss


# --- Figures -------------------------------------------------------------------------------------


def _reward_figures(rewards: Tensor, groups: Tensor) -> dict[str, float]:
    spread = rewards.view(int(groups[-1]) + 1, -1).std(dim=1)  # [P]
    return {
        "reward": rewards.mean().item(),
        "reward_std": spread.mean().item(),
        "frac_reward_zero_std": (spread == 0).float().mean().item(),
    }


def _length_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    cut = sum(rollout.finish_reason == "length" for rollout in rollouts)
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": cut / len(rollouts),
    }


def _update_figures(updates: Sequence[StepStats]) -> dict[str, float]:
    """Means over the updates of a step."""
    names = list(updates[0].extra)
    figures = {name: sum(u.extra[name] for u in updates) / len(updates) for name in names}
    figures["ratio_max"] = max(u.extra["ratio_max"] for u in updates)
    figures["ratio_min"] = min(u.extra["ratio_min"] for u in updates)
    return {
        "loss": sum(u.loss for u in updates) / len(updates),
        "entropy": sum(u.entropy for u in updates) / len(updates),
        "grad_norm": sum(u.grad_norm for u in updates) / len(updates),
        "learning_rate": updates[-1].learning_rate,
        **figures,
    }


def _mismatch_figures(batch: Batch, first: StepStats) -> dict[str, float]:
    """How far apart generator and trainer are on this rollout, before any change of the weights.

    Over all of it where the trainer has scored it, else over the first minibatch, on which it costs
    nothing.
    """
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    if batch.old_logprobs is batch.rollout_logprobs:
        return {name: first.extra[name] for name in ("logprob_mismatch", "logprob_mismatch_max")}
    apart = (batch.old_logprobs - batch.rollout_logprobs).abs()
    return {
        "logprob_mismatch": apart.mean().item(),
        "logprob_mismatch_max": apart.max().item(),
    }
