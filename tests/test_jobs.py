"""Whole jobs of several ranks by the command line: as one process, resumed on other numbers, and
ended by a rank that dies, raises, or never comes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rmr1.config import RlvrConfig, to_toml
from rmr1.engine.tensor_files import read_tensors

CLOCKED = ("_time", "_gb", "_per_second", "mfu")  # figures of the clock and the machine
Make = Callable[..., RlvrConfig]
CHANGES: dict[str, Any] = {
    "steps": 3,
    "checkpoint_every": 1,
    "rollout": {"prompts": 3, "samples": 4, "max_new_tokens": 8, "kv_memory_gb": 0.1},
    "optim": {"learning_rate": 1e-2},
    "max_micro_tokens": 40,
}


def command(config: RlvrConfig, folder: Path) -> list[str]:
    file = folder / f"{config.name}.toml"
    file.write_text(to_toml(config))
    return [sys.executable, "-m", "rmr1.cli", "rlvr", str(file)]


def rows(config: RlvrConfig) -> list[dict[str, Any]]:
    lines = (config.directory / "metrics.jsonl").read_text().splitlines()
    kept = []
    for line in lines:
        row = json.loads(line)
        kept.append({k: v for k, v in row.items() if not k.endswith(CLOCKED)})
    return kept


def close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"stage"}:
            # The extremes are of single tokens, the least exact figures of all.
            loose = 1e-4 if key.endswith(("_max", "_min")) else 1e-5
            assert one[key] == pytest.approx(other[key], abs=loose, rel=1e-4), key


def weights(config: RlvrConfig, step: int) -> dict[str, Any]:
    path = config.directory / "checkpoints" / f"step-{step:06d}" / "model.safetensors"
    return dict(read_tensors(path))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_pairs: Path) -> Any:
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    settings = {"runs_dir": str(folder), "name": "alone", "model": str(tiny_model)}
    more = {"prompt_style": "compact", "max_prompt_tokens": 24, "grpo": GRPO}
    config = RlvrConfig.model_validate(
        {**settings, **more, "data": {"path": str(tiny_pairs)}, **CHANGES}
    )
    subprocess.run(command(config, folder), check=True, capture_output=True)
    return config


GRPO = {"minibatches": 2, "resample_rounds": 1, "old_logprobs": "recompute"}


@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_job_is_as_one_process(
    ranks: int, stage: int, alone: RlvrConfig, rlvr_config: Make, tmp_path: Path, run_ranks: Any
) -> None:
    # And with the generator's memory given back during updates, which changes nothing.
    released = CHANGES | {"rollout": {**CHANGES["rollout"], "release": True}}
    config = rlvr_config(name="job", zero={"stage": stage}, grpo=GRPO, **released)
    built = tmp_path / "extensions"
    ended = run_ranks(command(config, tmp_path), ranks, TORCH_EXTENSIONS_DIR=str(built))
    assert not built.exists()  # nothing is compiled, under a lock that a killed rank would leave
    assert [status for status, _, _ in ended] == [0] * ranks, ended[0][2][-3000:]
    close(rows(config), rows(alone))
    assert any(row["prompts"] > 3 for row in rows(alone))  # some groups taught nothing
    for name, value in weights(alone, 3).items():
        assert (weights(config, 3)[name] - value).abs().max() < 1e-4, name
    assert "Model:" in ended[0][1]  # the first rank speaks, the others do not
    assert not any("Model:" in out for _, out, _ in ended[1:])


def started(
    config: RlvrConfig, processes: list[subprocess.Popen[str]], *, more_than: int = 0
) -> None:
    """Wait until the job has made a step, or more."""
    deadline = time.monotonic() + 120
    path = config.directory / "metrics.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") <= more_than:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_goes_on_with_another_number_of_ranks(
    rlvr_config: Make, tmp_path: Path, start_ranks: Any, run_ranks: Any
) -> None:
    changes = CHANGES | {"steps": 12, "optim": {"learning_rate": 1e-3}}
    whole = rlvr_config(name="whole", **changes)
    subprocess.run(command(whole, tmp_path), check=True, capture_output=True)
    reached = 0
    for ranks, stage in ((2, 3), (3, 1)):
        config = rlvr_config(name="parts", zero={"stage": stage}, **changes)
        processes = start_ranks(command(config, tmp_path), ranks)
        started(config, processes, more_than=reached)
        for process in processes:  # as a terminal does
            process.send_signal(signal.SIGINT)
        said = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [130] * ranks, said[0][-3000:]
        reached = len(rows(config))
        assert 0 < reached < 12
        close(rows(config), rows(whole)[:reached])
    config = rlvr_config(name="parts", **changes)
    subprocess.run(command(config, tmp_path), check=True, capture_output=True)
    close(rows(config), rows(whole))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_others(
    victim: int, rlvr_config: Make, tmp_path: Path, start_ranks: Any
) -> None:
    config = rlvr_config(name="killed", **(CHANGES | {"steps": 10_000}))
    processes = start_ranks(command(config, tmp_path), 2)
    started(config, processes)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    other = processes[1 - victim]
    _, err = other.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert other.returncode not in (0, None)
    assert "rank" in err or "Connection closed by peer" in err


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others(
    rlvr_config: Make, tmp_path: Path, start_ranks: Any
) -> None:
    """One that neither works nor dies: no connection is closed, but its heart stops."""
    config = rlvr_config(name="stopped", **(CHANGES | {"steps": 10_000}))
    hasty = (
        "import sys; from rmr1.engine import heartbeat; heartbeat.SILENCE = 4.0;"
        " from rmr1.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    processes = start_ranks([sys.executable, "-c", hasty, *command(config, tmp_path)[3:]], 2)
    started(config, processes)
    processes[1].send_signal(signal.SIGSTOP)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 1
    assert "rank 1 has shown no sign of life for 4 s" in err
    assert "start the same command again" in err


@pytest.mark.slow
def test_a_rank_that_raises_tells_the_others(
    rlvr_config: Make, tmp_path: Path, start_ranks: Any
) -> None:
    config = rlvr_config(name="raises", **(CHANGES | {"steps": 10_000}))
    processes = start_ranks(command(config, tmp_path), 2)
    started(config, processes)
    broken = config.directory / "metrics.jsonl"
    broken.unlink()
    broken.mkdir()  # where rank 0 is about to write
    ended = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 1]
    assert "Is a directory" in ended[0]
    assert "rank 0 failed" in ended[1]
    assert "Is a directory" in ended[1]
