"""The main job end to end: evaluate, distil, evaluate, RL, evaluate, report.

Everything is written under runs/<name>/ and the command resumes where it was interrupted: the two
training runs keep checkpoints (`sft/`, `rlvr/`), an evaluation that is complete is not repeated.
A demo that was complete is moved aside before it starts over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from rmr1.config import (
    DataConfig,
    GrpoConfig,
    RlvrConfig,
    RolloutConfig,
    Section,
    SftConfig,
    refuse_more_minibatches,
    to_toml,
)
from rmr1.data import Pair, read_rows
from rmr1.distill import distill
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.optimizer import OptimConfig
from rmr1.engine.weights import load_model
from rmr1.evaluate import Evaluation, compare, summarise
from rmr1.judge import BOTH_PLACEMENTS, Judgment, judge_pairs
from rmr1.models import load_tokenizer, resolve_model
from rmr1.prompts import Style, prompt_hash
from rmr1.report import write_report
from rmr1.rlvr import rlvr
from rmr1.run import refuse_changes, sample_row
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import Phase

STAGES = ("base", "distilled", "rl")
# (title, total, unit) -> a phase on the screen
ShowPhase = Callable[[str, int, str], AbstractContextManager[Phase]]


class DistillPlan(Section):
    """How much the demo distils."""

    traces: int = Field(432, ge=1, description="traces of embedded tasks to learn from")
    batch_size: int = Field(16, ge=1, description="traces in one update")
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(5, ge=0, description="updates over which the rate rises")


class RlPlan(Section):
    """How long the demo trains by RL."""

    steps: int = Field(18, ge=1, description="rollout steps")
    learning_rate: float = Field(1e-4, gt=0, description="constant learning rate")
    warmup_steps: int = Field(2, ge=0, description="updates over which the rate rises")
    rollout: RolloutConfig = RolloutConfig(prompts=64, samples=8, max_new_tokens=192)
    grpo: GrpoConfig = GrpoConfig(minibatches=4)

    @model_validator(mode="after")
    def _minibatches_fit(self) -> RlPlan:
        # Said before the demo starts, not when it comes to its last stage.
        refuse_more_minibatches(self.rollout, self.grpo)
        return self


class DemoConfig(Section):
    """`rmr1 demo`: the pocket model by default, any model by a file such as demo-smollm2.toml."""

    name: str = Field("demo", min_length=1, description="the demo writes runs/<name>/")
    runs_dir: str = Field("runs", description="the folder of all runs")
    model: str = Field("pocket", description="Hugging Face directory, or `pocket`, `smollm2`")
    seed: int = Field(0, ge=0, description="of the tasks, the order and every draw")
    prompt_style: Style = Field("compact", description="the judge's prompt")
    heldout: int = Field(510, ge=1, description="held-out pairs to evaluate on, in both placements")
    max_prompt_tokens: int = Field(768, ge=1, description="longer prompts are dropped and counted")
    max_new_tokens: int = Field(192, ge=1, description="cap of a judgment in evaluations")
    eval_temperature: float = Field(
        1.0, ge=0, description="of evaluated judgments; 1: sampled as RL samples them, 0: greedy"
    )
    max_micro_tokens: int = Field(8192, ge=1, description="tokens in one training forward")
    checkpoint_every: int = Field(10, ge=1, description="steps between two checkpoints")
    distill: DistillPlan = DistillPlan()
    rl: RlPlan = RlPlan()

    @property
    def directory(self) -> Path:
        """The demo's folder."""
        return Path(self.runs_dir) / self.name


def run_demo(config: DemoConfig, show: ShowPhase) -> tuple[dict[str, Any], Path]:
    """Run or resume the demo. Returns the evaluations by stage and the report's path."""
    base = resolve_model(config.model)
    directory = config.directory
    _set_finished_aside(directory)
    if (directory / "judgments-base.jsonl").is_file():
        refuse_changes(directory, config)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    pairs = draw_pairs(config.heldout, seed=config.seed, split="heldout")

    first = _evaluate(config, "base", base, pairs, show)
    with show("Distil", 1, "steps") as bar:
        distilled = distill(sft_config(config), on_step=_follow(bar))
    second = _evaluate(config, "distilled", distilled, pairs, show)
    with show("RL", config.rl.steps, "steps") as bar:
        trained = rlvr(rlvr_config(config, distilled), on_step=_follow(bar))
    third = _evaluate(config, "rl", trained, pairs, show)

    rows = _with_gains({"base": first, "distilled": second, "rl": third})
    _gather(config, pairs, {"base": first, "distilled": second, "rl": third})
    _write_json(directory / "evaluations.json", rows)
    return rows, write_report(directory, command=f"rmr1 demo --name {config.name}")


def sft_config(config: DemoConfig) -> SftConfig:
    """Stage 1 of the demo as a run of its own."""
    plan = config.distill
    return SftConfig(
        name="sft",
        runs_dir=str(config.directory),
        model=config.model,
        seed=config.seed,
        prompt_style=config.prompt_style,
        max_prompt_tokens=config.max_prompt_tokens,
        max_micro_tokens=config.max_micro_tokens,
        checkpoint_every=config.checkpoint_every,
        data=DataConfig(tasks=plan.traces, seed=config.seed),
        batch_size=plan.batch_size,
        optim=OptimConfig(
            learning_rate=plan.learning_rate, schedule="linear", warmup_steps=plan.warmup_steps
        ),
    )


def rlvr_config(config: DemoConfig, distilled: Path) -> RlvrConfig:
    """Stage 2 of the demo; its pairs are drawn with another seed than the traces."""
    plan = config.rl
    return RlvrConfig(
        name="rlvr",
        runs_dir=str(config.directory),
        model=str(distilled),
        seed=config.seed,
        prompt_style=config.prompt_style,
        max_prompt_tokens=config.max_prompt_tokens,
        max_micro_tokens=config.max_micro_tokens,
        checkpoint_every=config.checkpoint_every,
        data=DataConfig(tasks=plan.steps * plan.rollout.prompts, seed=config.seed + 1_000_000),
        steps=plan.steps,
        rollout=plan.rollout,
        grpo=plan.grpo,
        optim=OptimConfig(learning_rate=plan.learning_rate, warmup_steps=plan.warmup_steps),
    )


def _follow(bar: Phase) -> Callable[[int, int, dict[str, float]], None]:
    """Move a bar with a stage's steps and show the figures that matter."""

    def on_step(step: int, total: int, row: dict[str, float]) -> None:
        wanted = ("reward", "kl") if "reward" in row else ("loss",)
        bar.reach(step, total)
        bar.show({name: row[name] for name in wanted if name in row})

    return on_step


def _evaluate(
    config: DemoConfig, stage: str, model_dir: Path, pairs: list[Pair], show: ShowPhase
) -> Evaluation:
    """Judge the held-out pairs once in both placements, or read what an earlier start did."""
    path = config.directory / f"judgments-{stage}.jsonl"
    sampling = SamplingParams(
        temperature=config.eval_temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    if path.is_file():
        judgments = [Judgment(**row) for _, row in read_rows(path)]
    else:
        tokenizer = load_tokenizer(model_dir)
        generator = Generator(load_model(model_dir), tokenizer)
        with show(f"Evaluate {stage}", 2 * len(pairs), "judgments") as bar:
            judgments = judge_pairs(
                generator,
                tokenizer,
                pairs,
                style=config.prompt_style,
                sampling=sampling,
                max_prompt_tokens=config.max_prompt_tokens,
                placements=BOTH_PLACEMENTS,
                progress=bar.reach,
            )
        _write_lines(path, [asdict(one) for one in judgments])
    return summarise(judgments, prompt_hash=prompt_hash(config.prompt_style), seed=config.seed)


def _with_gains(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """The figures of each stage, with the paired difference from the stage before."""
    rows: dict[str, Any] = {}
    before: Evaluation | None = None
    for stage, evaluation in evaluations.items():
        row = evaluation.to_json()
        if before is not None:
            gains = zip(("accuracy", "accuracy_parsed"), compare(before, evaluation), strict=True)
            row["gain"] = {
                name: [gain.value, gain.interval.low, gain.interval.high]
                for name, gain in gains
                if gain is not None
            }
        rows[stage] = row
        before = evaluation
    return rows


def _gather(config: DemoConfig, pairs: list[Pair], evaluations: dict[str, Evaluation]) -> None:
    """Join the curves of both runs and pick judgments of each stage for the report."""
    directory = config.directory
    metrics = [
        row
        for stage in ("sft", "rlvr")
        for _, row in read_rows(directory / stage / "metrics.jsonl")
    ]
    _write_lines(directory / "metrics.jsonl", metrics)
    by_id = {pair.id: pair for pair in pairs}
    samples = []
    for stage, evaluation in evaluations.items():
        own_order = [one for one in evaluation.judgments if one.placement == "ab"]
        right = [one for one in own_order if one.correct]
        wrong = [one for one in own_order if not one.correct]
        for one in [*right[:: max(1, len(right) // 4)][:4], *wrong[:: max(1, len(wrong) // 4)][:4]]:
            samples.append(sample_row(stage, 0, by_id[one.id], one.text, one.verdict))
    _write_lines(directory / "samples.jsonl", samples)


def _set_finished_aside(directory: Path) -> None:
    """Move a complete demo to the first free <name>-N, so that nothing is lost by another start."""
    if not (directory / "evaluations.json").is_file():
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    directory.rename(aside)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a whole file or none: a file that is there is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
