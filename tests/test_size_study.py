"""The size study: a quick run of it with one model, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from rmr1 import pocket
from rmr1.engine.model import CausalLM
from rmr1.pocket_init import wire_copying

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import size_study

    return size_study


@pytest.mark.slow
def test_a_quick_run(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "size_study.json"
    args = ["--quick", "--models", "pocket", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["size_study.py", *args])
    assert script.main() == 0
    assert "2.36 M" in capsys.readouterr().out
    rows = {row["arm"]: row for row in json.loads(output.read_text())}
    assert list(rows) == ["base", "distilled", "rm_r1"]
    assert {row["parameters"] for row in rows.values()} == {2_364_096}
    for arm in ("distilled", "rm_r1"):
        gained = rows[arm]["accuracy"] - rows["base"]["accuracy"]
        assert rows[arm]["gain_over_base"][0] == pytest.approx(gained)
    ElementTree.fromstring((tmp_path / "size_study.svg").read_text())


def test_what_is_no_model(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["size_study.py", "--models", "nowhere"])
    assert script.main() == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("width", pocket.WIDTHS)
def test_every_width_can_be_made_and_wired(width: int) -> None:
    model = CausalLM(pocket.model_config(width))
    wire_copying(model)
    attention = model.model.layers[1].self_attn
    assert model.config.head_dim == min(32, width // 2)
    assert attention.q_proj.weight.shape == (width, width)
    if width == pocket.MODEL["hidden_size"]:  # the one that ships
        assert pocket.MODEL.items() <= model.config.to_dict().items()
