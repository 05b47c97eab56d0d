"""A run that is killed again and again ends as one that never was: to the last bit.

python -m pytest -m slow tests/test_fault_injection.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

CLOCKED = ("_time", "_gb", "_per_second", "mfu")  # figures of the clock and the machine
STEPS = 60
KILLS = 20
PATIENCE = 120.0  # seconds in which a start has to come to a step


def command(model: Path, pairs: Path, folder: Path, name: str) -> list[str]:
    settings = {
        "name": name,
        "runs_dir": str(folder),
        "model": str(model),
        "prompt_style": "compact",
        "max_prompt_tokens": "24",
        "steps": str(STEPS),
        "checkpoint_every": "1",
        "data.path": str(pairs),
        "optim.learning_rate": "1e-2",
        "rollout.prompts": "3",
        "rollout.samples": "4",
        "rollout.max_new_tokens": "8",
        "rollout.kv_memory_gb": "0.1",
        "grpo.minibatches": "2",
    }
    options = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return [sys.executable, "-m", "rmr1.cli", "rlvr", *options]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The figures that do not depend on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = []
    for line in lines:
        row = json.loads(line)
        kept.append({key: row[key] for key in row if not key.endswith(CLOCKED)})
    return kept


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def in_save(folder: Path) -> bool:
    try:
        return any((folder / "checkpoints").glob(".step-*.partial/*"))
    except FileNotFoundError:  # it was renamed while it was looked at
        return False


def kill_one(call: list[str], folder: Path, draw: random.Random, *, in_a_save: bool) -> bool:
    """Start the run and kill it, -9; whether a save was going on. False if it ended before."""
    before = steps_logged(folder)
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    try:
        while steps_logged(folder) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        saving = False
        until = time.monotonic() + draw.random() * 0.3
        while process.poll() is None and (in_a_save or time.monotonic() < until):
            saving = in_save(folder)
            if in_a_save and saving:
                time.sleep(draw.random() * 0.01)
                break
            assert time.monotonic() < deadline
        process.kill()
        return saving
    finally:
        process.kill()
        _, said = process.communicate()
        assert process.returncode in (0, -9), said.decode()


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    subprocess.run(
        command(tiny_model, tiny_pairs, tmp_path, "whole"), check=True, capture_output=True
    )
    call, folder = command(tiny_model, tiny_pairs, tmp_path, "killed"), tmp_path / "killed"
    saves = sum(kill_one(call, folder, draw, in_a_save=number % 2 == 1) for number in range(KILLS))
    reached = steps_logged(folder)
    assert saves >= KILLS // 4
    assert reached < STEPS, "the run ended before it was killed often enough"
    subprocess.run(call, check=True, capture_output=True)

    whole = tmp_path / "whole"
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert rows(folder) == rows(whole)
    last = f"checkpoints/step-{STEPS:06d}"
    names = sorted(path.name for path in (whole / last).iterdir())
    assert "model.safetensors" in names
    assert "optimizer.safetensors" in names
    for name in names:
        assert (folder / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    leftovers = [path.name for path in (folder / "checkpoints").iterdir()]
    assert not [name for name in leftovers if name.startswith(".")]
