"""The main job end to end: evaluate, distil, evaluate, RL, evaluate, report.

Everything is written under runs/<name>/ and the command resumes where it was interrupted: the two
training runs keep checkpoints (`sft/`, `rlvr/`), an evaluation that is complete is not repeated.
A demo that was complete is moved aside before it starts over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rmr1.answers import LocalModel
from rmr1.config import to_toml
from rmr1.data import Pair, read_rows, write_whole
from rmr1.demo_config import DemoConfig, rlvr_config, sft_config
from rmr1.distill import distill
from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.weights import load_model
from rmr1.evaluate import Evaluation, compare, summarise
from rmr1.judge import BOTH_PLACEMENTS, Judgment, judge_pairs
from rmr1.models import load_tokenizer, resolve_model
from rmr1.prompts import load_prompt
from rmr1.reporting.report import write_report
from rmr1.rlvr import rlvr
from rmr1.run import refuse_changes, sample_row
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import Phase

STAGES = ("base", "distilled", "rl")
# (title, total, unit) -> a phase on the screen
ShowPhase = Callable[[str, int, str], AbstractContextManager[Phase]]


def run_demo(config: DemoConfig, show: ShowPhase) -> tuple[dict[str, Any], Path]:
    """Run or resume the demo. Returns the evaluations by stage and the report's path."""
    base = resolve_model(config.model)
    directory = config.directory
    _set_finished_aside(directory)
    if (directory / "judgments-base.jsonl").is_file():
        refuse_changes(directory, config)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "config.toml", to_toml(config))
    pairs = draw_pairs(config.heldout, seed=config.seed, split="heldout")

    first = evaluate_stage(config, "base", base, pairs, show)
    with show("Distil", 1, "steps") as bar:
        distilled = distill(sft_config(config), on_start=bar.begin, on_step=_follow(bar))
    second = evaluate_stage(config, "distilled", distilled, pairs, show)
    with show("RL", config.rl.steps, "steps") as bar:
        trained = rlvr(rlvr_config(config, distilled), on_start=bar.begin, on_step=_follow(bar))
    third = evaluate_stage(config, "rl", trained, pairs, show)

    rows = _with_gains({"base": first, "distilled": second, "rl": third})
    _gather(config, pairs, {"base": first, "distilled": second, "rl": third})
    # The report is the last to be written and so the mark of a complete demo; one that
    # `rmr1 report` made on the way is not.
    (directory / "report.html").unlink(missing_ok=True)
    table = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    write_whole(directory / "evaluations.json", table)
    return rows, write_report(directory, command=f"rmr1 demo --name {config.name}")


def _follow(bar: Phase) -> Callable[[int, int, dict[str, float]], None]:
    """Move a bar with a stage's steps and show the figures that matter."""

    def on_step(step: int, total: int, row: dict[str, float]) -> None:
        wanted = ("reward", "kl") if "reward" in row else ("loss",)
        bar.reach(step, total)
        bar.show({name: row[name] for name in wanted if name in row})

    return on_step


def evaluate_stage(
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
        model = LocalModel(generator, tokenizer, config.max_prompt_tokens)
        with show(f"Evaluate {stage}", 2 * len(pairs), "judgments") as bar:
            judgments = judge_pairs(
                model,
                pairs,
                prompt=load_prompt(config.prompt_style),
                sampling=sampling,
                placements=BOTH_PLACEMENTS,
                progress=bar.count,
            )
        _write_lines(path, [asdict(one) for one in judgments])
    return summarise(judgments, prompt_hash=load_prompt(config.prompt_style).hash, seed=config.seed)


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
    if not all((directory / name).is_file() for name in ("evaluations.json", "report.html")):
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    directory.rename(aside)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    # A file that is there is complete: it is not made again.
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
