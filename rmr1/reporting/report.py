"""The report of a run: one self-contained HTML file that opens offline.

It is made from what the run directory holds (rmr1/reporting/input.py) and says what is missing, so
a run in progress has a report too.

Everything that models or data wrote is escaped by the template engine. The page forbids itself
any network access (Content-Security-Policy), and runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rmr1.data import write_whole
from rmr1.reporting.charts import Interval, Series, figure, interval_chart, line_chart
from rmr1.reporting.input import RunData, bounds_of, finite, read_run
from rmr1.reporting.judgments import mark_judgment, pick_samples
from rmr1.terminal import STAGES, duration, in_order

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Stages of training as the page names them; "rlvr" also marks samples drawn in training.
_TRAINING = {"sft": "Distillation", "rlvr": "RL"}


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: its title, its y axis, the metrics it draws (name of the curve -> metric)."""

    title: str
    unit: str
    metrics: Mapping[str, str]
    scale: float = 1.0
    from_zero: bool = True
    # An essential chart says "not recorded" where an optional one is left out.
    essential: bool = True


_RL_CHARTS = (
    Chart("Reward", "mean of a step", {"reward": "reward"}, from_zero=False),
    Chart("KL to the start", "nats per token (k3)", {"KL": "kl"}),
    Chart("Entropy", "nats per token", {"entropy": "entropy"}),
    Chart("Judgment length", "tokens, mean", {"length": "completions/mean_length"}, 1, False),
    Chart(
        "Clip fraction",
        "% of tokens",
        {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"},
        scale=100,
    ),
    Chart("Time per step", "seconds", {"time": "step_time"}),
    Chart("Parsed judgments", "% of judgments", {"parsed": "parse_rate"}, 100, False, False),
    Chart(
        "Groups of one reward", "% of groups", {"groups": "frac_reward_zero_std"}, 100, True, False
    ),
    Chart(
        "Cut at the limit", "% of judgments", {"cut": "completions/clipped_ratio"}, 100, True, False
    ),
    Chart("Gradient norm", "before clipping", {"norm": "grad_norm"}, 1, True, False),
    Chart("Sampler mismatch", "nats per token", {"mismatch": "logprob_mismatch"}, 1, True, False),
    Chart("Learning rate", "per update", {"rate": "learning_rate"}, 1, True, False),
)
_SFT_CHARTS = (
    Chart("Loss", "nats per trace token", {"loss": "loss"}),
    Chart("Time per step", "seconds", {"time": "step_time"}),
    Chart("Entropy", "nats per token", {"entropy": "entropy"}, 1, True, False),
    Chart("Gradient norm", "before clipping", {"norm": "grad_norm"}, 1, True, False),
    Chart("Learning rate", "per update", {"rate": "learning_rate"}, 1, True, False),
)


def write_report(run_dir: str | Path, *, command: str = "") -> Path:
    """Write `run_dir`/report.html and return its path; `command` is shown at the top.

    ValueError when there is no such directory. Missing or damaged inputs are noted in the report.
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give the directory of a run")
    page = render_report(read_run(directory), name=directory.resolve().name, command=command)
    path = directory / "report.html"
    # A browser that reloads meanwhile sees the old page or the new one, never half of one.
    write_whole(path, page)
    return path


def series_of(rows: Sequence[Mapping[str, Any]], name: str, metric: str, scale: float) -> Series:
    """The curve of a metric. A step that was logged twice (a resumed run) counts once, the last."""
    by_step = {float(row["step"]): finite(row.get(metric)) for row in rows}
    return Series(
        name,
        tuple(
            (step, None if value is None else value * scale)
            for step, value in sorted(by_step.items())
        ),
    )


def _charts(charts: Sequence[Chart], rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    drawn = []
    for chart in charts:
        series = [
            series_of(rows, name, metric, chart.scale) for name, metric in chart.metrics.items()
        ]
        if chart.essential or any(one.values for one in series):
            drawn.append(line_chart(chart.title, chart.unit, series, from_zero=chart.from_zero))
    return drawn


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{100 * bounds[0]:.1f} – {100 * bounds[1]:.1f}"


def _points(value: float) -> str:
    """A difference of two shares in percentage points, always with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _style(stage: str) -> str:
    """The class that colours a stage; the page knows no other names."""
    return f"s-{stage}" if stage in STAGES else "s-other"


def _gain(row: Mapping[str, Any], before: Mapping[str, Any] | None, key: str) -> tuple[str, str]:
    """The gain over the stage before, and its interval where the paired difference is known."""
    paired = row.get("gain")
    known = paired.get(key) if isinstance(paired, dict) else None
    if isinstance(known, list) and len(known) == 3 and None not in map(finite, known):
        value, low, high = (float(number) for number in known)
        return _points(value), f"{_points(low)} to {_points(high)}"
    old = finite(before.get(key)) if before else None
    new = finite(row.get(key))
    return ("", "") if old is None or new is None else (_points(new - old), "")


def _accuracy_rows(evaluations: Mapping[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The cells of the accuracy table as text."""
    rows: list[dict[str, str]] = []
    before: dict[str, Any] | None = None
    for stage, row in in_order(evaluations):
        gain, gain_ci = _gain(row, before, "accuracy")
        gain_parsed, gain_parsed_ci = _gain(row, before, "accuracy_parsed")
        rows.append(
            {
                "style": _style(stage),
                "name": STAGES.get(stage, stage),
                "accuracy": _percent(finite(row.get("accuracy"))),
                "ci": _interval(bounds_of(row.get("ci"))),
                "gain": gain,
                "gain_ci": gain_ci,
                "accuracy_parsed": _percent(finite(row.get("accuracy_parsed"))),
                "ci_parsed": _interval(bounds_of(row.get("ci_parsed"))),
                "gain_parsed": gain_parsed,
                "gain_parsed_ci": gain_parsed_ci,
                "parse_rate": _percent(finite(row.get("parse_rate"))),
                "swap": _percent(finite(row.get("swap_consistency"))),
                "tokens": figure(finite(row.get("mean_completion_length"))),
                "n": _count(finite(row.get("n"))),
            }
        )
        before = row
    return rows


def _intervals(evaluations: Mapping[str, dict[str, Any]]) -> list[Interval]:
    return [
        Interval(
            STAGES.get(stage, stage),
            _style(stage),
            finite(row.get("accuracy")),
            bounds_of(row.get("ci")),
            finite(row.get("accuracy_parsed")),
            bounds_of(row.get("ci_parsed")),
        )
        for stage, row in in_order(evaluations)
    ]


def _family_rows(evaluations: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per family: name, pairs, and a cell (percentages for the bar) per stage."""
    stages = in_order(evaluations)
    tables = [row["families"] if isinstance(row.get("families"), dict) else {} for _, row in stages]
    rows = []
    for name in sorted({name for table in tables for name in table}):
        cells, count = [], None
        for (stage, _), table in zip(stages, tables, strict=True):
            figures = table.get(name) if isinstance(table.get(name), dict) else {}
            value, bounds = finite(figures.get("accuracy")), bounds_of(figures.get("ci"))
            count = finite(figures.get("n")) or count
            cells.append(
                {
                    "style": _style(stage),
                    "value": None if value is None else round(100 * value, 1),
                    "text": _percent(value, 0),
                    "low": None if bounds is None else round(100 * bounds[0], 1),
                    "high": None if bounds is None else round(100 * bounds[1], 1),
                }
            )
        short = name.removeprefix("tasks/")
        rows.append({"name": short, "n": _count(count), "cells": cells})
    return rows


def _headline(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """The result in one sentence, empty while there are not two stages to compare."""
    known = [
        (STAGES.get(stage, stage), value, row)
        for stage, row in in_order(evaluations)
        if (value := finite(row.get("accuracy"))) is not None
    ]
    if len(known) < 2:
        return ""
    steps = " → ".join(f"{_percent(value)} ({name.lower() if name != 'RL' else name})"
                       for name, value, _ in known)  # fmt: skip
    count = finite(known[-1][2].get("n"))
    return f"Accuracy {steps}" + (f" on {count:,.0f} held-out pairs." if count else ".")


def _find(tree: Mapping[str, Any], key: str) -> str:
    """A setting by its name: the one nearest the top, the first of those; "" without one."""
    level: list[Mapping[str, Any]] = [tree]
    while level:
        for section in level:
            if key in section and not isinstance(section[key], dict):
                return str(section[key])
        level = [
            value for section in level for value in section.values() if isinstance(value, dict)
        ]
    return ""


def _facts(run: RunData, command: str) -> list[tuple[str, str]]:
    """What heads the page: model, seed, date, how far the training is, the command."""
    facts = [("Model", _find(run.config, "model")), ("Seed", _find(run.config, "seed"))]
    facts.append(("Updated", f"{run.updated:%Y-%m-%d %H:%M}" if run.updated else ""))
    for stage, title in _TRAINING.items():
        rows = run.metrics.get(stage, [])
        if rows:
            steps = {row["step"]: row for row in rows}
            tokens = sum(finite(row.get("num_tokens")) or 0 for row in steps.values())
            seconds = sum(finite(row.get("step_time")) or 0 for row in steps.values())
            detail = f"{len(steps):,} step{'s' if len(steps) > 1 else ''}"
            detail += f", {tokens:,.0f} tokens" if tokens else ""
            detail += f", {duration(seconds)} of training" if seconds else ""
            facts.append((title, detail))
    facts.append(("Command", command))
    return [(name, value) for name, value in facts if value]


def _sha256(text: str) -> str:
    """The hash by which the page's policy admits its own script and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render_report(run: RunData, *, name: str, command: str = "") -> str:
    """The page as text."""
    # Undefined names are errors: a misspelt one would leave a hole in the page unseen.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = _sha256
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    rows = _accuracy_rows(run.evaluations)
    judgments = [mark_judgment(sample) for sample in pick_samples(run.samples)]
    training = [
        (title, _charts(_SFT_CHARTS if stage == "sft" else _RL_CHARTS, run.metrics[stage]))
        for stage, title in reversed(_TRAINING.items())
        if stage in run.metrics
    ]
    return template.render(
        name=name,
        facts=_facts(run, command),
        headline=_headline(run.evaluations),
        notes=run.notes,
        accuracy=rows,
        interval_chart=interval_chart(_intervals(run.evaluations)) if rows else "",
        families=_family_rows(run.evaluations),
        training=training,
        judgments=judgments,
        stage_names={**STAGES, "rlvr": "RL, in training", "sft": "Distillation, in training"},
        config_text=run.config_text,
    )
