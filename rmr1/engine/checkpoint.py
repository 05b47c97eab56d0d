"""Checkpoints: a Hugging Face directory that also holds the trainer's state.

    checkpoints/step-000010/
        config.json, model.safetensors, tokenizer files     what transformers and vLLM load
        optimizer.safetensors, optimizer-1.safetensors ...  AdamW's moments, fp32 copies of weights
        trainer.json                                        step, updates, data cursor, score
        checksums.json                                      BLAKE2b of every file above

All tensors are whole, whatever number of ranks and stage of ZeRO they were gathered from, so any
other number goes on from them. A checkpoint is written beside its final name, flushed to the disk
and then renamed: whatever happens during a save, the checkpoints that were complete stay complete.
Names that start with a dot are leftovers of a save or a deletion that was cut off; the next save
removes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor

from rmr1.engine.tensor_files import read_tensors, write_tensors
from rmr1.engine.trainer import Trainer
from rmr1.engine.weights import DTYPES, read_config, save_weights

_CHECKSUMS = "checksums.json"
_OPTIMIZER = "optimizer.safetensors"
_NEEDED = {"config.json", _OPTIMIZER, "trainer.json"}
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come. `step` steps are done; `drawn` training pairs were consumed.

    `score` says how good the model is (the larger the better), if that is known; the last `skipped`
    updates in a row changed nothing, as their gradient was not finite.
    """

    step: int
    updates: int
    drawn: int
    score: float | None = None
    skipped: int = 0


def save_checkpoint(
    directory: Path, trainer: Trainer, progress: Progress, *, tokenizer_from: Path, keep: int = 2
) -> Path:
    """Write `directory`/step-NNNNNN and delete all but the newest `keep` checkpoints and the best.

    Every rank has to call it; the first one writes. OSError if the disk is full; the checkpoints
    that were there stay.
    """
    updater = trainer.updater
    if not trainer.ranks.first:
        for _ in chain(updater.weights(), updater.state()):  # the others help to gather
            pass
        trainer.ranks.wait()
        return directory / f"step-{progress.step:06d}"
    final = directory / f"step-{progress.step:06d}"
    aside = directory / f".{final.name}.partial"
    for leftover in directory.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_weights(
            updater.weights(), trainer.model.config, aside, extra_files_from=tokenizer_from
        )
        write_tensors(updater.state(), lambda number: aside / _optimizer_file(number))
        (aside / "trainer.json").write_text(json.dumps(asdict(progress)) + "\n")
        sums = {path.name: _checksum(path) for path in sorted(aside.iterdir())}
        (aside / _CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
        for path in [*aside.iterdir(), aside]:
            _flush(path)
        if final.exists():
            _remove(final)
        aside.rename(final)
        _flush(directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    best = best_checkpoint(directory)
    for old in list_checkpoints(directory)[:-keep]:
        if old not in (best, final):  # damaged ones of later steps may be there still
            _remove(old)
    trainer.ranks.wait()
    return final


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, whose name goes first: half of one must not look like a whole one."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(aside)
    shutil.rmtree(aside)


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def _optimizer_file(number: int) -> str:
    return f"optimizer-{number}.safetensors" if number else _OPTIMIZER


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was made after, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def best_checkpoint(directory: Path) -> Path | None:
    """The one with the highest score, the newest of several; None where no score is known."""
    best, highest = None, -math.inf
    for path in list_checkpoints(directory):
        try:
            score = read_progress(path).score
        except ValueError:  # damaged; `newest_whole` says so where it matters
            continue
        if score is not None and score >= highest:
            best, highest = path, score
    return best


def set_aside_damaged(directory: Path) -> list[str]:
    """Rename what is damaged of the newest and the best checkpoints; what was wrong with them.

    Under their new names they take no part in anything: not in what is kept, nor in what is best.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    _, faults = newest_whole(directory)
    told = list(faults.values())
    for path in faults:
        path.rename(path.with_name(f"{path.name}.damaged"))
    while (best := best_checkpoint(directory)) and (fault := _fault(best)) is not None:
        told.append(fault)
        best.rename(best.with_name(f"{best.name}.damaged"))
    return told


def newest_whole(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is as it was written, and what is wrong with each newer one.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    faults: dict[Path, str] = {}
    for path in reversed(list_checkpoints(directory)):
        fault = _fault(path)
        if fault is None:
            return path, faults
        faults[path] = fault
    if faults:
        raise ValueError(
            f"no checkpoint is whole: {'; '.join(faults.values())}; remove {directory}"
        )
    return None, faults


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by its checksums."""
    try:
        sums = json.loads((checkpoint / _CHECKSUMS).read_text())
        for name, expected in sums.items():
            if _checksum(checkpoint / name) != expected:
                return f"{checkpoint / name} is not what was written"
        missing = _NEEDED - sums.keys()
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{checkpoint} cannot be verified ({error})"
    return f"{checkpoint} lacks {', '.join(sorted(missing))}" if missing else None


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def read_progress(checkpoint: Path) -> Progress:
    """How far the run of a checkpoint had come."""
    path = checkpoint / "trainer.json"
    try:
        return Progress(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: unreadable ({error}); delete {checkpoint} to resume from the one before it"
        ) from error


def restore_trainer(checkpoint: Path, trainer: Trainer) -> Progress:
    """Give a trainer the optimiser state and update count of a checkpoint."""
    progress = read_progress(checkpoint)
    trainer.updater.restore(_optimizer_state(checkpoint))
    trainer.updates, trainer.skipped = progress.updates, progress.skipped
    return progress


def _optimizer_state(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for path in [checkpoint / _OPTIMIZER, *sorted(checkpoint.glob("optimizer-*.safetensors"))]:
        try:
            yield from read_tensors(path)
        except OSError as error:
            raise ValueError(
                f"{path}: unreadable ({error}); delete {checkpoint} to resume from the one before"
                " it"
            ) from error


def export_model(checkpoint: Path, output: Path, *, dtype: str | None = None) -> None:
    """Write a checkpoint's model, without what only training needs, as a model directory.

    `dtype` of DTYPES converts the weights; one tensor at a time is held.

    Raises:
        ValueError: the checkpoint is damaged, or `output` is there already.
    """
    if (fault := _fault(checkpoint)) is not None:
        raise ValueError(f"{fault}; export another checkpoint")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; name a directory that is not there yet")
    paths = sorted(checkpoint.glob("model*.safetensors"))
    kept = None if dtype is None else DTYPES[dtype]
    named = ((n, t.to(kept or t.dtype)) for path in paths for n, t in read_tensors(path))
    save_weights(named, read_config(checkpoint), output, extra_files_from=checkpoint)


def _flush(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
