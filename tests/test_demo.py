"""The demo in miniature: end to end, interrupted and resumed, begun anew, and never mixed up."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from rmr1.cli import main
from rmr1.config import load_config, to_toml
from rmr1.data import Pair, read_rows
from rmr1.demo import STAGES, _set_finished_aside, run_demo
from rmr1.demo_config import DemoConfig
from rmr1.engine.weights import load_model
from rmr1.models import load_tokenizer
from rmr1.prompts import encode, load_prompt
from rmr1.reporting.report import write_report
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import Phase

SMALL = """
name = "small"
heldout = 6
max_new_tokens = 12
checkpoint_every = 2
[distill]
traces = 12
batch_size = 4
[rl]
steps = 3
[rl.rollout]
prompts = 2
samples = 3
max_new_tokens = 12
[rl.grpo]
minibatches = 2
"""
# Ends of the figures of a run that depend on the clock, or on what ran before.
CLOCKED = ("_time", "_gb", "_per_second", "mfu")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for the embedded tasks."""
    directory = tmp_path_factory.mktemp("room") / "tiny"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 1024
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def small(model: Path, runs: Path, **changes: Any) -> DemoConfig:
    path = runs.parent / f"{runs.name}.toml"
    path.write_text(SMALL)
    return load_config(DemoConfig, path, {"model": str(model), "runs_dir": str(runs), **changes})


class Watch:
    """Shows phases to nobody; `stop` says after which (title, items done) what happens."""

    def __init__(self, **stop: Any) -> None:
        self.titles: list[str] = []
        self.told: dict[str, list[int]] = {}
        self.stop = stop

    def __call__(self, title: str, total: int, unit: str) -> AbstractContextManager[Phase]:
        self.titles.append(title)
        return self._phase(title, total, unit)

    @contextlib.contextmanager
    def _phase(self, title: str, total: int, unit: str) -> Iterator[Phase]:
        state = Phase(title, total, unit)
        told = self.told[title] = []

        def on_change() -> None:
            if told[-1:] != [state.done]:
                told.append(state.done)
            if self.stop.get("title") == title and state.done == self.stop["at"]:
                self.stop.pop("title")
                self.stop["do"]()

        state.on_change = on_change
        yield state


def ctrl_c() -> None:
    """In training: the stage finishes its step and saves."""
    signal.raise_signal(signal.SIGINT)


def leave() -> None:
    """In an evaluation, which has nothing to save."""
    raise KeyboardInterrupt


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith(CLOCKED)} for _, row in read_rows(path)]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A whole demo through the command line: its folder, and what --json printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.toml").write_text(SMALL)
    args = ["demo", str(folder / "small.toml"), "--model", str(model), "--json"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*args, "--runs_dir", str(folder / "runs")]) == 0
    told = err.getvalue()
    for title in ("Evaluate base", "Distil", "Evaluate distilled", "RL", "Evaluate rl"):
        assert re.search(rf"^{title}: .*, done$", told, re.MULTILINE), told
    return folder / "runs" / "small", json.loads(out.getvalue())


def test_json_is_the_table(finished: tuple[Path, Any]) -> None:
    directory, table = finished
    assert list(table) == list(STAGES)
    written = json.loads((directory / "evaluations.json").read_text())
    for stage, row in table.items():
        assert list(row) == ["accuracy", "accuracy_parsed", "parse_rate", "ci"]
        assert {key: written[stage][key] for key in row} == row
        low, high = row["ci"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert row["accuracy"] <= row["parse_rate"]
    assert "gain" not in written["base"]
    assert written["rl"]["gain"]["accuracy"][0] == pytest.approx(
        table["rl"]["accuracy"] - table["distilled"]["accuracy"]
    )


def test_a_demo_leaves_its_inputs_and_results(finished: tuple[Path, Any]) -> None:
    directory, _ = finished
    assert not list(directory.rglob("*.partial"))
    pairs = draw_pairs(6, seed=0, split="heldout")
    for stage in STAGES:
        judged = [
            (row["id"], row["placement"]) for row in rows(directory / f"judgments-{stage}.jsonl")
        ]
        assert judged == [(pair.id, placement) for pair in pairs for placement in ("ab", "ba")]
    metrics = rows(directory / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in metrics] == [
        *(("sft", step) for step in (1, 2, 3)),
        *(("rlvr", step) for step in (1, 2, 3)),
    ]
    assert {row["stage"] for row in rows(directory / "samples.jsonl")} == set(STAGES)
    for name in ("sft", "rlvr"):
        checkpoint = directory / name / "checkpoints" / "step-000003"
        assert load_model(checkpoint).config.max_position_embeddings == 1024
        assert load_tokenizer(checkpoint).eos_token_id == 1
    report = (directory / "report.html").read_text(encoding="utf-8")
    assert "Distilled" in report
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(http""", report)
    resolved = load_config(DemoConfig, directory / "config.toml")
    assert to_toml(resolved) == (directory / "config.toml").read_text(encoding="utf-8")
    assert resolved.rl.rollout.samples == 3


@pytest.mark.parametrize(
    ("title", "at", "left"),
    [
        (
            "Evaluate base",
            12,
            ["Evaluate base", "Distil", "Evaluate distilled", "RL", "Evaluate rl"],
        ),
        ("Distil", 1, ["Distil", "Evaluate distilled", "RL", "Evaluate rl"]),
        ("Evaluate distilled", 12, ["Distil", "Evaluate distilled", "RL", "Evaluate rl"]),
        ("RL", 1, ["Distil", "RL", "Evaluate rl"]),
    ],
)
def test_an_interrupted_demo_goes_on_to_the_same_end(
    finished: tuple[Path, Any], model: Path, tmp_path: Path, title: str, at: int, left: list[str]
) -> None:
    whole, _ = finished
    config = small(model, tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, Watch(title=title, at=at, do=leave if "Evaluate" in title else ctrl_c))
    assert not (config.directory / "evaluations.json").exists()
    watch = Watch()
    evaluations, report = run_demo(config, watch)
    assert watch.titles == left
    if title in ("Distil", "RL"):
        assert watch.told[title] == [at, at + 1, at + 2]  # no step is done twice
    assert report == config.directory / "report.html"
    assert report.is_file()
    assert json.loads((config.directory / "evaluations.json").read_text()) == json.loads(
        json.dumps(evaluations)
    )
    for name in ("judgments-base.jsonl", "judgments-distilled.jsonl", "judgments-rl.jsonl"):
        assert rows(config.directory / name) == rows(whole / name), name
    for mine, theirs in zip(
        rows(config.directory / "metrics.jsonl"), rows(whole / "metrics.jsonl"), strict=True
    ):
        assert mine.pop("stage") == theirs.pop("stage")
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_other_settings_do_not_mix_with_an_interrupted_demo(model: Path, tmp_path: Path) -> None:
    config = small(model, tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, Watch(title="Distil", at=1, do=ctrl_c))
    before = contents(config.directory)
    for change, told in (
        ({"heldout": 7}, "heldout was 6, is 7"),
        ({"max_new_tokens": 9}, "max_new_tokens was 12, is 9"),
        ({"rl.steps": 4}, "rl.steps was 3, is 4"),
    ):
        with pytest.raises(ValueError, match=f"another configuration \\({told}\\).*another --name"):
            run_demo(small(model, tmp_path / "runs", **change), Watch())
    assert contents(config.directory) == before


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_finished_demo_is_moved_aside(
    finished: tuple[Path, Any], model: Path, tmp_path: Path
) -> None:
    whole, _ = finished
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs / "small")
    before = contents(runs / "small")
    with pytest.raises(ValueError, match="no such model directory"):
        run_demo(small(tmp_path / "nowhere", runs), Watch())
    assert contents(runs / "small") == before  # a start that cannot succeed moves nothing
    with pytest.raises(KeyboardInterrupt):
        run_demo(small(model, runs, heldout=4), Watch(title="Evaluate base", at=8, do=leave))
    assert contents(runs / "small-1") == before
    assert not (runs / "small" / "evaluations.json").exists()


def test_a_demo_cut_off_while_it_writes_its_report_writes_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(model, tmp_path / "runs")

    def cut_off(directory: Path, **_: Any) -> Path:
        assert (directory / "evaluations.json").is_file()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(config, Watch(title="RL", at=1, do=ctrl_c))
    write_report(config.directory)  # `rmr1 report` may be called in the middle of a demo
    with monkeypatch.context() as patch:
        patch.setattr("rmr1.demo.write_report", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_demo(config, Watch())
    before = rows(config.directory / "judgments-rl.jsonl")
    watch = Watch()
    _, report = run_demo(config, watch)
    assert watch.titles == ["Distil", "RL"]
    assert watch.told == {"Distil": [3], "RL": [3]}  # complete, all of it
    assert report.is_file()
    assert rows(config.directory / "judgments-rl.jsonl") == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]


def test_a_resumed_demo_may_change_what_does_not_change_it(model: Path, tmp_path: Path) -> None:
    config = small(model, tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, Watch(title="Evaluate distilled", at=12, do=leave))
    changes = {"max_micro_tokens": 4000, "checkpoint_every": 1, "rl.rollout.kv_memory_gb": 0.2}
    watch = Watch()
    run_demo(small(model, tmp_path / "runs", **changes), watch)
    assert watch.told["Distil"] == [3]
    assert watch.told["RL"] == [0, 1, 2, 3]


def test_the_first_free_name_is_taken(tmp_path: Path) -> None:
    for name in ("demo", "demo-1", "demo-3"):
        (tmp_path / name).mkdir()
    for name in ("config.toml", "evaluations.json", "report.html"):
        _set_finished_aside(tmp_path / "demo")  # not finished: it stays
        assert (tmp_path / "demo").is_dir()
        (tmp_path / "demo" / name).write_text("{}")
    _set_finished_aside(tmp_path / "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-1", "demo-2", "demo-3"]
    assert (tmp_path / "demo-2" / "evaluations.json").is_file()


def test_long_prompts_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(model)

    def lengths(pairs: list[Pair]) -> list[int]:
        return sorted(len(encode(tokenizer, load_prompt("compact").render(pair))) for pair in pairs)

    heldout = lengths(draw_pairs(6, seed=0, split="heldout"))
    limit = heldout[-2]
    too_long = 2 * sum(length > limit for length in heldout)
    left_out = sum(length > limit for length in lengths(draw_pairs(12, seed=0, split="train")))
    assert too_long
    assert left_out
    (tmp_path / "x.toml").write_text(SMALL)
    args = ["demo", str(tmp_path / "x.toml"), "--model", str(model), "--runs_dir", str(tmp_path)]
    assert main([*args, "--max_prompt_tokens", str(limit)]) == 0
    out, err = capsys.readouterr()
    assert f"{too_long} of 12 held-out prompts were over the token limit" in err
    assert f"sft: {left_out} pairs were over the token limits and left out" in err
    for name in ("Base", "Distilled", "RL", "Report: "):
        assert re.search(rf"^{name}", out, re.MULTILINE)
