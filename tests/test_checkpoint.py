"""Checkpoints: whole or not at all, whatever happens during a save; and the way back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmr1.distill import nll
from rmr1.engine import checkpoint as module
from rmr1.engine import tensor_files
from rmr1.engine.checkpoint import (
    Progress,
    best_checkpoint,
    list_checkpoints,
    newest_whole,
    read_progress,
    restore_trainer,
    save_checkpoint,
    set_aside_damaged,
)
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import pack
from rmr1.engine.trainer import Trainer, score
from rmr1.engine.weights import load_model

BATCH = pack([[3, 7, 8], [3, 9]], [[5, 1], [6, 7, 8, 1]])
FULL = OSError(errno.ENOSPC, "No space left on device")


def trainer_of(directory: Path) -> Trainer:
    config = OptimConfig(learning_rate=1e-2, warmup_steps=3)
    return Trainer(load_model(directory), config, total_updates=9)


@pytest.fixture
def trainer(tiny_model: Path) -> Trainer:
    made = trainer_of(tiny_model)
    made.update(BATCH, nll)
    return made


@pytest.fixture
def save(trainer: Trainer, tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    def at(step: int, keep: int = 2) -> Path:
        progress = Progress(step, trainer.updates, 10 * step)
        return save_checkpoint(
            tmp_path / "checkpoints", trainer, progress, tokenizer_from=tiny_model, keep=keep
        )

    return at


def contents(directory: Path) -> dict[str, str]:
    """Every file under a directory, hidden ones too, by the hash of its bytes."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_checkpoint_is_a_model_directory_for_others(
    trainer: Trainer, save: Callable[..., Path]
) -> None:
    saved = save(7)
    assert saved.name == "step-000007"
    assert json.loads((saved / "trainer.json").read_text()) == {
        "step": 7,
        "updates": 1,
        "drawn": 70,
        "score": None,
        "skipped": 0,
    }
    theirs = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        logprobs = theirs(torch.tensor([[3, 9, 6, 7, 8, 1]])).logits[0].log_softmax(-1)
    expected = logprobs[torch.arange(1, 5), torch.tensor([6, 7, 8, 1])]
    assert (score(trainer.model, BATCH)[2:] - expected).abs().max() < 3e-5
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.eos_token_id == 1
    assert tokenizer.chat_template


def test_going_on_from_a_checkpoint_is_going_on(
    trainer: Trainer, save: Callable[..., Path]
) -> None:
    trainer.update(BATCH, nll)
    saved = save(2)
    before = contents(saved)
    twin = trainer_of(saved)
    assert restore_trainer(saved, twin) == Progress(2, 2, 20)
    for _ in range(3):
        assert twin.update(BATCH, nll) == trainer.update(BATCH, nll)  # losses, norms, rates
    assert twin.updates == trainer.updates == 5
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, twin.model.get_parameter(name)), name
    moments = dict(trainer.updater.state())
    for name, value in twin.updater.state():
        assert torch.equal(value, moments[name]), name
    assert contents(saved) == before  # reading a checkpoint and going on leaves it alone


def test_before_the_first_update_there_is_no_state(tiny_model: Path, tmp_path: Path) -> None:
    fresh = trainer_of(tiny_model)
    saved = save_checkpoint(tmp_path, fresh, Progress(0, 0, 0), tokenizer_from=tiny_model)
    assert restore_trainer(saved, trainer_of(saved)) == Progress(0, 0, 0)


def test_only_the_newest_are_kept(save: Callable[..., Path], tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    assert list_checkpoints(directory) == []
    for step in (5, 10, 15):
        save(step)
    assert [path.name for path in list_checkpoints(directory)] == ["step-000010", "step-000015"]
    save(20, keep=1)
    assert os.listdir(directory) == ["step-000020"]


def test_the_best_is_kept_too(trainer: Trainer, tiny_model: Path, tmp_path: Path) -> None:
    for step, mark in ((1, 0.1), (2, 0.7), (3, 0.2), (4, 0.7), (5, -0.3), (6, None)):
        progress = Progress(step, step, step, mark)
        save_checkpoint(tmp_path, trainer, progress, tokenizer_from=tiny_model, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["step-000004", "step-000006"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000004"


FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json")


@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    save: Callable[..., Path], name: str, damage: str
) -> None:
    first, second = save(1), save(2)
    assert newest_whole(second.parent) == (second, {})
    victim = second / name
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    found, faults = newest_whole(second.parent)
    assert found == first
    assert list(faults) == [second]
    assert str(second) in faults[second]


def test_damaged_checkpoints_take_no_part_in_what_is_kept(
    trainer: Trainer, tiny_model: Path, tmp_path: Path
) -> None:
    def save(step: int, mark: float) -> None:
        progress = Progress(step, step, step, mark)
        save_checkpoint(tmp_path, trainer, progress, tokenizer_from=tiny_model, keep=3)

    for step, mark in ((5, 0.9), (10, 0.1), (20, 0.2)):
        save(step, mark)
    for step in (5, 20):  # the best and the newest
        (tmp_path / f"step-{step:06d}" / "model.safetensors").write_bytes(b"")
    told = set_aside_damaged(tmp_path)
    assert all(
        name in fault for name, fault in zip(("step-000020", "step-000005"), told, strict=True)
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000010"
    assert sorted(os.listdir(tmp_path)) == [
        "step-000005.damaged", "step-000010", "step-000020.damaged",
    ]  # fmt: skip


def test_what_was_just_saved_is_kept_beside_later_steps(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    save(20)
    assert save(15, keep=1).is_dir()


def test_without_a_whole_checkpoint_nothing_is_begun_anew(save: Callable[..., Path]) -> None:
    saved = save(1)
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no checkpoint is whole: .*model.safetensors is not what"
    ):
        newest_whole(saved.parent)
    assert newest_whole(saved.parent / "nowhere") == (None, {})


def test_checkpoints_are_ordered_by_number_and_others_ignored(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-000010", ".step-000011.partial", "step-12",
                 "step-000013-old", "best"):  # fmt: skip
        (tmp_path / name).mkdir()
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == ["step-000010", "step-999999", "step-1000000"]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def break_at(stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a save fail at one of its stages."""
    save_weights, write_text, rename = module.save_weights, Path.write_text, Path.rename

    def half_a_model(named: Any, config: Any, directory: Path, **options: Any) -> None:
        save_weights(named, config, directory, **options)
        (directory / "model.safetensors").write_bytes(b"half")
        raise error

    def write(self: Path, *arguments: Any, **options: Any) -> int:
        if self.name == "trainer.json":
            raise error
        return write_text(self, *arguments, **options)

    def move(self: Path, target: Path) -> Path:
        if target.name == "step-000002":
            raise error
        return rename(self, target)

    if stage == "weights":
        monkeypatch.setattr(module, "save_weights", half_a_model)
    elif stage == "flush of the weights":
        monkeypatch.setattr(os, "fsync", raising(error))
    elif stage == "optimizer":
        monkeypatch.setattr(module, "write_tensors", raising(error))
    elif stage == "trainer.json":
        monkeypatch.setattr(Path, "write_text", write)
    elif stage == "flush":
        monkeypatch.setattr(module, "_flush", raising(error))
    else:
        assert stage == "rename"
        monkeypatch.setattr(Path, "rename", move)


STAGES = ("weights", "flush of the weights", "optimizer", "trainer.json", "flush", "rename")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
def test_a_failed_save_leaves_the_last_checkpoint_and_nothing_else(
    stage: str,
    error: BaseException,
    save: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(1, keep=1)
    directory = tmp_path / "checkpoints"
    before = contents(directory)
    with monkeypatch.context() as patch:
        break_at(stage, error, patch)
        with pytest.raises(type(error)):
            save(2, keep=1)
    assert contents(directory) == before
    assert os.listdir(directory) == ["step-000001"]
    save(2, keep=1)
    assert os.listdir(directory) == ["step-000002"]


class Killed(BaseException):
    """Stands for SIGKILL: after it nothing is tidied up."""


@contextmanager
def no_tidying(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        yield patch


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_leaves_leftovers_that_nobody_takes_for_a_checkpoint(
    stage: str,
    save: Callable[..., Path],
    trainer: Trainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = save(1)
    directory = tmp_path / "checkpoints"
    before = contents(first)
    with no_tidying(monkeypatch) as patch:
        break_at(stage, Killed(), patch)
        with pytest.raises(Killed):
            save(2)
    assert sorted(os.listdir(directory)) == [".step-000002.partial", "step-000001"]
    assert list_checkpoints(directory) == [first]
    assert contents(first) == before
    restore_trainer(first, trainer)
    save(3)  # another step than the one that was cut off
    assert sorted(os.listdir(directory)) == ["step-000001", "step-000003"]


def test_a_kill_while_an_old_one_is_deleted(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    save(2)
    directory = tmp_path / "checkpoints"

    def half(path: Path, **_: object) -> None:
        (Path(path) / "model.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            save(3)
    assert [path.name for path in list_checkpoints(directory)] == ["step-000002", "step-000003"]
    for path in list_checkpoints(directory):
        restore_trainer(path, trainer_of(path))
    save(4)
    assert sorted(os.listdir(directory)) == ["step-000003", "step-000004"]


def test_saving_a_step_again_replaces_it(trainer: Trainer, save: Callable[..., Path]) -> None:
    before = contents(save(1))
    trainer.update(BATCH, nll)
    after = contents(save(1))
    assert before.keys() == after.keys()
    assert before["model.safetensors"] != after["model.safetensors"]
    assert read_progress(save(1)).updates == 2


def test_a_real_write_error_of_the_optimizer_is_an_os_error(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    """The system refuses the file itself: it is larger than the weights, which still fit."""
    weights = (save(1) / "model.safetensors").stat().st_size
    before = contents(tmp_path / "checkpoints")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights + weights // 2, hard))
    try:
        with pytest.raises(OSError, match="cannot write tensors"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "checkpoints") == before


def test_safetensors_errors_are_os_errors(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = raising(SafetensorError("No space left on device"))
    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(1)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "trainer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_checkpoint_says_what_to_do(
    name: str, damage: str, trainer: Trainer, save: Callable[..., Path]
) -> None:
    saved = save(4)
    file = saved / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if damage == "cut" else b"[1, 2]")
    with pytest.raises(ValueError, match=f"{name}: unreadable .*; delete .*step-000004 to resume"):
        restore_trainer(saved, trainer)
