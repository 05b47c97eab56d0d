"""TensorBoard's event files and W&B's offline files, read back; resuming; what fails."""

from __future__ import annotations

import logging
import math
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rmr1 import trackers
from rmr1.trackers import TensorBoard, TrackerName, Trackers, WeightsAndBiases

CONFIG = {"name": "run", "rl": {"beta": 0.001, "log": ["tensorboard", "wandb"]}}


def row(step: int, scale: float = 1.0) -> dict[str, Any]:
    return {
        "stage": "rlvr",
        "step": step,
        "reward": scale * step / 4,
        "completions/mean_length": 10 * step,
        "kl": math.nan,
    }


# --- TensorBoard ---------------------------------------------------------------------------------


def events(directory: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(directory / "tensorboard"))
    found.Reload()
    return found


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(directory).Scalars(name)]


def test_tensorboard_shows_numbers_and_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    shown = TensorBoard(tmp_path, CONFIG, step=0, rows=[])
    for step in (1, 2):
        shown.log(row(step))
    found = events(tmp_path)  # flushed at every step
    assert sorted(found.Tags()["scalars"]) == ["completions/mean_length", "kl", "reward"]
    assert scalars(tmp_path, "reward") == [(1, 0.25), (2, 0.5)]
    assert scalars(tmp_path, "completions/mean_length") == [(1, 10), (2, 20)]
    assert all(math.isnan(value) for _, value in scalars(tmp_path, "kl"))
    (text,) = found.Tensors("config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert all(line.startswith("    ") for line in lines)
    assert '"beta": 0.001,' in " ".join(lines)
    shown.close()


def test_a_resumed_run_shows_no_step_twice_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    killed = TensorBoard(tmp_path, CONFIG, step=0, rows=[])
    for step in range(1, 6):
        killed.log(row(step))  # and the process ends here, steps 4 and 5 unsaved
    resumed = TensorBoard(tmp_path, CONFIG, step=3, rows=[row(step) for step in range(1, 4)])
    for step in range(4, 7):
        resumed.log(row(step, scale=2))
    resumed.close()
    wanted = [(1, 0.25), (2, 0.5), (3, 0.75), (4, 2.0), (5, 2.5), (6, 3.0)]
    assert scalars(tmp_path, "reward") == wanted
    assert len(events(tmp_path).Tensors("config/text_summary")) == 1


def test_a_run_begun_anew_shows_nothing_of_the_old_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for scale in (1, 2):
        shown = TensorBoard(tmp_path, CONFIG, step=0, rows=[])
        for step in range(1, 4 - scale + 1):
            shown.log(row(step, scale))
        shown.close()
    assert scalars(tmp_path, "reward") == [(1, 0.5), (2, 1.0)]
    assert len(events(tmp_path).Tensors("config/text_summary")) == 1


def test_tensorboard_that_comes_later_is_given_what_was_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    shown = TensorBoard(tmp_path, CONFIG, step=2, rows=[row(1), row(2)])
    shown.log(row(3))
    shown.close()
    assert scalars(tmp_path, "reward") == [(1, 0.25), (2, 0.5), (3, 0.75)]


# --- Weights & Biases ----------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B in its offline mode, with a key that must not be found in any file."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "5ec4e7" * 7)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    yield
    wandb.teardown()


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, after a head of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    block = 32768
    while place + 7 <= len(data):
        if block - place % block < 7:  # what is left of a block holds no head
            place += block - place % block
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_rows(path: Path) -> list[dict[str, str]]:
    """What an offline file logs: of each row its names and values in JSON."""
    import wandb

    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    wandb.teardown()  # its process may still be writing when a run is finished
    rows = []
    for data in records(path):
        record = messages.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({one.key or "/".join(one.nested_key): one.value_json for one in items})
    return rows


def wandb_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_keeps_rows_and_configuration_offline(tmp_path: Path, offline: None) -> None:
    run = tmp_path / "judge"
    run.mkdir()
    shown = WeightsAndBiases(run, CONFIG, step=0, rows=[])
    for step in (1, 2):
        shown.log(row(step))
    shown.close()
    (path,) = wandb_files(run)
    first, second = wandb_rows(path)
    assert (first["_step"], first["reward"], second["_step"]) == ("1", "0.25", "2")
    assert first["kl"] == '"NaN"' or first["kl"] == "NaN"
    assert "stage" not in first
    content = path.read_bytes()  # whole by now
    assert b"beta" in content
    assert b"judge" in content
    assert path.stem == f"run-{(run / 'wandb_id').read_text().strip()}"


def test_no_file_holds_the_key(tmp_path: Path, offline: None) -> None:
    shown = WeightsAndBiases(tmp_path, CONFIG, step=0, rows=[])
    shown.log(row(1))
    shown.close(failed=True)
    import wandb

    wandb.teardown()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if b"5ec4e75ec4e7" in path.read_bytes()]


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path, offline: None) -> None:
    """Of offline files with one id W&B's server keeps the last, so that one has to hold all."""
    killed = WeightsAndBiases(tmp_path, CONFIG, step=0, rows=[])
    for step in range(1, 6):
        killed.log(row(step))
    killed.close()
    first_id = (tmp_path / "wandb_id").read_text()
    (first,) = wandb_files(tmp_path)
    resumed = WeightsAndBiases(tmp_path, CONFIG, step=3, rows=[row(step) for step in range(1, 4)])
    for step in (4, 4, 5):  # a step that it has is not shown again
        resumed.log(row(step, scale=2))
    resumed.close()
    assert (tmp_path / "wandb_id").read_text() == first_id
    # Both in one second have one folder, and the last one's file.
    (last,) = set(wandb_files(tmp_path)) - {first} or {first}
    assert [one["_step"] for one in wandb_rows(last)] == ["1", "2", "3", "4", "5"]
    assert [one["reward"] for one in wandb_rows(last)] == ["0.25", "0.5", "0.75", "2", "2.5"]


def test_a_run_begun_anew_has_an_id_of_its_own(tmp_path: Path, offline: None) -> None:
    ids = []
    for _ in range(2):
        WeightsAndBiases(tmp_path, CONFIG, step=0, rows=[]).close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] != ids[1]


@pytest.mark.parametrize("logged_in", [True, False])
def test_wandb_that_cannot_be_reached_costs_a_warning(
    logged_in: bool,
    tmp_path: Path,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Online, at a port that nobody listens on; or without a key and nobody to ask for it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and no `listen`
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_MODE", "online")
        if not logged_in:
            monkeypatch.delenv("WANDB_API_KEY")
        import wandb

        monkeypatch.setattr(wandb, "init", _impatient(wandb.init))
        with Trackers(["wandb"], tmp_path, CONFIG, step=0, rows=[]) as shown:
            shown.log(row(1))
            shown.log(row(2))
    (record,) = [one for one in caplog.records if one.name == trackers.__name__]
    assert record.levelno == logging.WARNING
    assert "wandb failed (" in record.getMessage()
    assert str(tmp_path / "metrics.jsonl") in record.getMessage()


def _impatient(init: Callable[..., Any]) -> Callable[..., Any]:
    """`wandb.init` that gives up after a second instead of 90."""

    def wait_less(*, settings: Any, **named: Any) -> Any:
        settings.init_timeout = 1
        return init(settings=settings, **named)

    return wait_less


# --- All of a run's ------------------------------------------------------------------------------


class Recorder:
    """Takes the place of both trackers."""

    made: list[Recorder]

    def __init__(self, directory: Path, config: dict[str, Any], **options: Any) -> None:
        self.options, self.rows = options, list[int]()
        self.closed: bool | None = None
        Recorder.made.append(self)

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] == 2 and self is Recorder.made[0]:
            raise OSError(28, "No space left on device")
        self.rows.append(row["step"])

    def close(self, *, failed: bool = False) -> None:
        assert self.closed is None
        self.closed = failed


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    Recorder.made = []
    monkeypatch.setattr(trackers, "require", lambda names: None)
    for name in ("TensorBoard", "WeightsAndBiases"):
        monkeypatch.setattr(trackers, name, Recorder)
    return Recorder.made


BOTH: list[TrackerName] = ["tensorboard", "wandb", "wandb"]


def test_one_that_fails_is_left_out_with_one_warning(
    recorders: list[Recorder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Trackers(BOTH, tmp_path, CONFIG, step=0, rows=[]) as shown:
        for step in range(1, 5):
            shown.log(row(step))
    one, other = recorders
    assert (one.rows, other.rows) == ([1], [1, 2, 3, 4])
    assert (one.closed, other.closed) == (None, False)
    (record,) = caplog.records
    assert "tensorboard failed ([Errno 28] No space left on device)" in record.getMessage()


@pytest.mark.parametrize(
    ("error", "failed"), [(KeyboardInterrupt("saved"), False), (ValueError("broken"), True)]
)
def test_a_run_that_does_not_end_well_is_closed_as_such(
    error: BaseException, failed: bool, recorders: list[Recorder], tmp_path: Path
) -> None:
    def run() -> None:
        with Trackers(BOTH, tmp_path, CONFIG, step=4, rows=[row(4)]) as shown:
            shown.close()  # once more at the end, of nothing
        with Trackers(BOTH, tmp_path, CONFIG, step=4, rows=[row(4)]):
            raise error

    with pytest.raises(type(error)):
        run()
    assert [one.closed for one in recorders] == [False, False, failed, failed]
    assert recorders[0].options == {"step": 4, "rows": [row(4)]}


def test_ctrl_c_while_one_works_goes_through(
    recorders: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Recorder, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "log", interrupted)
    with pytest.raises(KeyboardInterrupt), Trackers(BOTH, tmp_path, {}, step=0, rows=[]) as shown:
        shown.log(row(1))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_with_its_extra(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'rmr1\[log\]'") as caught:
        Trackers([name], tmp_path, CONFIG, step=0, rows=[])
    assert f"needs {name}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_wandb_left_behind_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"rmr1\[log\]"):
        trackers.require(["wandb"])


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with Trackers([], tmp_path, CONFIG, step=0, rows=[]) as shown:
        shown.log(row(1))
    assert list(tmp_path.iterdir()) == []
