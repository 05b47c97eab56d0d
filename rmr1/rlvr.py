"""Stage 2, RL with verifiable rewards: GRPO on the judge's own judgments.

One step: draw pairs, sample a group of judgments for each, reward the verdicts, and update the
policy (`grpo.py`). One parser extracts verdicts in training and in evaluation, unlike the published
code.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmr1.alarms import Alarms
from rmr1.config import RlvrConfig
from rmr1.data import shuffled_epochs
from rmr1.engine.cache_plan import free_memory
from rmr1.engine.checkpoint import Progress, restore_trainer
from rmr1.engine.flops import peak_flops, throughput
from rmr1.engine.generator import Rollout
from rmr1.engine.memory_plan import peak_memory
from rmr1.engine.model import CausalLM
from rmr1.engine.ranks import Ranks
from rmr1.engine.reference import Reference
from rmr1.engine.trainer import NotFinite, Trainer
from rmr1.engine.weights import load_model
from rmr1.group_sampling import Task
from rmr1.grpo import Grpo
from rmr1.memory import prepare_memory
from rmr1.models import load_tokenizer, resolve_model
from rmr1.prompts import encode
from rmr1.rewards import weighed
from rmr1.run import Run, refuse_another_model, sample_row, training_pairs
from rmr1.stages import OnStart, OnStep, run_steps, trained
from rmr1.verdict import Verdict, parse_verdicts

_log = logging.getLogger(__name__)


def rlvr(
    config: RlvrConfig, *, on_start: OnStart | None = None, on_step: OnStep | None = None
) -> Path:
    """Run or resume stage 2 and return the directory of the trained model; see `trained`."""
    with trained(config) as (run, ranks, device):
        start = resolve_model(config.model)
        stage = _Stage(config, run, ranks, start, device)
        return run_steps(run, stage, start, on_start=on_start, on_step=on_step)


class _Stage:
    """What lives through all steps of a run: policy, reference, generator, data."""

    def __init__(
        self, config: RlvrConfig, run: Run, ranks: Ranks, start: Path, device: torch.device
    ) -> None:
        self.config, self.run, self.ranks, self.steps = config, run, ranks, config.steps
        if config.rollout.top_p < 1:
            _log.warning(
                "rollout.top_p = %s draws from a part of the distribution, while the loss takes"
                " probabilities of the whole; 1 draws what it is told",
                config.rollout.top_p,
            )
        tokenizer = load_tokenizer(start)
        self.prompts, self.dropped = _fitting_prompts(config, tokenizer)
        if config.reward.swap_consistency and config.rollout.prompts % (2 * ranks.size):
            raise ValueError(
                "reward.swap_consistency keeps both orders of a pair on one rank: rollout.prompts"
                f" = {config.rollout.prompts} must be a multiple of twice the {ranks.size} ranks"
            )

        def load(device: torch.device, path: Path = start) -> CausalLM:
            return load_model(path, dtype=config.dtype, device=device)

        refuse_another_model(run.checkpoint, start)
        free = free_memory(device)
        policy = load(device, run.checkpoint or start)
        offloaded = config.grpo.offload_reference
        # r_ref is the model before RL. With beta 0 it is never loaded.
        reference = Reference(load, device, offload=offloaded) if config.grpo.beta > 0 else None
        advice = prepare_memory(policy, config, ranks, free)
        _check_positions(config, self.prompts, policy.config.max_position_embeddings)
        self.trainer = Trainer(
            policy,
            config.optim,
            total_updates=config.steps * config.grpo.minibatches,
            max_micro_tokens=config.max_micro_tokens,
            temperature=config.rollout.temperature,
            ranks=ranks,
            zero=config.zero,
            advice=advice,
        )
        self.grpo = Grpo(
            self.trainer,
            tokenizer,
            reference=reference,
            rollout=config.rollout,
            grpo=config.grpo,
            sampler=None if self.trainer.updater.whole else load(device, run.checkpoint or start),
        )
        peak = peak_flops(device, policy.lm_head_weight.dtype)
        self.peak_flops = None if peak is None else peak * ranks.size
        self.alarms = Alarms()
        # Of the last steps: the score of a checkpoint is their mean, since one step says little.
        self.rewards: deque[float] = deque(maxlen=max(1, config.checkpoint_every))
        self.progress = Progress(0, 0, 0)

    def resume(self) -> Progress:
        """Restore the newest checkpoint, if there is one, and place the data cursor."""
        if self.run.checkpoint is not None:
            self.progress = restore_trainer(self.run.checkpoint, self.trainer)
        self.run.start(self.progress)
        for row in self.run.rows():  # as if the run had never stopped
            self.rewards.append(row["reward"])
            self.alarms.look(row)
        orders = shuffled_epochs(self.prompts, self.config.seed)
        self.stream = islice(chain.from_iterable(orders), self.progress.drawn, None)
        return self.progress

    def step(self, step: int) -> dict[str, Any]:
        """One RLVR step; returns its row of metrics."""
        began = time.perf_counter()
        verdicts: list[Verdict] = []

        def reward(tasks: Sequence[Task], rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
            found = parse_verdicts([rollout.text for rollout in rollouts])
            verdicts.extend(found)
            parts = weighed(
                self.config.reward,
                found,
                [rollout.text for rollout in rollouts],
                [len(rollout.token_ids) for rollout in rollouts],
                [task.about for task in tasks],
                limit=self.config.rollout.max_new_tokens,
                buffer=self.config.grpo.overlong_buffer,
            )
            return {name: torch.tensor(part) for name, part in parts.items()}

        # Every step draws afresh, and a resumed step draws what it would have drawn.
        seed = self.config.seed * 1_000_003 + step
        try:
            done = self.grpo.step(self.stream, reward, seed=seed)
        except NotFinite as error:
            raise self.run.not_finite(error, step) from error

        figures = done.figures()
        self.rewards.append(figures["reward"])
        self.progress = Progress(
            step,
            self.trainer.updates,
            self.progress.drawn + len(done.drawn.samples.prompts),
            score=statistics.fmean(self.rewards),
            skipped=self.trainer.skipped,
        )
        row = {
            "stage": "rlvr",
            "step": step,
            **figures,
            **throughput(
                self.trainer.model.config,
                done.batch.groups,
                update_seconds=done.seconds["update"],
                drawn_tokens=sum(map(len, done.drawn.samples.token_ids)),
                rollout_seconds=done.seconds["rollout"],
                peak=self.peak_flops,
            ),
            "parse_rate": self._parse_rate(verdicts),
            "dropped_prompts": self.dropped,
            "peak_memory_gb": peak_memory(self.trainer.device) / 1e9,
            "step_time": time.perf_counter() - began,
        }
        self.run.log(row)
        for warning in self.alarms.look(row):
            _log.warning("step %d: %s", step, warning)
        if done.drawn.own:
            task, rollout = done.drawn.own[0]
            answer = verdicts[0].answer
            self.run.sample(sample_row("rlvr", step, task.about, rollout.text, answer))
        return row

    def _parse_rate(self, verdicts: Sequence[Verdict]) -> float:
        parsed = sum(one.answer is not None for one in verdicts)
        counts = self.ranks.reduce({"parsed": parsed, "all": len(verdicts)})
        return counts["parsed"] / counts["all"]


def _fitting_prompts(config: RlvrConfig, tokenizer: Any) -> tuple[list[tuple[Task, ...]], int]:
    """The prompt of each pair, in both orders where their agreement counts; how many were dropped.

    Those are pairs with a prompt that is too long.
    """
    pairs = training_pairs(config)
    both = config.reward.swap_consistency > 0
    tasks = [
        tuple(
            Task(encode(tokenizer, config.prompt.render(shown)), shown)
            for shown in ((pair, pair.swapped()) if both else (pair,))
        )
        for pair in pairs
    ]
    limit = config.max_prompt_tokens
    kept = [orders for orders in tasks if all(len(task.token_ids) <= limit for task in orders)]
    if not kept:
        raise ValueError(
            f"all {len(tasks)} prompts are longer than max_prompt_tokens"
            f" ({config.max_prompt_tokens}); raise it"
        )
    return kept, len(tasks) - len(kept)


def _check_positions(
    config: RlvrConfig, prompts: Sequence[tuple[Task, ...]], positions: int
) -> None:
    """Refuse before the first step what the generator would refuse in the middle of the run."""
    longest = max(len(task.token_ids) for orders in prompts for task in orders)
    if longest + config.rollout.max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt ({longest} tokens) with rollout.max_new_tokens"
            f" ({config.rollout.max_new_tokens}) is more than the model's {positions} positions;"
            f" lower max_prompt_tokens (now {config.max_prompt_tokens}) to drop long prompts, or"
            " lower rollout.max_new_tokens"
        )
