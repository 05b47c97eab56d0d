"""Stage 2, RL with verifiable rewards: GRPO on the judge's own judgments.

One step: draw pairs, sample a group of judgments for each, reward the verdicts, turn rewards into
advantages within the group, and update the policy on minibatches of the rollout. Departures from
the published code: one global token count normalises the loss (theirs is a mean per micro-batch),
and one parser extracts verdicts in training and evaluation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmr1.config import RlvrConfig
from rmr1.data import Pair, shuffled_epochs
from rmr1.engine.checkpoint import Progress, restore_trainer
from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.packing import Batch, Responses, pack
from rmr1.engine.trainer import Loss, StepStats, Trainer, score
from rmr1.engine.weights import load_model
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss
from rmr1.models import load_tokenizer, resolve_device, resolve_model
from rmr1.prompts import encode, render
from rmr1.rewards import correctness
from rmr1.run import Run, StopRequest, sample_row, training_pairs
from rmr1.verdict import Verdict, parse_verdicts

# As in rmr1/distill.py: after each step, and once before the first.
OnStep = Callable[[int, int, dict[str, float]], None]
OnStart = Callable[[int, int], None]


def rlvr(
    config: RlvrConfig, *, on_start: OnStart | None = None, on_step: OnStep | None = None
) -> Path:
    """Run or resume stage 2 and return the directory of the trained model."""
    run = Run(config)
    start = resolve_model(config.model)
    stage = _Stage(config, run, start)
    progress = stage.resume()
    if on_start is not None:
        on_start(progress.step, config.steps)
    with StopRequest() as stop:
        for step in range(progress.step + 1, config.steps + 1):
            row = stage.step(step)
            if on_step is not None:
                on_step(step, config.steps, row)
            if step % config.checkpoint_every == 0 or step == config.steps or stop.requested:
                saved = run.save(stage.trainer, stage.progress, tokenizer_from=start)
                # Only here: what asks to stop from now on finds the next step's save.
                if stop.requested:
                    raise KeyboardInterrupt(f"saved {saved}; run the same command again to go on")
    return run.checkpoints / f"step-{config.steps:06d}"


class _Stage:
    """What lives through all steps of a run: policy, reference, generator, data."""

    def __init__(self, config: RlvrConfig, run: Run, start: Path) -> None:
        self.config, self.run = config, run
        self.tokenizer = load_tokenizer(start)
        self.prompts, self.dropped = _fitting_prompts(config, self.tokenizer)
        device = resolve_device(config.device)
        policy = load_model(run.checkpoint or start, dtype=config.dtype, device=device)
        # r_ref is the model before RL. With beta 0 it is never loaded.
        self.reference = None
        if config.grpo.beta > 0:
            self.reference = (
                load_model(start, dtype=config.dtype, device=device)
                if run.checkpoint
                else copy.deepcopy(policy)
            ).requires_grad_(False)
        _check_positions(config, self.prompts, policy.config.max_position_embeddings)
        self.trainer = Trainer(
            policy,
            config.optim,
            total_updates=config.steps * config.grpo.minibatches,
            max_micro_tokens=config.max_micro_tokens,
            temperature=config.rollout.temperature,
        )
        self.generator = Generator(policy, self.tokenizer, kv_memory_gb=config.rollout.kv_memory_gb)
        self.objective = _objective(config)
        self.loss = _loss(self.objective)
        self.progress = Progress(0, 0, 0)

    def resume(self) -> Progress:
        """Restore the newest checkpoint, if there is one, and place the data cursor."""
        if self.run.checkpoint is not None:
            self.progress = restore_trainer(self.run.checkpoint, self.trainer)
        self.run.start(self.progress)
        self.stream = islice(
            shuffled_epochs(self.prompts, self.config.seed), self.progress.drawn, None
        )
        return self.progress

    def step(self, step: int) -> dict[str, Any]:
        """One RLVR step; returns its row of metrics."""
        config = self.config
        began = time.perf_counter()
        drawn = list(islice(self.stream, config.rollout.prompts))
        pairs = [pair for pair, _ in drawn for _ in range(config.rollout.samples)]
        prompts = [ids for _, ids in drawn]

        rollouts = list(chain(*self.generator.generate(prompts, _sampling(config, step))))
        sampled = time.perf_counter()
        verdicts = parse_verdicts([rollout.text for rollout in rollouts])
        rewards = correctness(verdicts, pairs)
        groups = torch.arange(len(drawn)).repeat_interleave(config.rollout.samples)
        advantages = group_advantages(
            rewards, groups, scale=config.grpo.scale, baseline=config.grpo.baseline
        )
        batch = pack(
            [ids for ids in prompts for _ in range(config.rollout.samples)],
            [rollout.token_ids for rollout in rollouts],
            advantages=advantages,
            rollout_logprobs=[rollout.logprobs for rollout in rollouts],
        )
        batch = batch.with_logprobs(old=self._old_logprobs(batch), ref=self._ref_logprobs(batch))
        updates = [
            self.trainer.update(mini, self.loss, per_token=self.objective.per_token)
            for mini in batch.split(config.grpo.minibatches)
        ]

        self.generator.sync(self.trainer.model)  # its own parameters: what it has cached is stale

        self.progress = Progress(step, self.trainer.updates, self.progress.drawn + len(drawn))
        row = {
            "stage": "rlvr",
            "step": step,
            **_reward_figures(rewards, groups, verdicts),
            **_length_figures(rollouts),
            **_update_figures(updates),
            **_mismatch_figures(batch, updates[0]),
            "num_tokens": batch.response_tokens,
            "dropped_prompts": self.dropped,
            "rollout_time": sampled - began,
            "step_time": time.perf_counter() - began,
        }
        self.run.log(row)
        first = rollouts[0]
        self.run.sample(sample_row("rlvr", step, pairs[0], first.text, verdicts[0].answer))
        return row

    def _old_logprobs(self, batch: Batch) -> Tensor | None:
        if self.config.grpo.old_logprobs == "rollout":
            return batch.rollout_logprobs
        return score(
            self.trainer.model,
            batch,
            max_micro_tokens=self.config.max_micro_tokens,
            temperature=self.config.rollout.temperature,
        )

    def _ref_logprobs(self, batch: Batch) -> Tensor | None:
        if self.reference is None:
            return None
        return score(
            self.reference,
            batch,
            max_micro_tokens=self.config.max_micro_tokens,
            temperature=self.config.rollout.temperature,
        )


def _fitting_prompts(
    config: RlvrConfig, tokenizer: Any
) -> tuple[list[tuple[Pair, list[int]]], int]:
    """Pairs with their prompts, longer ones dropped; how many were dropped."""
    pairs = training_pairs(config)
    rows = [(pair, encode(tokenizer, render(pair, config.prompt_style))) for pair in pairs]
    kept = [row for row in rows if len(row[1]) <= config.max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"all {len(rows)} prompts are longer than max_prompt_tokens"
            f" ({config.max_prompt_tokens}); raise it"
        )
    return kept, len(rows) - len(kept)


def _check_positions(
    config: RlvrConfig, prompts: Sequence[tuple[Pair, list[int]]], positions: int
) -> None:
    """Refuse before the first step what the generator would refuse in the middle of the run."""
    longest = max(len(ids) for _, ids in prompts)
    if longest + config.rollout.max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt ({longest} tokens) with rollout.max_new_tokens"
            f" ({config.rollout.max_new_tokens}) is more than the model's {positions} positions;"
            f" lower max_prompt_tokens (now {config.max_prompt_tokens}) to drop long prompts, or"
            " lower rollout.max_new_tokens"
        )


def _sampling(config: RlvrConfig, step: int) -> SamplingParams:
    return SamplingParams(
        n=config.rollout.samples,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        # Every step draws afresh, and a resumed step draws what it would have drawn.
        seed=config.seed * 1_000_003 + step,
    )


def _objective(config: RlvrConfig) -> PolicyLossConfig:
    return PolicyLossConfig(
        clip_low=config.grpo.clip_low, clip_high=config.grpo.clip_high, beta=config.grpo.beta
    )


def _loss(objective: PolicyLossConfig) -> Loss:
    def loss(logprobs: Tensor, tokens: Responses, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        assert tokens.old_logprobs is not None
        assert tokens.rollout_logprobs is not None
        value, stats = policy_loss(
            logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            tokens.sequence_ids,
            ref_logprobs=tokens.ref_logprobs,
            config=objective,
            token_count=count,
        )
        apart = (logprobs.detach() - tokens.rollout_logprobs).abs()
        mismatch = {"logprob_mismatch": apart.sum() / count, "logprob_mismatch_max": apart.max()}
        return value, {**stats, **mismatch}

    return loss


def _reward_figures(
    rewards: Tensor, groups: Tensor, verdicts: Sequence[Verdict]
) -> dict[str, float]:
    spread = rewards.view(int(groups[-1]) + 1, -1).std(dim=1)  # [P]
    return {
        "reward": rewards.mean().item(),
        "reward_std": spread.mean().item(),
        "frac_reward_zero_std": (spread == 0).float().mean().item(),
        "parse_rate": sum(verdict.answer is not None for verdict in verdicts) / len(verdicts),
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
