"""The ablation in small: what each arm is shown, and a quick run of all of it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from xml.etree import ElementTree

import pytest

from rmr1.tasks.catalog import draw_pairs
from rmr1.verdict import parse_verdict

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
PAIRS = draw_pairs(34, seed=0, split="train")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    return ablation


def tags(text: str) -> set[str]:
    return set(re.findall(r"<([a-z]+)>", text))


def test_arms_are_shown_what_they_are_to_write(script: ModuleType) -> None:
    whole = {"type", "eval", "answer"}
    for pair in PAIRS:
        head = {"rubric", "justify"} if pair.kind == "chat" else {"solution"}
        expected = {
            "cold": {"eval", "answer"},
            "rubrics": {"eval", "answer"} | head,
            "classified": whole | head,
            "rm_r1": whole | head,
            "answers": {"answer"},
        }
        for key, sections in expected.items():
            text = script.shown(script.ARMS[key], pair, Random(0)).trace
            assert tags(text) == sections, key
            assert parse_verdict(text).answer is not None


def test_only_arms_that_are_told_see_who_is_right(script: ModuleType) -> None:
    right = {}
    for key in ("cold", "rubrics", "classified", "rm_r1", "answers"):
        rng = Random(1)
        shown = [script.shown(script.ARMS[key], pair, rng) for pair in PAIRS * 6]
        hits = [parse_verdict(one.trace).answer == one.label for one in shown]
        right[key] = sum(hits) / len(hits)
    assert right["rm_r1"] == right["answers"] == 1
    for key in ("cold", "rubrics", "classified"):
        assert 0.4 < right[key] < 0.6, key


def test_answers_alone_see_the_pairs_of_both_stages(script: ModuleType) -> None:
    import argparse

    options = argparse.Namespace(quick=True, runs=Path("nowhere"))
    config = script.plan(options, "answers", 0)
    found = script.pairs_of(script.ARMS["answers"], config)
    assert len(found) == len({pair.id for pair in found}) == 32 + 2 * 4


def test_a_quick_run(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "ablation.json"
    args = ["--quick", "--only", "base", "cold", "distilled", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *args])
    assert script.main() == 0
    out = capsys.readouterr().out
    assert "Cold-start RL" in out
    rows = {row["provider"]: row for row in json.loads(output.read_text())}
    assert list(rows) == ["rmr1 base", "rmr1 cold", "rmr1 distilled"]
    assert rows["rmr1 base"]["gain_over_base"] is None
    cold = rows["rmr1 cold"]
    gained = cold["accuracy"] - rows["rmr1 base"]["accuracy"]
    assert cold["gain_over_base"][0] == pytest.approx(gained)
    ElementTree.fromstring((tmp_path / "ablation.svg").read_text())
