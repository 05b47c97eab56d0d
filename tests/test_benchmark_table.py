"""The score in the terminal and as JSON, beside the published figures; the verb's arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from benchmark_judges import (
    Judge,
    making,
    rewardbench_row,
    rm_bench_row,
    rmb_list,
    rmb_pair,
    rows_of,
    run,
    verdict,
    write_json,
)
from endpoint_server import Reply, serving
from rich.console import Console

from rmr1.cli import main
from rmr1.evals.benchmark_table import print_score
from rmr1.evals.paper_results import TOTAL, WHOLE, differences, published
from rmr1.evals.rewardbench_items import load_rewardbench
from rmr1.evals.rm_bench_items import load_rm_bench
from rmr1.evals.rmb_items import load_rmb
from rmr1.evals.score import score_rows
from rmr1.evals.score_rules import REWARDBENCH_SUBSETS


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Judge hand-made items of a benchmark; the report."""

    def make(benchmark: str, *, judge: Judge | None = None, votes: int = 1, **options: Any) -> Any:
        rows, load = {
            "rewardbench": ([rewardbench_row(n) for n in range(4)], load_rewardbench),
            "rm-bench": ([rm_bench_row(n, domain="chat") for n in range(2)], load_rm_bench),
            "rmb": ([rmb_pair(1), rmb_list(2)], load_rmb),
        }[benchmark]
        dataset = load(write_json(tmp_path / "rows.json", rows))
        made = making(votes=votes)
        return run(dataset, tmp_path / f"{benchmark}.jsonl", judge, made, **options).to_json()

    return make


def shown(report: dict[str, Any]) -> str:
    """What a terminal shows, its columns a space apart."""
    text = StringIO()
    print_score(report, console=Console(file=text, width=100))
    return " ".join(text.getvalue().split())


def test_the_table_of_each_benchmark(score: Callable[..., dict[str, Any]]) -> None:
    text = shown(score("rewardbench"))
    assert "hep-cpp" in text
    assert "mean of sections" in text
    assert "mean of prompts" in text
    assert "llmbar-natural" not in text.split("No judgments of")[0]
    assert "RM-R1-Qwen2.5-Instruct-32B 95.3% 83.1% 91.9% 95.2% 91.4%" in text
    assert "4 judgments of 4 pairs, 0 ties; prompt" in text
    assert "unparsed 0.0%" in text
    text = shown(score("rm-bench", both_orders=True))
    assert "chat, hard" in text
    assert "RM-R1-Qwen2.5-Instruct-32B 79.1% 78.6%" in text
    assert "RM-R1-DeepSeek-Distilled-Qwen-32B 83.9% 83.3%" in text
    assert "same answer in both orders" in text
    assert "No judgments of: math, code, safety" in text
    text = shown(score("rmb"))
    assert "bon harmlessness" in text
    assert "73.0%" in text


def test_why_judgments_have_no_verdict_is_shown(score: Callable[..., dict[str, Any]]) -> None:
    text = shown(score("rewardbench", judge=Judge(lambda *_: "no idea ...")))
    assert "Without a verdict: 4 cut by max_new_tokens" in text
    assert "50.0%" in text  # the official rule


def test_what_differs_is_what_was_done(score: Callable[..., dict[str, Any]]) -> None:
    told = " ".join(differences(score("rewardbench")))
    assert "4 of the benchmark's 2,985 pairs" in told
    assert "Placement is seeded (0)" in told
    assert "earns 0.5; RewardBench's own code gives 0.5, RM-R1's 0" in told
    assert "both orders" not in told
    assert "votes" not in told
    told = " ".join(differences(score("rmb", both_orders=True, votes=3)))
    assert "4 pairs were judged in both orders" in told
    assert "A best-of-n list counts in each order for itself" in told
    assert "3 votes a judgment at temperature 1.0, equal numbers being a tie" in told
    told = " ".join(differences(score("rm-bench")))
    assert "the third of its three files twice" in told
    # Judgments of others, which do not say how they were made.
    rows = [{"benchmark": "rewardbench", "id": 1, "subset": "hep-go", "label": "A", "verdict": "A"}]
    report = score_rows(enumerate(rows), "rewardbench")
    assert "hash unknown" in " ".join(differences(report))
    assert "this judge" in shown(report)


def test_published_figures_are_the_papers() -> None:
    for benchmark, rows in ((name, published(name)) for name in TOTAL):
        assert len(rows) == 12 + (benchmark == "rewardbench")
        assert all(0.5 < value < 1 for figures in rows.values() for value in figures.values())
    assert published("rmb")["RM-R1-Qwen2.5-Instruct-32B"] == {"total": 0.73}
    assert sum(WHOLE.values()) == 40_773  # one greedy pass over the three, PAPER.md
    pairs = sum(447 if name == "math-prm" else n for name, (_, n) in REWARDBENCH_SUBSETS.items())
    assert WHOLE["rewardbench"] == pairs


# --- The verb ------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["eval", *args]) == 2
    return capsys.readouterr().err


def test_arguments_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_json(tmp_path / "r.json", [rewardbench_row(1)]))
    own, both = ("--model", "pocket"), ("--model", "pocket", "--endpoint.model", "m")
    for args, wanted in (
        (("rewardbench", "--data", data), "required: --model, or --endpoint.model"),
        (("rewardbench", "--data", data, *both), "two judges"),
        (("rewardbench", *own), "needs --data, a Parquet, JSON"),
        (("rmb", *own), "needs --data, the folder of RMB's"),
        (("rmb", *own, "--data", data, "--unparsed", "0.5"), "0 or, for rewardbench only, 0.5"),
        (("rmb", *own, "--data", data, "--temperature", "1"), "greedy with one vote"),
        (("rmb", *own, "--data", data), 'item 0: no field "pair_uid"; found chosen'),
        (("tasks", *own, "--votes", "3"), "eval tasks knows no --votes"),
        (("rewardbench", "--data", data, *own, "--votes", "0"), "votes"),
    ):
        assert wanted in told(capsys, *args)


def test_a_served_model_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_json(tmp_path / "r.json", [rewardbench_row(n) for n in range(4)])
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    with serving(lambda request, number: Reply(verdict("A"))) as server:
        args = ["eval", "rewardbench", "--data", str(data), "--endpoint.model", "big-judge"]
        args += ["--endpoint.base_url", server.url, "--endpoint.key_variable", "JUDGE_KEY"]
        args += ["--output", str(tmp_path / "j.jsonl"), "--prompt_style", "compact"]
        args += ["--max_new_tokens", "64", "--votes", "3", "--temperature", "0.6", "--json"]
        assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["made_by"]["model"] == f"big-judge@{server.url}"
    assert (found["made_by"]["votes"], found["made_by"]["temperature"]) == (3, 0.6)
    assert (found["prompt_mean"], found["position_bias"]) == (0.5, 1.0)
    assert found["paper"]["GPT-4o-0806"] == {"total": 0.867}
    assert any("3 votes" in line for line in found["differences"])
    assert {request["temperature"] for request in server.requests} == {0.6}
    assert {request["max_tokens"] for request in server.requests} == {64}
    assert len(server.requests) == 12
    assert "secret" not in (tmp_path / "j.jsonl").read_text()
    assert len(rows_of(tmp_path / "j.jsonl")) == 4


def test_endpoints_judge_pairs_too(tiny_pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda request, number: Reply(verdict("A"))) as server:
        args = ["eval", "pairs", "--data", str(tiny_pairs), "--endpoint.model", "m", "--json"]
        args += ["--endpoint.base_url", server.url, "--endpoint.key_variable", ""]
        assert main([*args, "--endpoint.input_price", "1000"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["accuracy"] == 0.5
    # 18 answers to prompts of 100 tokens each, as the server counts them.
    assert "The endpoint's answers cost 1.80 dollars by the prices given" in err
