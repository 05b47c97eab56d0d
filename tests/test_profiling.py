"""Traces of a run's steps: which ones, what they hold, and what a broken-off step leaves."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import _profiler_enabled

from rmr1 import profiling
from rmr1.distill import nll
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.packing import pack
from rmr1.engine.phases import Phases
from rmr1.engine.trainer import Trainer
from rmr1.engine.weights import load_model
from rmr1.profiling import Profile


def names(path: Path) -> set[str]:
    """What the events of a trace are called."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as stream:
        return {event["name"] for event in json.load(stream)["traceEvents"] if "name" in event}


def steps(profile: Profile, first: int, last: int) -> None:
    """A run's loop, with one phase in each step."""
    phases = Phases(torch.device("cpu"))
    for step in range(first, last + 1):
        profile.step_begins(step)
        with phases(f"update-{step}"):
            torch.ones(3, 3) @ torch.ones(3, 3)
        profile.step_ended(step)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_steps_after_the_first_are_traced_one_by_one(tmp_path: Path) -> None:
    with Profile(tmp_path, 2) as profile:
        steps(profile, 11, 15)  # of a run that was resumed
    assert files(tmp_path) == ["trace-step-000012.json", "trace-step-000013.json"]
    first, second = (names(path) for path in sorted(tmp_path.iterdir()))
    assert {"ProfilerStep#12", "update-12", "aten::mm"} <= first
    assert {"ProfilerStep#13", "update-13", "aten::mm"} <= second
    assert not {"update-11", "update-13", "ProfilerStep#13"} & first


def test_an_update_shows_its_phases(tiny_model: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_model(tiny_model), OptimConfig(), total_updates=2)
    batch = pack([[1, 2, 3]], [[4, 5], [6, 7]], samples=2)
    with Profile(tmp_path, 1) as profile:
        for step in (1, 2):
            profile.step_begins(step)
            trainer.update(batch, nll, per_token=True)
            profile.step_ended(step)
    (path,) = tmp_path.iterdir()
    assert {"forward", "backward", "optimizer"} <= names(path)
    events = json.loads(path.read_text())["traceEvents"]
    (whole,) = (e for e in events if e.get("name") == "ProfilerStep#2" and e.get("ph") == "X")
    for one in (e for e in events if e.get("name") == "backward" and e.get("ph") == "X"):
        assert whole["ts"] <= one["ts"]
        assert one["ts"] + one["dur"] <= whole["ts"] + whole["dur"]


def test_without_steps_there_is_no_profiler(tmp_path: Path) -> None:
    with Profile(tmp_path, 0) as profile:
        for step in (1, 2, 3):
            profile.step_begins(step)
            assert not _profiler_enabled()
            profile.step_ended(step)
    assert files(tmp_path) == []


def test_a_phase_costs_nothing_without_a_profiler() -> None:
    """No range is opened: that alone takes a microsecond or more."""
    phases = Phases(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmr1.engine.phases.record_function", None)
        with phases("forward"):
            pass
    assert phases.take().keys() == {"forward"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_step_that_is_broken_off_leaves_nothing(
    error: type[BaseException], tmp_path: Path
) -> None:

    def run() -> None:
        with Profile(tmp_path, 2) as profile:
            steps(profile, 1, 1)
            profile.step_begins(2)
            assert _profiler_enabled()
            raise error

    with pytest.raises(error):
        run()
    assert not _profiler_enabled()
    assert files(tmp_path) == []
    with Profile(tmp_path, 1) as profile:  # and the next one works
        steps(profile, 1, 2)
    assert files(tmp_path) == ["trace-step-000002.json"]


def test_a_large_trace_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for large, name in ((0, "trace-step-000002.json.gz"), (1e9, "trace-step-000002.json")):
        monkeypatch.setattr(profiling, "LARGE", large)
        with Profile(tmp_path, 1) as profile:
            steps(profile, 1, 2)
        assert files(tmp_path) == [name]  # not the one of before too
        assert "update-2" in names(tmp_path / name)


@pytest.mark.parametrize("compressed", [True, False])
def test_an_interrupt_while_it_is_written_leaves_no_half(
    compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if compressed:
        monkeypatch.setattr(profiling, "LARGE", 0)
        monkeypatch.setattr("shutil.copyfileobj", interrupt)
    else:
        monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt), Profile(tmp_path, 1) as profile:
        steps(profile, 1, 2)
    assert files(tmp_path) == []


def test_a_trace_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Profile(tmp_path / "missing", 3) as profile:
        steps(profile, 1, 4)
    (record,) = (one for one in caplog.records if one.levelno >= logging.WARNING)
    assert "trace-step-000002.json could not be written" in record.getMessage()
    assert "no more steps are traced" in record.getMessage()
