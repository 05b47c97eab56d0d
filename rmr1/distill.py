"""Stage 1, distillation: a model learns to write judgments from traces.

The loss is the negative log-likelihood of the trace tokens (and of the end-of-turn token after
them), over all trace tokens of the update. Prompts carry no loss.
"""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmr1.config import SftConfig
from rmr1.data import Pair, shuffled_epochs
from rmr1.engine.cache_plan import free_memory
from rmr1.engine.checkpoint import Progress, restore_trainer
from rmr1.engine.flops import peak_flops, throughput
from rmr1.engine.memory_plan import peak_memory
from rmr1.engine.packing import Counts, Responses, pack
from rmr1.engine.ranks import Ranks
from rmr1.engine.trainer import NotFinite, Trainer
from rmr1.engine.weights import load_model, read_config
from rmr1.memory import prepare_memory
from rmr1.models import load_tokenizer, resolve_model
from rmr1.prompts import encode
from rmr1.run import Run, refuse_another_model, training_pairs
from rmr1.stages import OnStart, OnStep, run_steps, trained


def nll(logprobs: Tensor, responses: Responses, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood: minus the sum over tokens, by the token count of the update."""
    return -logprobs.sum() / counts.tokens, {}


def distill(
    config: SftConfig, *, on_start: OnStart | None = None, on_step: OnStep | None = None
) -> Path:
    """Run or resume stage 1 and return the directory of the distilled model; see `trained`."""
    with trained(config) as (run, ranks, device):
        start = resolve_model(config.model)
        stage = _Stage(config, run, ranks, start, device)
        return run_steps(run, stage, start, on_start=on_start, on_step=on_step)


class _Stage:
    """What lives through all steps of a run: the model and the traces."""

    def __init__(
        self, config: SftConfig, run: Run, ranks: Ranks, start: Path, device: torch.device
    ) -> None:
        self.config, self.run = config, run
        positions = read_config(start).max_position_embeddings
        self.traces, self.dropped = tokenize_traces(
            config, training_pairs(config), load_tokenizer(start), positions
        )
        self.per_epoch = math.ceil(len(self.traces) / config.batch_size)
        self.steps = config.epochs * self.per_epoch
        refuse_another_model(run.checkpoint, start)
        free = free_memory(device)
        model = load_model(run.checkpoint or start, dtype=config.dtype, device=device)
        advice = prepare_memory(model, config, ranks, free)
        self.trainer = Trainer(
            model,
            config.optim,
            total_updates=self.steps,
            max_micro_tokens=config.max_micro_tokens,
            ranks=ranks,
            zero=config.zero,
            advice=advice,
        )
        peak = peak_flops(device, model.lm_head_weight.dtype)
        self.peak_flops = None if peak is None else peak * ranks.size
        self.progress = Progress(0, 0, 0)

    def resume(self) -> Progress:
        """Restore the newest checkpoint, if there is one, and place the data cursor."""
        if self.run.checkpoint is not None:
            self.progress = restore_trainer(self.run.checkpoint, self.trainer)
        self.run.start(self.progress)
        self.stream = islice(
            shuffled_epochs(self.traces, self.config.seed), self.progress.drawn, None
        )
        return self.progress

    def step(self, step: int) -> dict[str, Any]:
        """One update; returns its row of metrics."""
        began = time.perf_counter()
        rows = list(islice(self.stream, min(self.config.batch_size, self._left(step))))
        batch = pack([row[0] for row in rows], [row[1] for row in rows])
        trainer = self.trainer
        try:
            stats = trainer.update(batch, nll, per_token=True)
        except NotFinite as error:
            raise self.run.not_finite(error, step) from error
        self.progress = Progress(
            step, trainer.updates, self.progress.drawn + len(rows), skipped=trainer.skipped
        )
        seconds = trainer.phases.take()
        row = {
            "stage": "sft",
            "step": step,
            "loss": stats.loss,
            "entropy": stats.entropy,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "skipped_updates": int(not math.isfinite(stats.grad_norm)),
            "num_tokens": batch.response_tokens,
            "dropped_prompts": self.dropped,
            **throughput(
                trainer.model.config,
                batch.groups,
                update_seconds=sum(seconds.values()),
                peak=self.peak_flops,
            ),
            **{f"{name}_time": spent for name, spent in seconds.items()},
            "peak_memory_gb": peak_memory(trainer.device) / 1e9,
            "step_time": time.perf_counter() - began,
        }
        self.run.log(row)
        return row

    def _left(self, step: int) -> int:
        """Traces of the epoch that a step may still take: epochs do not run into each other."""
        return len(self.traces) - ((step - 1) % self.per_epoch) * self.config.batch_size


def tokenize_traces(
    config: SftConfig, pairs: list[Pair], tokenizer: Any, positions: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """(prompt ids, trace ids) of every pair that has a trace and fits; how many did not fit.

    Together they must fit both `config.max_length` and the model's `positions`: further on RoPE
    would turn by angles that the model has never seen, without a word.
    """
    rows, dropped = [], 0
    longest = min(config.max_length, positions)
    for pair in pairs:
        if not pair.trace:
            continue
        prompt = encode(tokenizer, config.prompt.render(pair))
        trace = tokenizer(pair.trace, add_special_tokens=False)["input_ids"]
        trace.append(tokenizer.eos_token_id)
        if len(prompt) > config.max_prompt_tokens or len(prompt) + len(trace) > longest:
            dropped += 1
        else:
            rows.append((prompt, trace))
    if not rows:
        raise ValueError(
            f"no trace to learn from: of {len(pairs)} pairs, {dropped} were over the limits"
            f" (max_prompt_tokens {config.max_prompt_tokens}, max_length {config.max_length}, the"
            f" model's {positions} positions) and the rest have no trace"
        )
    return rows, dropped
