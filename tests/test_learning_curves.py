"""The benchmark of the objectives: a quick run, taken up again; the figures and the plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from rmr1.demo_config import DemoConfig
from rmr1.evaluate import Evaluation, summarise
from rmr1.judge import Judgment

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import learning_curves

    return learning_curves


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["learning_curves.py", *arguments])
    code: int = script.main()
    return code


def test_a_quick_run_is_not_run_twice(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "deep" / "learning_curves.json"
    quick = ("--quick", "--name", "runs", "--output", str(output))
    assert call(script, monkeypatch, *quick) == 0
    out, err = capsys.readouterr()
    assert "DAPO" in out
    assert "RL dapo-0: 2/2 steps" in err
    (row,) = rows = json.loads(output.read_text())
    assert (row["provider"], row["seeds"], row["heldout_pairs"]) == ("rmr1 dapo", [0], 6)
    assert row["workload"] == "RL of the distilled pocket model, 2 steps of 4 x 4"
    assert row["objective"]["clip_high"] == 0.28
    assert len(row["reward"][0]) == 2
    assert row["gain"][0] == pytest.approx(row["accuracy"][0] - row["accuracy_before"][0])
    assert row["p20"] <= row["median"] <= row["p80"]
    ElementTree.fromstring((output.parent / "learning_curves.svg").read_text())

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a complete run was run again")

    monkeypatch.setattr("pocket_runs.rlvr", never)
    assert call(script, monkeypatch, *quick) == 0
    assert json.loads(output.read_text()) == rows
    assert call(script, monkeypatch, *quick, "--steps", "3") == 1
    assert "rl.steps was 2, is 3" in capsys.readouterr().err


def evaluation(seed: int, correct: Sequence[tuple[bool, bool]]) -> Evaluation:
    judgments = [
        Judgment(str(number), "family", "reasoning", "A", "A" if right else "B", placement)
        for number, both in enumerate(correct)
        for placement, right in zip(("ab", "ba"), both, strict=True)
    ]
    return summarise(judgments, prompt_hash="", seed=seed)


def result(script: ModuleType, seed: int, before: int, after: int, pairs: int = 40) -> Any:
    """A run in which `before` and then `after` of the pairs are judged right."""
    steps = [
        {"step_time": 1.0 + step, "reward": step / 4, "entropy": 0.1, "completions/mean_length": 9}
        for step in range(3)
    ]
    old, new = (
        evaluation(seed, [(number < right,) * 2 for number in range(pairs)])
        for right in (before, after)
    )
    return script.Result(DemoConfig(seed=seed), old, new, steps)


def test_what_is_outside_the_noise(script: ModuleType) -> None:
    row = script.row_of("gspo", [result(script, 0, 20, 30), result(script, 1, 20, 32)])
    assert row["gain"][0] == pytest.approx(11 / 40)
    assert row["accuracy"] == [0.75, 0.8]
    assert row["judgments_a_pair"] == 4
    assert row["outside_the_noise"]
    # One seed that stands still is enough to doubt, although all seeds together gain.
    row = script.row_of("gspo", [result(script, 0, 20, 20), result(script, 1, 20, 32)])
    assert row["gain"][1] > 0
    assert not row["outside_the_noise"]


def test_two_processes_do_not_take_the_same_run(script: ModuleType, tmp_path: Path) -> None:
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    with script.held(a) as first, script.held(a) as own, script.held(b) as other:
        assert (first, own, other) == (True, False, True)
    with script.held(a) as again:
        assert again


def test_the_plot_of_all(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    one = script.row_of("grpo", [result(script, seed, 20, 30 + seed) for seed in script.SEEDS])
    rows = [one | {"provider": f"rmr1 {name}"} for name in script.NAMES]
    drawing = script.plot(rows)
    ElementTree.fromstring(drawing)
    assert drawing.count('class="seed"') == 3 * len(rows)
    assert drawing.count('class="band"') == len(rows)
    assert "nan" not in drawing
    script.show(rows)
    out = capsys.readouterr().out
    assert all(name in out for name in script.NAMES.values())
    assert out.count("yes") == len(rows)


@pytest.mark.slow
def test_an_objective_learns(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "learning_curves.json"
    only = ("--only", "gspo", "--seeds", "0", "--output", str(output))
    assert call(script, monkeypatch, *only) == 0
    (row,) = json.loads(output.read_text())
    assert row["outside_the_noise"]
    assert min(row["parse_rate"]) > 0.95
