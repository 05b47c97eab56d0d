"""Stage 2, RL with verifiable rewards: GRPO on the judge's own judgments.

One step: draw pairs, sample a group of judgments for each, reward the verdicts, and update the
policy (`grpo.py`). One parser extracts verdicts in training and in evaluation, unlike the published
code.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from rmr1.alarms import Alarms
from rmr1.config import RlvrConfig
from rmr1.data import Pair, shuffled_epochs
from rmr1.engine.checkpoint import Progress, restore_trainer
from rmr1.engine.generator import Rollout
from rmr1.engine.memory_plan import peak_memory
from rmr1.engine.weights import load_model
from rmr1.grpo import Grpo
from rmr1.models import load_tokenizer, resolve_device, resolve_model
from rmr1.prompts import encode, render
from rmr1.rewards import correctness, overlong
from rmr1.run import Run, StopRequest, prepare_memory, sample_row, training_pairs
from rmr1.verdict import Verdict, parse_verdicts

_log = logging.getLogger(__name__)

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
        reference = None
        if config.grpo.beta > 0:
            reference = (
                load_model(start, dtype=config.dtype, device=device)
                if run.checkpoint
                else copy.deepcopy(policy)
            ).requires_grad_(False)
        prepare_memory(policy, config, reference=reference is not None)
        _check_positions(config, self.prompts, policy.config.max_position_embeddings)
        self.grpo = Grpo(
            policy,
            self.tokenizer,
            reference=reference,
            rollout=config.rollout,
            grpo=config.grpo,
            optim=config.optim,
            total_updates=config.steps * config.grpo.minibatches,
            max_micro_tokens=config.max_micro_tokens,
        )
        self.trainer, self.alarms = self.grpo.trainer, Alarms()
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
        self.stream = islice(
            shuffled_epochs(self.prompts, self.config.seed), self.progress.drawn, None
        )
        return self.progress

    def step(self, step: int) -> dict[str, Any]:
        """One RLVR step; returns its row of metrics."""
        began = time.perf_counter()
        drawn = list(islice(self.stream, self.config.rollout.prompts))
        pairs = [pair for pair, _ in drawn for _ in range(self.config.rollout.samples)]
        verdicts: list[Verdict] = []

        def reward(rollouts: list[Rollout]) -> Tensor:
            verdicts.extend(parse_verdicts([rollout.text for rollout in rollouts]))
            lengths = [len(rollout.token_ids) for rollout in rollouts]
            limit, buffer = self.config.rollout.max_new_tokens, self.config.grpo.overlong_buffer
            return correctness(verdicts, pairs) + overlong(lengths, limit, buffer)

        # Every step draws afresh, and a resumed step draws what it would have drawn.
        seed = self.config.seed * 1_000_003 + step
        done = self.grpo.step([ids for _, ids in drawn], reward, seed=seed)

        figures = done.figures()
        self.rewards.append(figures["reward"])
        self.progress = Progress(
            step,
            self.trainer.updates,
            self.progress.drawn + len(drawn),
            score=statistics.fmean(self.rewards),
        )
        row = {
            "stage": "rlvr",
            "step": step,
            **figures,
            "parse_rate": sum(one.answer is not None for one in verdicts) / len(verdicts),
            "dropped_prompts": self.dropped,
            "peak_memory_gb": peak_memory(self.trainer.model.lm_head_weight.device) / 1e9,
            "step_time": time.perf_counter() - began,
        }
        self.run.log(row)
        for warning in self.alarms.look(row):
            _log.warning("step %d: %s", step, warning)
        first = done.rollouts[0]
        self.run.sample(sample_row("rlvr", step, pairs[0], first.text, verdicts[0].answer))
        return row


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
