"""Stage 1, distillation: a model learns to write judgments from traces.

The loss is the negative log-likelihood of the trace tokens (and of the end-of-turn token after
them), over all trace tokens of the update. Prompts carry no loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from rmr1.config import SftConfig
from rmr1.data import Pair, shuffled_epochs
from rmr1.engine.checkpoint import Progress, restore_trainer
from rmr1.engine.memory_plan import peak_memory
from rmr1.engine.packing import Counts, Responses, pack
from rmr1.engine.trainer import Trainer
from rmr1.engine.weights import load_model, read_config
from rmr1.models import load_tokenizer, resolve_device, resolve_model
from rmr1.prompts import encode, render
from rmr1.run import Run, StopRequest, prepare_memory, training_pairs

# (steps done, steps in all, figures to show), after each step
OnStep = Callable[[int, int, dict[str, float]], None]
# (steps done by an earlier start, steps in all), once before the first step
OnStart = Callable[[int, int], None]


def nll(logprobs: Tensor, responses: Responses, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood: minus the sum over tokens, by the token count of the update."""
    return -logprobs.sum() / counts.tokens, {}


def distill(
    config: SftConfig, *, on_start: OnStart | None = None, on_step: OnStep | None = None
) -> Path:
    """Run or resume stage 1 and return the directory of the distilled model."""
    run = Run(config)
    start = resolve_model(config.model)
    tokenizer = load_tokenizer(start)
    positions = read_config(start).max_position_embeddings
    traces, dropped = tokenize_traces(config, training_pairs(config), tokenizer, positions)
    per_epoch = math.ceil(len(traces) / config.batch_size)
    steps = config.epochs * per_epoch
    device = resolve_device(config.device)
    model = load_model(run.checkpoint or start, dtype=config.dtype, device=device)
    prepare_memory(model, config, reference=False)
    trainer = Trainer(
        model, config.optim, total_updates=steps, max_micro_tokens=config.max_micro_tokens
    )
    progress = Progress(0, 0, 0)
    if run.checkpoint is not None:
        progress = restore_trainer(run.checkpoint, trainer)
    run.start(progress)
    stream = islice(shuffled_epochs(traces, config.seed), progress.drawn, None)
    if on_start is not None:
        on_start(progress.step, steps)
    with StopRequest() as stop:
        for step in range(progress.step + 1, steps + 1):
            began = time.perf_counter()
            rows = list(
                islice(stream, min(config.batch_size, _left(step, per_epoch, traces, config)))
            )
            batch = pack([row[0] for row in rows], [row[1] for row in rows])
            stats = trainer.update(batch, nll, per_token=True)
            progress = Progress(step, trainer.updates, progress.drawn + len(rows))
            row = {
                "stage": "sft",
                "step": step,
                "loss": stats.loss,
                "entropy": stats.entropy,
                "grad_norm": stats.grad_norm,
                "learning_rate": stats.learning_rate,
                "num_tokens": batch.response_tokens,
                "dropped_prompts": dropped,
                **{f"{name}_time": seconds for name, seconds in trainer.phases.take().items()},
                "peak_memory_gb": peak_memory(trainer.model.lm_head_weight.device) / 1e9,
                "step_time": time.perf_counter() - began,
            }
            run.log(row)
            if on_step is not None:
                on_step(step, steps, {"loss": stats.loss})
            if step % config.checkpoint_every == 0 or step == steps or stop.requested:
                saved = run.save(trainer, progress, tokenizer_from=start)
                # Only here: what asks to stop from now on finds the next step's save.
                if stop.requested:
                    raise KeyboardInterrupt(f"saved {saved}; run the same command again to go on")
    return run.checkpoints / f"step-{steps:06d}"


def _left(step: int, per_epoch: int, traces: list[Any], config: SftConfig) -> int:
    """Traces of the epoch that step `step` may still take: epochs do not run into each other."""
    return len(traces) - ((step - 1) % per_epoch) * config.batch_size


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
        prompt = encode(tokenizer, render(pair, config.prompt_style))
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
