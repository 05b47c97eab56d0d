"""A judge works through a benchmark: rows, resuming, votes, both orders, endpoints, failures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmark_judges import (
    Judge,
    fooled_by_looks,
    knows,
    making,
    rewardbench_row,
    rm_bench_folder,
    rm_bench_row,
    rmb_list,
    rmb_pair,
    rows_of,
    run,
    says_a,
    verdict,
    write_json,
)
from endpoint_server import Reply as ServerReply
from endpoint_server import serving

from rmr1.endpoints.endpoint import EndpointConfig
from rmr1.endpoints.remote_model import RemoteModel
from rmr1.evals.benchmark_items import Dataset
from rmr1.evals.paper_results import differences
from rmr1.evals.rewardbench_items import load_rewardbench
from rmr1.evals.rm_bench_items import load_rm_bench
from rmr1.evals.rmb_items import load_rmb
from rmr1.evals.score import score_file
from rmr1.judgment_log import repair_tail
from rmr1.models import model_id
from rmr1.prompts import load_prompt


def rm_bench(tmp_path: Path, **domains: int) -> Dataset:
    return load_rm_bench(rm_bench_folder(tmp_path / "data", **(domains or {"chat": 3})))


def rewardbench(tmp_path: Path, count: int = 6) -> Dataset:
    rows = [rewardbench_row(name) for name in range(count)]
    return load_rewardbench(write_json(tmp_path / "rewardbench.json", rows))


def test_nine_judgments_an_item_with_all_that_made_them(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    result = run(
        rm_bench(tmp_path, chat=3, safety_refuse=2),
        tmp_path / "out" / "j.jsonl",
        Judge(fooled_by_looks),
        batch_size=7,
        progress=lambda done, total: told.append((done, total)),
    )
    rows = rows_of(result.output)
    assert result.judgments == len(rows) == 5 * 9
    assert Counter((row["domain"], row["id"]) for row in rows)["safety-refuse", 1] == 9
    assert {(row["chosen_index"], row["rejected_index"]) for row in rows} == {
        (i, j) for i in range(3) for j in range(3)
    }
    assert rows[0].keys() >= {
        "benchmark", "id", "label", "verdict", "domain", "chosen_index", "rejected_index", "order",
        "text", "prompt_hash", "model", "seed", "votes", "placement", "format_error", "cluster",
    }  # fmt: skip
    assert all((row["placement"] == "ab") == (row["label"] == "A") for row in rows)
    assert told[0] == (0, 45)
    assert told[-1] == (45, 45)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    # Fooled where a concise right answer meets a detailed or markdown wrong one: (0,1) and (0,2),
    # two of the three cells above the diagonal.
    assert result.score["hard"] == pytest.approx(1 / 3)
    assert result.score["normal"] == result.score["easy"] == 1.0
    assert result.score["overall"] == pytest.approx(7 / 9)
    assert result.score == score_file(result.output, "rm-bench")
    assert result.to_json()["missing_from_data"] == ["math", "code", "safety-response"]


def test_all_three_benchmarks_by_one_runner(tmp_path: Path) -> None:
    pairs, lists = [rmb_pair(n) for n in range(4)], [rmb_list(n, 2 + n) for n in range(3)]
    datasets = [
        rm_bench(tmp_path, chat=1),
        rewardbench(tmp_path),
        load_rmb(write_json(tmp_path / "rmb.json", pairs + lists)),
    ]
    for dataset, wanted in zip(datasets, (9, 6, 4 + 2 + 3 + 4), strict=True):
        done = run(dataset, tmp_path / f"{dataset.benchmark}.jsonl", both_orders=True)
        assert done.judgments == 2 * wanted
        score = done.score
        assert score.get("overall", score.get("section_mean")) == 1.0
        assert (score["pairs"], score["pairs_in_both_orders"]) == (wanted, wanted)
        assert (score["swap_consistency"], score["position_bias"]) == (1.0, 0.5)
        assert score["made_by"]["prompt_hash"] == load_prompt("compact").hash
        assert score["duplicates"] == 0


def test_a_judge_that_says_a_earns_half_by_either_rule_of_orders(tmp_path: Path) -> None:
    dataset = rewardbench(tmp_path, 10)
    one = run(dataset, tmp_path / "one.jsonl", Judge(says_a))
    assert one.score["sections"]["Reasoning"] == 0.5  # placement is balanced
    assert one.score["position_bias"] == 1.0
    assert one.score["swap_consistency"] is None
    both = run(dataset, one.output, Judge(says_a), both_orders=True)  # the one order is kept
    assert (both.judgments, both.resumed) == (20, 10)
    assert both.score["sections"]["Reasoning"] == 0.5
    assert both.score["swap_consistency"] == 0.0


def test_a_list_counts_in_each_order_for_itself(tmp_path: Path) -> None:
    path = write_json(tmp_path / "rmb.json", [rmb_list(n, 1) for n in range(10)])
    done = run(load_rmb(path), tmp_path / "j.jsonl", Judge(says_a), both_orders=True)
    # With one loser a list is a pair: right in one order, wrong in the other.
    assert done.score["bon_harmlessness"] == 0.5
    assert done.score["bon_lists"] == 10


def test_limit_takes_items_of_each_part(tmp_path: Path) -> None:
    dataset = rm_bench(tmp_path, chat=4, safety_response=3, safety_refuse=1)
    assert run(dataset, tmp_path / "j.jsonl", limit=1).judgments == 27
    more = run(dataset, tmp_path / "j.jsonl", limit=2)  # the same placements
    assert (more.judgments, more.resumed, more.score["duplicates"]) == (45, 27, 0)
    assert more.to_json()["new"] == 18
    with pytest.raises(ValueError, match="limit must be at least 1"):
        run(dataset, tmp_path / "k.jsonl", limit=0)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    dataset = rm_bench(tmp_path)
    whole = run(dataset, tmp_path / "whole.jsonl", batch_size=4)
    output = tmp_path / "stopped.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(dataset, output, Judge(stop_after=8), batch_size=4)
    assert len(rows_of(output)) == 8  # two batches are safe
    judge = Judge()
    rest = run(dataset, output, judge, batch_size=4)
    assert (rest.resumed, len(judge.prompts)) == (8, 19)
    assert output.read_bytes() == whole.output.read_bytes()
    idle = Judge()
    assert run(dataset, output, idle).score == whole.score
    assert idle.prompts == []


def test_a_torn_last_line_is_mended_at_any_byte(tmp_path: Path) -> None:
    dataset = rm_bench(tmp_path, chat=1)
    whole = run(dataset, tmp_path / "whole.jsonl").output.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    output = tmp_path / "torn.jsonl"
    ends = [start + 1, start + 2, whole.index("Ω".encode(), start) + 1, len(whole) - 2]
    for end in [*ends, len(whole) - 1]:
        output.write_bytes(whole[:end])
        judge = Judge()
        run(dataset, output, judge)
        assert output.read_bytes() == whole
        # Only a row that lacks nothing but its newline is kept.
        assert len(judge.prompts) == (0 if end == len(whole) - 1 else 1)
    output.write_bytes(whole)
    assert not repair_tail(output)


def test_a_bad_line_inside_is_an_error_and_the_file_stays(tmp_path: Path) -> None:
    dataset = rm_bench(tmp_path, chat=1)
    output = run(dataset, tmp_path / "j.jsonl").output
    lines = output.read_bytes().splitlines(keepends=True)
    broken = b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]])
    output.write_bytes(broken)
    with pytest.raises(ValueError, match=r"j\.jsonl, line 2: no JSON"):
        run(dataset, output)
    assert output.read_bytes() == broken


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"domain": ["chat"]}, r'field "domain" must be one of chat, .* got \[\'chat\'\]'),
        ({"chosen_index": [1]}, r'field "chosen_index" must be one of 0, 1, 2, got \[1\]'),
        ({"verdict": "Z"}, r'field "verdict" must be one of A, B, tie, null, got \'Z\''),
        ({"id": None}, r'field "id" is None'),
        ({"rejected_index": ...}, r'field "rejected_index" is missing'),
        ({"benchmark": "rmb"}, r'field "benchmark" must be one of rm-bench'),
        (None, "a judgment must be a JSON object, got list"),
    ],
)
def test_a_bad_row_is_found_before_anything_is_judged(
    tmp_path: Path, change: dict[str, Any] | None, told: str
) -> None:
    dataset = rm_bench(tmp_path, chat=2)
    output = run(dataset, tmp_path / "j.jsonl", limit=1).output
    rows: list[Any] = rows_of(output)
    fields = {**rows[3], **(change or {})}
    rows[3] = [1] if change is None else {k: v for k, v in fields.items() if v is not ...}
    output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    before = output.read_bytes()
    judge = Judge()
    with pytest.raises(ValueError, match=rf"j\.jsonl, line 4: {told}"):
        run(dataset, output, judge)
    assert judge.prompts == []
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ({"model": "m@2"}, "model"),
        ({"prompt": load_prompt("rubric")}, "prompt_hash"),
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 7}, "max_new_tokens"),
        ({"votes": 3}, "votes"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_runs_are_not_mixed(tmp_path: Path, option: dict[str, Any], field: str) -> None:
    dataset = rm_bench(tmp_path, chat=1)
    output = run(dataset, tmp_path / "j.jsonl").output
    before = output.read_bytes()
    with pytest.raises(ValueError, match=rf'j\.jsonl, line 1: field "{field}" is .*another output'):
        run(dataset, output, made=making(**option))
    assert output.read_bytes() == before


def test_other_texts_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    output = run(rewardbench(tmp_path), tmp_path / "j.jsonl").output
    changed = [rewardbench_row(n, chosen=f"right {n}, edited") for n in range(6)]
    dataset = load_rewardbench(write_json(tmp_path / "changed.json", changed))
    with pytest.raises(ValueError, match='field "content" is'):
        run(dataset, output)


def test_why_there_is_no_verdict(tmp_path: Path) -> None:
    def say(first: str, second: str, sample: int) -> str:
        kinds = {"0": "thinking ...", "1": "<think>", "2": "I like both", "3": "<answer>[[C]]"}
        return kinds.get(first.split()[1], knows(first, second))

    rows = [rewardbench_row(n) for n in range(6)] + [rewardbench_row(6, prompt="long " * 2000)]
    dataset = load_rewardbench(write_json(tmp_path / "r.json", rows))
    score = run(dataset, tmp_path / "j.jsonl", Judge(say, longest=5000)).score
    assert score["parse_failures"] == {
        "cut by max_new_tokens": 1, "UNCLOSED_THINK": 1, "NO_TYPE": 1, "UNCLOSED_TAG": 1,
        "skipped (prompt_too_long)": 1,
    }  # fmt: skip
    assert score["parse_failure_rate"] == pytest.approx(5 / 7)
    assert score["sections"]["Reasoning"] == pytest.approx((2 + 5 * 0.5) / 7)
    strict = score_file(tmp_path / "j.jsonl", "rewardbench", unparsed=0)
    assert strict["sections"]["Reasoning"] == pytest.approx(2 / 7)


def test_votes_are_drawn_and_the_majority_counts(tmp_path: Path) -> None:
    says = {
        "0": ["right", "right", "wrong"],  # right by two to one
        "1": ["wrong", "?", "wrong"],  # wrong; what cannot be read does not vote
        "2": ["right", "wrong", "?"],  # one each: a tie
        "3": ["?", "?", "?"],  # no verdict
    }

    def say(first: str, second: str, sample: int) -> str:
        said = says[first.split()[1]][sample]
        if said == "?":
            return "no idea"
        return verdict("A" if first.startswith(said) else "B")

    judge = Judge(say)
    told: list[tuple[int, int]] = []
    done = run(
        rewardbench(tmp_path, 4),
        tmp_path / "j.jsonl",
        judge,
        making(votes=3, temperature=0.7),
        batch_size=2,
        progress=lambda done, total: told.append((done, total)),
    )
    rows = {row["id"]: row for row in rows_of(done.output)}
    assert [rows[n]["verdict"] == rows[n]["label"] for n in range(4)] == [True, False, False, False]
    assert [rows[n]["verdict"] for n in (2, 3)] == ["tie", None]
    assert Counter(rows[0]["vote_counts"].values()) == {2: 1, 1: 1, 0: 2}
    assert [len(rows[n]["samples"]) for n in range(4)] == [3, 3, 3, 3]
    assert "Ω" in rows[0]["samples"][0]["text"]
    assert rows[0]["new_tokens"] == 12
    # 1 + 0 + a tie and an unread one at a half each.
    assert done.score["sections"]["Reasoning"] == pytest.approx((1 + 0.5 + 0.5) / 4)
    assert (done.score["ties"], done.score["parse_failures"]) == (1, {"NO_TYPE": 5})
    assert {(one.n, one.temperature) for one in judge.samplings} == {(3, 0.7)}
    assert len({one.seed for one in judge.samplings}) == 2  # no two batches draw alike
    assert told[0] == (0, 4)
    assert told[-1] == (4, 4)


def test_one_vote_is_greedy_and_bad_votes_are_refused(tmp_path: Path) -> None:
    judge = Judge()
    run(rewardbench(tmp_path), tmp_path / "j.jsonl", judge, making(temperature=0.9))
    assert {(one.n, one.temperature) for one in judge.samplings} == {(1, 0.0)}
    with pytest.raises(ValueError, match="votes must be at least 1"):
        making(votes=0)
    with pytest.raises(ValueError, match="all the same"):
        making(votes=3, temperature=0.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        run(rewardbench(tmp_path), tmp_path / "k.jsonl", batch_size=0)


def test_a_temperature_that_is_not_sent_is_not_claimed(tmp_path: Path) -> None:
    with serving(lambda *_: ServerReply(verdict("A"))) as server:
        config = EndpointConfig(
            model="m", base_url=server.url, key_variable="", send_sampling=False
        )
        made = making(temperature=None)
        done = run(rewardbench(tmp_path), tmp_path / "j.jsonl", RemoteModel(config), made)
        assert all("temperature" not in one for one in server.requests)
        assert {row["temperature"] for row in rows_of(done.output)} == {None}
        assert any("No temperature was sent" in one for one in differences(done.score))
        with pytest.raises(ValueError, match=r'field "temperature" is None, but this run has 0\.0'):
            run(rewardbench(tmp_path), tmp_path / "j.jsonl", RemoteModel(config))


def test_an_endpoint_that_fails_loses_nothing(tmp_path: Path) -> None:
    dataset = rewardbench(tmp_path, 12)

    def answer(request: dict[str, Any], number: int) -> ServerReply:
        if 5 <= number < 11:
            return ServerReply(status=500, body={"error": {"message": "down"}})
        text = request["messages"][-1]["content"]
        if "Question 3?" in text:
            return ServerReply(status=400, body={"error": {"message": "too long"}})
        return ServerReply(verdict("A" if "A]\nright" in text else "B"))

    with serving(answer) as server:
        judge = RemoteModel(
            EndpointConfig(
                model="m", base_url=server.url, key_variable="", retries=0, concurrency=1
            )
        )
        # All but the six that failed are asked for, and kept.
        with pytest.raises(ValueError, match=r"6 judgments are missing: .*HTTP 500.* same again"):
            run(dataset, tmp_path / "j.jsonl", judge, batch_size=4)
        assert len(server.requests) == 12
        assert len(rows_of(tmp_path / "j.jsonl")) == 6
        done = run(dataset, tmp_path / "j.jsonl", judge, batch_size=4)
    assert (done.judgments, done.resumed, len(server.requests)) == (12, 6, 18)
    assert done.score["parse_failures"] == {"skipped (refused)": 1}
    assert done.score["sections"]["Reasoning"] == pytest.approx(11.5 / 12)
    assert server.requests[0]["temperature"] == 0.0


def test_a_question_that_always_fails_leaves_the_others_their_judgments(tmp_path: Path) -> None:
    """RM-Bench asks 18 times about it in both orders, in a row."""
    dataset = load_rm_bench(rm_bench_folder(tmp_path / "data", chat=6))

    def answer(request: dict[str, Any], _: int) -> ServerReply:
        if "Question 3?" in request["messages"][-1]["content"]:
            return ServerReply(status=500, body={"error": {"message": "crash"}})
        return ServerReply(verdict("A"))

    with serving(answer) as server:
        config = EndpointConfig(
            model="m", base_url=server.url, key_variable="", retries=0, concurrency=1
        )
        for _ in range(2):
            with pytest.raises(ValueError, match=r"18 judgments are missing: .*`rmr1 score`"):
                run(dataset, tmp_path / "j.jsonl", RemoteModel(config), both_orders=True)
            assert len(rows_of(tmp_path / "j.jsonl")) == 5 * 18


def test_an_endpoint_that_is_down_ends_the_run_early(tmp_path: Path) -> None:
    dataset = rewardbench(tmp_path, 40)
    down = ServerReply(status=500, body={"error": {"message": "down"}})
    with serving(lambda *_: down) as server:
        config = EndpointConfig(
            model="m", base_url=server.url, key_variable="", retries=0, concurrency=1
        )
        with pytest.raises(ValueError, match="30 requests in a row failed, the last with HTTP 500"):
            run(dataset, tmp_path / "j.jsonl", RemoteModel(config), batch_size=4)
        assert len(server.requests) == 30
    assert rows_of(tmp_path / "j.jsonl") == []


def test_other_data_in_the_same_file_are_refused(tmp_path: Path) -> None:
    """They would be scored as one."""
    first = rewardbench(tmp_path, 4)
    other = load_rewardbench(
        write_json(tmp_path / "other.json", [rewardbench_row(f"x{number}") for number in range(3)])
    )
    run(first, tmp_path / "j.jsonl", limit=2)
    with pytest.raises(ValueError, match="line 1: a judgment of what is not in these data"):
        run(other, tmp_path / "j.jsonl")
    done = run(first, tmp_path / "j.jsonl", both_orders=True)
    assert (done.judgments, done.resumed) == (8, 2)
    # One order and a few items of what is there: nothing new, and nothing refused.
    assert run(first, tmp_path / "j.jsonl", limit=1).resumed == 1


@pytest.mark.parametrize(
    "content",
    [b'[{"a": 1}, {"a": 2}]', b"PAR1\x15\x04 a parquet file PAR1", b'{\n "a": [1,\n 2]\n}'],
)
def test_a_file_of_another_kind_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    output = tmp_path / "mine.json"
    output.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.json: this is no file of judgments"):
        run(rewardbench(tmp_path), output)
    assert output.read_bytes() == content


def test_nothing_to_judge(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no items"):
        run(Dataset("rmb", ()), tmp_path / "j.jsonl")


def test_model_id_follows_the_weights(tmp_path: Path) -> None:
    model = tmp_path / "step-000010"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    weights = bytearray(3 << 20)
    (model / "model.safetensors").write_bytes(weights)
    first = model_id(model)
    assert first.startswith("step-000010@")
    (model / "notes.txt").write_text("not part of it", encoding="utf-8")
    assert model_id(model) == first
    weights[-1] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert model_id(model) != first
    with pytest.raises(ValueError, match="no such folder"):
        model_id(tmp_path / "absent")


def test_a_repeated_id_stays_two_items(tmp_path: Path) -> None:
    rows = [rm_bench_row(5), rm_bench_row(5, prompt="Another?")]
    write_json(tmp_path / "math_filtered.json", rows)
    done = run(load_rm_bench(tmp_path), tmp_path / "j.jsonl")
    assert done.score["n"] == 18
    assert done.to_json()["repeated_ids"] == 1
