"""One step of GRPO, whatever the prompts and the reward: sample, reward, score, update.

Departures from the published RM-R1 code: one global token count normalises the loss (theirs is a
mean per micro-batch), and a prompt is computed once for all of its samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.model import CausalLM
from rmr1.engine.packing import Batch, Counts, Responses, pack
from rmr1.engine.phases import Phases
from rmr1.engine.reference import Reference
from rmr1.engine.trainer import Loss, StepStats, Trainer, score
from rmr1.group_sampling import Drawn, GroupSampler, Reward, Samples, Task
from rmr1.grpo_config import GrpoConfig, RolloutConfig
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss


@dataclass(frozen=True, slots=True)
class GrpoStep:
    """What a step did. `seconds` by phase, of this rank."""

    drawn: Drawn
    batch: Batch
    updates: list[StepStats]
    seconds: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Of rewards, lengths, updates and time, by TRL's names."""
        return {
            **_reward_figures(self.drawn.samples),
            **_length_figures(self.drawn.samples),
            **_update_figures(self.updates),
            **_mismatch_figures(self.batch, self.updates[0]),
            "num_tokens": self.batch.response_tokens,
            **{f"{name}_time": seconds for name, seconds in self.seconds.items()},
        }


class Grpo:
    """A policy with what trains it. `reference` is the model that the KL is measured to.

    `trainer` updates the policy. Where it holds the weights in shards (`trainer.updater.whole` is
    false), `sampler` is a model of its own to sample with.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Any,
        *,
        reference: Reference | None,
        rollout: RolloutConfig,
        grpo: GrpoConfig,
        sampler: CausalLM | None = None,
    ) -> None:
        if (reference is None) != (grpo.beta == 0):
            raise ValueError(
                f"a reference is needed if, and only if, beta > 0; beta is {grpo.beta}"
            )
        if (sampler is None) != trainer.updater.whole:
            raise ValueError("a sampler is needed if, and only if, the trainer shards its weights")
        self.trainer, self.reference, self.config = trainer, reference, grpo
        self.generator = Generator(
            sampler or trainer.model, tokenizer, kv_memory_gb=rollout.kv_memory_gb
        )
        self.sampling = SamplingParams(
            n=rollout.samples,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
        )
        self.prompts, self.release = rollout.prompts, rollout.release
        self.objective = objective_of(grpo, rollout.max_new_tokens)
        self.loss = _loss(self.objective)
        self.phases = Phases(trainer.device)

    def step(self, tasks: Iterator[Task], reward: Reward, *, seed: int) -> GrpoStep:
        """One rollout and the updates made of it."""
        phase, trainer = self.phases, self.trainer
        drawn = self._sampler().draw(tasks, reward, seed=seed)
        chosen = drawn.chosen
        if self.release:
            self.generator.release(weights=not trainer.updater.whole)
        with phase("reward"):
            advantages = group_advantages(
                chosen.rewards,
                chosen.groups,
                scale=self.config.scale,
                baseline=self.config.baseline,
            )
        batch = pack(  # a prompt once, its samples behind it
            chosen.prompts,
            chosen.token_ids,
            samples=self.sampling.n,
            advantages=advantages,
            rollout_logprobs=chosen.logprobs,
        )
        with phase("reference"):
            ref = None if self.reference is None else self._score_reference(batch, self.reference)
        with phase("old_logprobs"):
            recompute = self.config.old_logprobs == "recompute"
            old = trainer.score(batch) if recompute else batch.rollout_logprobs
        batch = batch.with_logprobs(old=old, ref=ref)
        with phase("update"):
            updates = [
                trainer.update(mini, self.loss, per_token=self.objective.per_token)
                for mini in batch.split(self.config.minibatches)
            ]
        with phase("sync"):  # what the generator has cached is stale
            self.sync()
        return GrpoStep(drawn, batch, updates, phase.take() | trainer.phases.take())

    def sync(self) -> None:
        """Give the generator the trainer's weights: its own parameters, or gathered from shards."""
        updater = self.trainer.updater
        self.generator.sync(updater.model if updater.whole else updater.weights())

    def _sampler(self) -> GroupSampler:
        return GroupSampler(
            self.generator,
            self.sampling,
            self.prompts,
            self.config.resample_rounds,
            self.trainer.ranks,
            self.phases,
        )

    def _score_reference(self, batch: Batch, reference: Reference) -> Tensor:
        trainer = self.trainer
        with reference.ready() as model:
            return score(
                model,
                batch,
                max_micro_tokens=trainer.max_micro_tokens,
                temperature=trainer.temperature,
                ranks=trainer.ranks,
                advice=trainer.advice,
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


def _reward_figures(samples: Samples) -> dict[str, float]:
    """Of all that was sampled, whether it was trained on or not."""
    spread = samples.rewards.view(len(samples.prompts), -1).std(dim=1)  # [P]
    return {
        "reward": samples.rewards.mean().item(),
        "reward_std": spread.mean().item(),
        "frac_reward_zero_std": samples.rewarded_alike.float().mean().item(),
        **{f"rewards/{name}/mean": part.mean().item() for name, part in samples.parts.items()},
        "prompts": len(samples.prompts),
    }


def _length_figures(samples: Samples) -> dict[str, float]:
    lengths = [len(tokens) for tokens in samples.token_ids]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": samples.cut.float().mean().item(),
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
        "skipped_updates": sum(not math.isfinite(u.grad_norm) for u in updates),
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
