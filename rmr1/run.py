"""A training run on disk: resolved configuration, metrics, samples, checkpoints.

Starting a run whose folder already holds a checkpoint goes on from it; with another configuration
it is refused, key by key, but for what may change. Ctrl-C ends a run after the step in progress,
saved.
"""

from __future__ import annotations

import json
import logging
import math
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rmr1.config import RunConfig, Section, dotted, to_toml
from rmr1.data import Pair, read_pairs, write_whole
from rmr1.engine.checkpoint import (
    Progress,
    list_checkpoints,
    save_checkpoint,
    set_aside_damaged,
    step_of,
)
from rmr1.engine.ranks import Ranks
from rmr1.engine.tensor_files import write_tensors
from rmr1.engine.trainer import NotFinite, Trainer
from rmr1.engine.weights import read_config
from rmr1.tasks.catalog import draw_pairs
from rmr1.trackers import Trackers, require

_log = logging.getLogger(__name__)

# What a resumed run may change: it says how the machine is used, not what comes out.
FREE_TO_CHANGE = (
    "device",
    "max_micro_tokens",
    "recompute",
    "recompute_layers",
    "checkpoint_every",
    "keep_checkpoints",
    "log",
    "profile",
    "zero.stage",
    "zero.offload_optimizer",
    "grpo.offload_reference",
    "rollout.kv_memory_gb",
    "rollout.release",
    "rl.rollout.kv_memory_gb",  # as the demo names it
    "rl.rollout.release",
)


class Run:
    """The folder of one run. Of several ranks the first one writes; the others only read.

    `checkpoint` is where to resume from: the newest whole checkpoint, or None for a new run.
    """

    def __init__(self, config: RunConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.directory = config.directory
        self.checkpoints = self.directory / "checkpoints"
        if self.ranks.first:
            require(config.log)
        self.trackers = Trackers([], self.directory, {}, step=0, rows=[])
        found = self._look() if self.ranks.first else None
        step = self.ranks.from_first(-1 if found is None else step_of(found))
        self.checkpoint = None if step < 0 else self.checkpoints / f"step-{step:06d}"

    def _look(self) -> Path | None:
        """Where to go on from; the configuration is written beside it."""
        if list_checkpoints(self.checkpoints):
            refuse_changes(self.directory, self.config)
        faults = set_aside_damaged(self.checkpoints)
        checkpoint = max(list_checkpoints(self.checkpoints), key=step_of, default=None)
        for fault in faults:
            _log.warning("%s; it is set aside, going on from %s", fault, checkpoint)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.directory / "config.toml", to_toml(self.config))
        return checkpoint

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.trackers.__exit__(kind, error, trace)

    def start(self, progress: Progress) -> None:
        """Cut the logs back to `progress`, so that a resumed run does not write a step twice."""
        if self.ranks.first:
            self._cut_back(progress)
        self.ranks.wait()  # the others read these files too

    def _cut_back(self, progress: Progress) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.directory / name
            if path.is_file():
                write_whole(path, _lines_until(path, progress.step))
        self.trackers = Trackers(
            self.config.log,
            self.directory,
            self.config.model_dump(mode="json"),
            step=progress.step,
            rows=self.rows(),
        )

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, of the steps that are done."""
        path = self.directory / "metrics.jsonl"
        if not path.is_file():
            return []
        rows = [json.loads(line) for line in path.open(encoding="utf-8")]
        return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl, and show it elsewhere."""
        # JSON has no NaN: what an update that was skipped says of itself is null there.
        lost = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        self._append("metrics.jsonl", row | lost)
        self.trackers.log(row)

    def sample(self, row: dict[str, Any]) -> None:
        """Append one row to samples.jsonl."""
        self._append("samples.jsonl", row)

    def not_finite(self, error: NotFinite, step: int) -> ValueError:
        """What to tell of updates that came to nothing; the last one's batch is kept in a file."""
        path = self.directory / f"not-finite-{step:06d}.safetensors"
        if self.ranks.first:
            write_tensors(error.batch.tensors().items(), lambda _: path)
        return ValueError(
            f"step {step}: {error} and changed no weight; the last one's batch is in {path}; start"
            " a run of another --name from the last checkpoint (--model) with a lower"
            " --optim.learning_rate"
        )

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        with (self.directory / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save(self, trainer: Trainer, progress: Progress, *, tokenizer_from: Path) -> Path:
        """Write a checkpoint of the run."""
        return save_checkpoint(
            self.checkpoints,
            trainer,
            progress,
            tokenizer_from=tokenizer_from,
            keep=self.config.keep_checkpoints,
        )


def refuse_changes(directory: Path, config: Section) -> None:
    """ValueError when the run in `directory` was begun with another configuration."""
    before = _begun_with(directory / "config.toml")
    now = dotted(tomllib.loads(to_toml(config)))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key not in FREE_TO_CHANGE and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{directory} holds a run with another configuration ({'; '.join(changed)});"
            " put the old values back to resume it, or choose another --name"
        )


def refuse_another_model(checkpoint: Path | None, start: Path) -> None:
    """ValueError when a checkpoint is not of the model that the run starts from."""
    if checkpoint is not None and read_config(checkpoint) != read_config(start):
        raise ValueError(
            f"{checkpoint} is of another model than {start}, from which the run starts; put the"
            " run's own checkpoint back, or choose another --name"
        )


def _begun_with(path: Path) -> dict[str, Any]:
    """The settings of a run that is there. Without them, others could resume it unnoticed."""
    advice = "put it back to resume the run, or choose another --name"
    try:
        settings = dotted(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        settings = {}
    except (RecursionError, ValueError) as error:  # TOMLDecodeError, UnicodeDecodeError
        raise ValueError(f"{path}: no valid TOML ({error}); {advice}") from None
    if not settings:
        raise ValueError(f"{path}: missing or empty, though there is a run beside it; {advice}")
    return settings


def _lines_until(path: Path, last: int) -> str:
    """The lines of a log up to step `last`."""
    # A torn last line belongs to a step that was not saved either. Only a line feed ends a line:
    # texts of a model may hold other separators.
    *lines, _torn = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            if json.loads(text)["step"] <= last:
                kept.append(text + "\n")
        except (KeyError, RecursionError, TypeError, ValueError):
            raise ValueError(
                f'{path}, line {number}: no row of a run, which is a JSON object with a "step";'
                " delete the line to resume the run"
            ) from None
    return "".join(kept)


def training_pairs(config: RunConfig) -> list[Pair]:
    """The pairs a run trains on: its JSONL file, or embedded tasks of the training split."""
    if config.data.path:
        return read_pairs(config.data.path)
    return draw_pairs(config.data.tasks, seed=config.data.seed, split="train")


def sample_row(stage: str, step: int, pair: Pair, text: str, verdict: str | None) -> dict[str, Any]:
    """One judgment as samples.jsonl and the report hold it."""
    return {
        "stage": stage,
        "step": step,
        "pair": asdict(pair),
        "text": text,
        "verdict": verdict,
        "label": pair.label,
    }
