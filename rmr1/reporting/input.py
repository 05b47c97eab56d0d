"""What a run directory holds, read for the report as far as it is there.

- `metrics.jsonl`: rows of the stages "sft" and "rlvr", one for each step;
- `evaluations.json`: {"base" | "distilled" | "rl": figures of `Evaluation.to_json()`}; a stage
  may add "gain": {"accuracy": [value, low, high], "accuracy_parsed": [...]}, the paired difference
  from the stage before it;
- `samples.jsonl`: {"stage", "pair", "text", "verdict", "label"};
- `config.toml`: the resolved configuration.

A report is also wanted of a run in progress or gone wrong: nothing here fails over a missing or
damaged file, it becomes a note.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rmr1.data import pair_from_row
from rmr1.reporting.judgments import Sample

INPUTS = ("metrics.jsonl", "evaluations.json", "samples.jsonl", "config.toml")
TRAINING_STAGES = ("sft", "rlvr")


@dataclass(slots=True)
class RunData:
    """What was found in a run directory; `notes` says what was not, or could not be read."""

    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    updated: datetime | None = None


def read_run(directory: Path) -> RunData:
    """Read the inputs of a report as far as they are there."""
    run = RunData()
    present = [path for name in INPUTS for path in _places(directory, name) if path.is_file()]
    if present:
        run.updated = datetime.fromtimestamp(max(path.stat().st_mtime for path in present))
    for row in _read_rows(directory, "metrics.jsonl", "no curves", run.notes):
        if row.get("stage") in TRAINING_STAGES and finite(row.get("step")) is not None:
            run.metrics.setdefault(row["stage"], []).append(row)
    for row in _read_rows(directory, "samples.jsonl", "no judgments", run.notes):
        try:
            run.samples.append(_sample(row))
        except ValueError as error:
            run.notes.append(f"samples.jsonl: a judgment is left out: {error}.")
    text = _read_text(directory / "evaluations.json", "no accuracy table", run.notes)
    try:
        found = json.loads(text) if text.strip() else {}
        if not isinstance(found, dict):
            raise ValueError("it must hold an object")
        run.evaluations = {name: row for name, row in found.items() if isinstance(row, dict)}
    except ValueError as error:
        run.notes.append(f"evaluations.json cannot be read ({error}): no accuracy table.")
    run.config_text = _read_text(directory / "config.toml", "no configuration", run.notes)
    try:
        run.config = tomllib.loads(run.config_text)
    except tomllib.TOMLDecodeError as error:
        run.notes.append(f"config.toml is no valid TOML ({error}); it is shown as it is.")
    return run


def _places(directory: Path, name: str) -> list[Path]:
    """Where rows may lie: in the directory, or, in a demo under way, in those of its stages."""
    own = directory / name
    parts = [directory / stage / name for stage in TRAINING_STAGES]
    found = [path for path in parts if path.is_file()]
    return found if found and not own.is_file() else [own]


def _read_text(path: Path, without: str, notes: list[str]) -> str:
    """The text of a file; a note when the file is missing."""
    if not path.is_file():
        notes.append(f"{path.name} is not there yet: {without}.")
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _read_rows(directory: Path, name: str, without: str, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a JSONL file. A run in progress may be writing the last one: it is skipped."""
    rows = []
    damaged = 0
    for path in _places(directory, name):
        lines = [line for line in _read_text(path, without, notes).split("\n") if line.strip()]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                damaged += number < len(lines)
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                damaged += 1
    if damaged:
        lines_are = "1 damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
        notes.append(f"{name}: {lines_are} left out.")
    return rows


def _sample(row: Mapping[str, Any]) -> Sample:
    """A row of samples.jsonl; ValueError says what is wrong with it."""
    pair = pair_from_row(_encodable(row.get("pair")))
    label, text = row.get("label", pair.label), row.get("text")
    if label not in ("A", "B") or not isinstance(text, str):
        raise ValueError('it needs "text", and a "label" that is "A" or "B"')
    if label != pair.label:
        # The judge saw the answers exchanged; so does the reader, or "A" would mean B.
        pair = pair.swapped()
    verdict = row.get("verdict")
    return Sample(
        stage=str(row.get("stage", "rl")),
        pair=pair,
        text=_encodable(text),
        verdict=verdict if verdict in ("A", "B", "tie") else None,
        label=label,
    )


def _encodable(value: Any) -> Any:
    """A JSON value without lone surrogates (an escape cut in two), which UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {key: _encodable(item) for key, item in value.items()}
    return value


def finite(value: Any) -> float | None:
    """A finite number as a float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def bounds_of(value: Any) -> tuple[float, float] | None:
    """An interval [low, high] of finite numbers, None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)
