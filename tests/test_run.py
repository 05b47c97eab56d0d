"""The folder of a run: what is resumed, what is refused, what survives; and Ctrl-C."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rmr1.config import RlvrConfig, SftConfig, to_toml
from rmr1.data import Pair, read_pairs
from rmr1.engine.checkpoint import Progress
from rmr1.run import FREE_TO_CHANGE, Run, sample_row, training_pairs
from rmr1.stop_request import StopRequest

Make = Callable[..., SftConfig]


def pretend_checkpoint(config: SftConfig, step: int) -> Path:
    path = config.directory / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    names = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json")
    for name in names:
        (path / name).write_text("{}")
    sums = dict.fromkeys(names, hashlib.blake2b(b"{}").hexdigest())
    (path / "checksums.json").write_text(json.dumps(sums))
    return path


def test_a_new_run_writes_its_resolved_configuration(sft_config: Make) -> None:
    config = sft_config(model='odd "name"\\with', seed=3)
    run = Run(config)
    assert run.checkpoint is None
    written = tomllib.loads((config.directory / "config.toml").read_text())
    assert SftConfig.model_validate(written) == config
    assert written["optim"]["beta2"] == 0.999  # defaults are spelt out


def test_the_newest_checkpoint_is_where_a_run_goes_on(sft_config: Make) -> None:
    config = sft_config()
    Run(config)
    pretend_checkpoint(config, 4)
    newest = pretend_checkpoint(config, 12)
    (config.directory / "checkpoints" / ".step-000020.partial").mkdir()
    assert Run(config).checkpoint == newest


def test_another_configuration_is_refused_key_by_key(sft_config: Make) -> None:
    config = sft_config()
    Run(config)
    pretend_checkpoint(config, 4)
    before = (config.directory / "config.toml").read_text()
    changed = sft_config(batch_size=3, optim={"learning_rate": 1e-2, "warmup_steps": 2})
    with pytest.raises(ValueError, match="another configuration") as caught:
        Run(changed)
    message = str(caught.value)
    assert "batch_size was 4, is 3" in message
    assert "optim.warmup_steps was 1, is 2" in message
    assert "optim.schedule was 'linear', is 'constant'" in message
    assert "learning_rate" not in message
    assert "epochs" not in message
    assert "--name" in message
    assert (config.directory / "config.toml").read_text() == before
    assert Run(config).checkpoint is not None  # the old values resume it


def test_what_does_not_change_the_results_may_change(
    sft_config: Make, rlvr_config: Callable[..., RlvrConfig]
) -> None:
    changes = {
        "device": "cpu",
        "max_micro_tokens": 100,
        "checkpoint_every": 7,
        "keep_checkpoints": 5,
    }
    rollout = {"prompts": 3, "samples": 4, "max_new_tokens": 8}
    for make, more in (
        (sft_config, {}),
        (rlvr_config, {"rollout": {**rollout, "kv_memory_gb": 0.2}}),
        (rlvr_config, {"name": "other", "rollout": rollout}),  # set, then unset
    ):
        before = make(**{key: value for key, value in more.items() if key == "name"})
        Run(before)
        pretend_checkpoint(before, 4)
        after = make(**changes, **more)
        assert after != before
        assert Run(after).checkpoint is not None
        written = tomllib.loads((after.directory / "config.toml").read_text())
        assert type(after).model_validate(written) == after
    # A misspelt key would allow nothing.
    keys = {*RlvrConfig.model_fields, *(f"rollout.{key}" for key in rollout), *FREE_TO_CHANGE}
    assert set(changes) | {"rollout.kv_memory_gb"} <= set(FREE_TO_CHANGE) <= keys


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (None, "config.toml: missing or empty, though there is a run beside it; put it back"),
        (b"", "config.toml: missing or empty, though there is a run beside it; put it back"),
        (b"seed = ", "config.toml: no valid TOML \\(Invalid value .*; put it back"),
        (b"\xff", "config.toml: no valid TOML \\(.*utf-8.*; put it back"),
    ],
)
def test_a_run_without_its_settings_is_refused(
    sft_config: Make, damage: bytes | None, told: str
) -> None:
    """Also with the same ones: nobody can tell that they are."""
    config = sft_config()
    Run(config)
    pretend_checkpoint(config, 4)
    path = config.directory / "config.toml"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    for changed in (config, sft_config(seed=1)):
        with pytest.raises(ValueError, match=told) as caught:
            Run(changed)
        assert str(caught.value).startswith(str(path))
        assert "another --name" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == damage


def test_without_a_checkpoint_nothing_is_lost_by_another_configuration(sft_config: Make) -> None:
    Run(sft_config())
    run = Run(sft_config(batch_size=3))
    assert tomllib.loads((run.directory / "config.toml").read_text())["batch_size"] == 3


def lines(run: Run, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / name).read_text().splitlines()]


def test_logs_are_cut_back_to_the_checkpoint(sft_config: Make) -> None:
    run = Run(sft_config())
    for step in range(1, 6):
        run.log({"step": step, "loss": step / 2})
        run.sample({"step": step, "text": "zwei\nZeilen – 二行"})
    with (run.directory / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # the process died here
    run.start(Progress(step=3, updates=3, drawn=12))
    run.log({"step": 4, "loss": 2.5})
    assert lines(run) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": 2.5},
    ]
    samples = lines(run, "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 2, 3]
    assert samples[0]["text"] == "zwei\nZeilen – 二行"
    assert sorted(os.listdir(run.directory)) == ["config.toml", "metrics.jsonl", "samples.jsonl"]


def test_a_row_torn_before_its_line_end_is_dropped(sft_config: Make) -> None:
    run = Run(sft_config())
    (run.directory / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    run.start(Progress(step=2, updates=2, drawn=8))
    run.log({"step": 3})
    assert lines(run) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize(
    "line", ['{"stap": 2}', "[2]", "2", '{"step": "2"}', '{"step": 2', '"\\ud800', "\x00\x00"]
)
def test_a_damaged_row_is_named(sft_config: Make, line: str) -> None:
    run = Run(sft_config())
    path = run.directory / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n\n{line}\n{{"step": 3}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r'no row of a run, .* "step"; delete the line') as caught:
        run.start(Progress(step=3, updates=3, drawn=12))
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert path.read_bytes() == before
    path.write_bytes(b'\xff{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1: no row of a run"):
        run.start(Progress(step=3, updates=3, drawn=12))


def test_a_text_may_hold_any_line_separator(sft_config: Make) -> None:
    """JSON leaves those of Unicode as they are, and models write them."""
    run = Run(sft_config())
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh\r\ni"
    for step in (1, 2):
        run.sample({"step": step, "text": text})
    run.start(Progress(step=1, updates=1, drawn=4))
    (row,) = (run.directory / "samples.jsonl").read_text().split("\n")[:-1]
    assert json.loads(row) == {"step": 1, "text": text}


def test_a_full_disk_at_the_start_costs_no_row(
    sft_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft_config()
    run = Run(config)
    run.log({"step": 1})
    run.log({"step": 2})
    pretend_checkpoint(config, 1)
    before = {path.name: path.read_bytes() for path in run.directory.glob("*.*")}
    write_text = Path.write_text

    def fills_up(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fills_up)
    with pytest.raises(OSError, match="No space left"):
        run.start(Progress(step=1, updates=1, drawn=4))
    with pytest.raises(OSError, match="No space left"):
        Run(config)
    assert {path.name: path.read_bytes() for path in run.directory.glob("*.*")} == before
    assert len(os.listdir(run.directory)) == 3  # and no leftovers beside them


def test_training_pairs_come_from_the_file_or_the_tasks(sft_config: Make, tiny_pairs: Path) -> None:
    assert training_pairs(sft_config()) == read_pairs(tiny_pairs)
    drawn = training_pairs(sft_config(data={"tasks": 5, "seed": 1}))
    assert len(drawn) == 5
    assert drawn != training_pairs(sft_config(data={"tasks": 5, "seed": 2}))
    assert all(pair.trace for pair in drawn)


def test_sample_row_holds_the_whole_pair() -> None:
    pair = Pair("1", "tests", ({"role": "user", "content": "?"},), "a", "b", "B", "chat")
    row = sample_row("rlvr", 3, pair, "text", None)
    assert row == {
        "stage": "rlvr",
        "step": 3,
        "pair": asdict(pair),
        "text": "text",
        "verdict": None,
        "label": "B",
    }
    json.dumps(row)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_interrupts(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    now = 5.0
    with StopRequest(clock=lambda: now) as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert "press Ctrl-C again to leave at once" in capsys.readouterr().err
        now += 0.9
        signal.raise_signal(number)  # the same one, passed on by a launcher
        now += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_toml_of_a_configuration_reads_back(sft_config: Make) -> None:
    config = sft_config(optim={"learning_rate": 1e-6, "eps": 1e-30})
    assert SftConfig.model_validate(tomllib.loads(to_toml(config))) == config
