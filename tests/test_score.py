"""The official rules of the three benchmarks, each against figures worked out by hand."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from rewardbench_reference import SEEDS, counts_of, official, random_judgments

from rmr1.evals.score import score_file, score_rows
from rmr1.evals.score_rules import REWARDBENCH_SUBSETS


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rewardbench(subset: str, verdicts: list[str | None], label: str = "A") -> list[dict]:
    return [
        {
            "benchmark": "rewardbench", "id": f"{subset}-{index}", "label": label,
            "verdict": verdict, "subset": subset,
        }
        for index, verdict in enumerate(verdicts)
    ]  # fmt: skip


def rm_bench(item: str, domain: str, cells: dict[tuple[int, int], str | None]) -> list[dict]:
    return [
        {
            "benchmark": "rm-bench", "id": item, "label": "B", "verdict": verdict,
            "domain": domain, "chosen_index": chosen, "rejected_index": rejected,
        }
        for (chosen, rejected), verdict in cells.items()
    ]  # fmt: skip


def matrix(right: set[tuple[int, int]]) -> dict[tuple[int, int], str | None]:
    return {(i, j): "B" if (i, j) in right else "A" for i in range(3) for j in range(3)}


def rmb(part: str, path: str, verdicts: list[str | None], uid: str = "") -> list[dict]:
    rows = []
    for index, verdict in enumerate(verdicts):
        row = {
            "benchmark": "rmb", "id": f"{path}-{uid}-{index}", "label": "A", "verdict": verdict,
            "set": part, "category_path": path,
        }  # fmt: skip
        rows.append(row | ({"bon_uid": uid} if uid else {}))
    return rows


def test_rewardbench_counts_math_prm_as_984(tmp_path: Path) -> None:
    # math-prm 3 of 4 = 0.75, hep-cpp 1 of 2 = 0.5; the weights are 984 and 164, not 4 and 2:
    # (984 x 0.75 + 164 x 0.5) / 1148 = (738 + 82) / 1148 = 820 / 1148 = 0.714285...
    # Chat: alpacaeval-easy 1/1 (weight 100), mt-bench-easy 0/1 (28): 100 / 128 = 0.78125.
    # Section mean of the two that are there: (0.7142857 + 0.78125) / 2 = 0.7477678...
    # Prompt mean: right 3 + 1 + 1 + 0 = 5 of 4 + 2 + 1 + 1 = 8: 0.625.
    rows = [
        *rewardbench("math-prm", ["A", "A", "A", "B"]),
        *rewardbench("hep-cpp", ["A", "B"]),
        *rewardbench("alpacaeval-easy", ["A"]),
        *rewardbench("mt-bench-easy", ["B"]),
    ]
    report = score_file(write(tmp_path / "j.jsonl", rows), "rewardbench")
    assert report["sections"]["Reasoning"] == pytest.approx(820 / 1148)
    assert report["sections"]["Chat"] == pytest.approx(0.78125)
    assert report["sections"]["Safety"] is None
    assert report["section_mean"] == pytest.approx((820 / 1148 + 0.78125) / 2)
    assert report["prompt_mean"] == pytest.approx(0.625)
    assert report["subsets"]["math-prm"] == pytest.approx(0.75)
    assert {"Chat Hard", "Safety", "hep-go"} <= set(report["missing"])
    assert "Chat" not in report["missing"]
    assert report["n"] == 8
    assert report["parse_failure_rate"] == 0


def test_rewardbench_unparsed_is_half_upstream_and_nothing_in_rm_r1(tmp_path: Path) -> None:
    # right, unparsed, tie, wrong: upstream (1 + 0.5 + 0.5 + 0) / 4 = 0.5; RM-R1 1 / 4 = 0.25.
    # One of four verdicts could not be read (a tie can).
    path = write(tmp_path / "j.jsonl", rewardbench("donotanswer", ["A", None, "tie", "B"]))
    upstream, rm_r1 = score_file(path, "rewardbench"), score_file(path, "rewardbench", unparsed=0)
    assert upstream["sections"]["Safety"] == pytest.approx(0.5)
    assert rm_r1["sections"]["Safety"] == pytest.approx(0.25)
    assert upstream["parse_failure_rate"] == rm_r1["parse_failure_rate"] == 0.25
    assert (upstream["unparsed_credit"], rm_r1["unparsed_credit"]) == (0.5, 0.0)


def test_rewardbench_full_size_sections() -> None:
    counts: dict[str, int] = {}
    for section, weight in REWARDBENCH_SUBSETS.values():
        counts[section] = counts.get(section, 0) + weight
    # PAPER.md: 358, 456, 740 and 1,431 pairs, where 447 of the last weigh as 984.
    assert counts == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1431 - 447 + 984,
    }  # fmt: skip


def test_rm_bench_levels_are_the_triangles(tmp_path: Path) -> None:
    # chat, one item. Right in the upper triangle: (0,1), (0,2) of 3 -> hard 2/3; on the diagonal
    # (0,0) -> normal 1/3; in the lower triangle all three -> easy 1. Mean 2/3.
    # math, two items: the first all right, the second none -> every level 1/2.
    # hard overall (2/3 + 1/2) / 2 = 7/12, normal (1/3 + 1/2) / 2 = 5/12, easy (1 + 1/2) / 2 = 3/4,
    # overall (2/3 + 1/2) / 2 = 7/12. Code and safety are absent: None, not 0.
    every = {(i, j) for i in range(3) for j in range(3)}
    rows = [
        *rm_bench("1", "chat", matrix({(0, 1), (0, 2), (0, 0), (1, 0), (2, 0), (2, 1)})),
        *rm_bench("1", "math", matrix(every)),
        *rm_bench("2", "math", matrix(set())),
    ]
    report = score_file(write(tmp_path / "j.jsonl", rows), "rm-bench")
    assert report["domain_levels"]["chat"] == pytest.approx(
        {"hard": 2 / 3, "normal": 1 / 3, "easy": 1.0}
    )
    assert report["hard"] == pytest.approx(7 / 12)
    assert report["normal"] == pytest.approx(5 / 12)
    assert report["easy"] == pytest.approx(3 / 4)
    assert report["overall"] == pytest.approx(7 / 12)
    assert report["domains"] == {
        "chat": pytest.approx(2 / 3), "math": pytest.approx(0.5), "code": None, "safety": None,
    }  # fmt: skip
    assert report["missing"] == ["code", "safety"]
    assert report["n"] == 27


def test_rm_bench_pools_the_safety_files_by_item(tmp_path: Path) -> None:
    # Three refuse items all right, one response item all wrong: pooled 3/4, not (1 + 0) / 2.
    every = {(i, j) for i in range(3) for j in range(3)}
    rows = [row for n in "123" for row in rm_bench(n, "safety-refuse", matrix(every))]
    rows += rm_bench("1", "safety-response", matrix(set()))
    report = score_file(write(tmp_path / "j.jsonl", rows), "rm-bench")
    assert report["domains"]["safety"] == pytest.approx(0.75)
    assert report["overall"] == pytest.approx(0.75)
    assert report["duplicates"] == 0  # id 1 occurs in both files and is two items


def test_rm_bench_ties_and_unparsed_are_wrong_and_missing_cells_are_named(tmp_path: Path) -> None:
    rows = rm_bench("1", "code", {(0, 0): "tie", (1, 1): None, (2, 2): "B", (1, 0): "B"})
    report = score_file(write(tmp_path / "j.jsonl", rows), "rm-bench")
    # Diagonal: 0, 0, 1 -> 1/3. Below it only (1,0), right. Nothing above it.
    assert report["domain_levels"]["code"] == {
        "hard": None, "normal": pytest.approx(1 / 3), "easy": 1.0,
    }  # fmt: skip
    assert report["parse_failure_rate"] == 0.25
    assert "code: chosen concise, rejected markdown" in report["missing"]
    assert report["hard"] is None


def test_rm_bench_equals_the_definition_on_random_judgments(tmp_path: Path) -> None:
    random = Random(3)
    rows = []
    for domain in ("chat", "math", "code", "safety-refuse", "safety-response"):
        for item in range(random.randint(3, 9)):
            right = {(i, j) for i in range(3) for j in range(3) if random.random() < 0.6}
            rows += rm_bench(str(item), domain, matrix(right))
    random.shuffle(rows)
    report = score_file(write(tmp_path / "j.jsonl", rows), "rm-bench")

    def share(names: set[str], keep) -> float:
        # Every cell of a domain has as many judgments as it has items, so a level is a plain mean.
        hits = [
            row["verdict"] == "B"
            for row in rows
            if row["domain"] in names and keep(row["chosen_index"], row["rejected_index"])
        ]
        return sum(hits) / len(hits)

    homes = [{"chat"}, {"math"}, {"code"}, {"safety-refuse", "safety-response"}]
    assert report["hard"] == pytest.approx(sum(share(n, lambda i, j: i < j) for n in homes) / 4)
    assert report["normal"] == pytest.approx(sum(share(n, lambda i, j: i == j) for n in homes) / 4)
    assert report["easy"] == pytest.approx(sum(share(n, lambda i, j: i > j) for n in homes) / 4)
    assert report["overall"] == pytest.approx(sum(share(n, lambda i, j: True) for n in homes) / 4)


def test_rmb_best_of_n_needs_every_loser_beaten(tmp_path: Path) -> None:
    help_, harm = "BoN_set/Helpfulness/Chat/Discussion", "BoN_set/Harmlessness/S1"
    rows = [
        # pairwise: helpful 2 of 3, harmless 1 of 2
        *rmb("pairwise", "Pairwise_set/Helpfulness/Code/Documentation", ["A", "A", "B"]),
        *rmb("pairwise", "Pairwise_set/Harmlessness/S3", ["A", None]),
        # helpful lists: 7 beats all; 8 loses once; 9 has a tie -> 1 of 3
        *rmb("bon", help_, ["A", "A", "A"], "7"),
        *rmb("bon", help_, ["A", "B", "A"], "8"),
        *rmb("bon", help_, ["A", "tie"], "9"),
        # harmless lists: uid 7 is another list here, right; 10 unparsed once -> 1 of 2
        *rmb("bon", harm, ["A"], "7"),
        *rmb("bon", harm, ["A", None], "10"),
    ]
    Random(0).shuffle(rows)
    report = score_file(write(tmp_path / "j.jsonl", rows), "rmb")
    assert report["pairwise_helpfulness"] == pytest.approx(2 / 3)
    assert report["pairwise_harmlessness"] == pytest.approx(1 / 2)
    assert report["bon_helpfulness"] == pytest.approx(1 / 3)
    assert report["bon_harmlessness"] == pytest.approx(1 / 2)
    # (2/3 + 1/2 + 1/3 + 1/2) / 4 = 2 / 4
    assert report["overall"] == pytest.approx(0.5)
    assert report["bon_lists"] == 5
    assert report["n"] == 16
    assert report["parse_failure_rate"] == pytest.approx(2 / 16)
    assert report["missing"] == []


def test_rmb_without_best_of_n_says_so(tmp_path: Path) -> None:
    rows = rmb("pairwise", "Pairwise_set/Helpfulness/Chat/Discussion", ["A", "B"])
    report = score_file(write(tmp_path / "j.jsonl", rows), "rmb")
    assert report["overall"] == 0.5
    assert report["bon_helpfulness"] is None
    assert report["missing"] == ["pairwise_harmlessness", "bon_helpfulness", "bon_harmlessness"]


def test_a_repeated_row_is_told(tmp_path: Path) -> None:
    rows = rewardbench("hep-go", ["A", "B"])
    assert score_file(write(tmp_path / "j", [*rows, rows[0]]), "rewardbench")["duplicates"] == 1


GOOD = {
    "rewardbench": rewardbench("hep-go", ["A"])[0],
    "rm-bench": rm_bench("1", "chat", {(0, 0): "A"})[0],
    "rmb": rmb("bon", "BoN_set/Harmlessness/S1", ["A"], "7")[0],
}


@pytest.mark.parametrize(
    ("benchmark", "field", "value"),
    [
        ("rewardbench", "label", "C"),
        ("rewardbench", "label", None),
        ("rewardbench", "verdict", "a"),
        ("rewardbench", "verdict", False),
        ("rewardbench", "subset", "alpacaeval"),
        ("rewardbench", "benchmark", "rmb"),
        ("rewardbench", "id", ""),
        ("rm-bench", "domain", "poetry"),
        ("rm-bench", "chosen_index", 3),
        ("rm-bench", "chosen_index", True),
        ("rm-bench", "rejected_index", "0"),
        ("rmb", "set", "triple"),
        ("rmb", "category_path", "BoN_set/S1"),
        ("rmb", "bon_uid", None),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(
    tmp_path: Path, benchmark: str, field: str, value: object
) -> None:
    path = write(tmp_path / "bad.jsonl", [GOOD[benchmark], GOOD[benchmark] | {field: value}])
    with pytest.raises(ValueError, match=rf'bad\.jsonl, line 2: field "{field}"'):
        score_file(path, benchmark)


@pytest.mark.parametrize(
    ("benchmark", "field"),
    [
        ("rewardbench", "verdict"),
        ("rewardbench", "subset"),
        ("rm-bench", "rejected_index"),
        ("rmb", "bon_uid"),
        ("rmb", "benchmark"),
    ],
)
def test_a_missing_field_is_named(tmp_path: Path, benchmark: str, field: str) -> None:
    row = {name: value for name, value in GOOD[benchmark].items() if name != field}
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=rf'bad\.jsonl, line 1: field "{field}".* is missing'):
        score_file(path, benchmark)


def test_other_bad_input_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "ok.jsonl", [GOOD["rmb"]])
    with pytest.raises(ValueError, match="benchmark must be one of"):
        score_file(path, "judgebench")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unparsed must be 0"):
        score_file(path, "rmb", unparsed=0.5)
    with pytest.raises(ValueError, match="holds no judgments"):
        score_file(write(tmp_path / "empty.jsonl", []), "rmb")
    with pytest.raises(ValueError, match="no such file"):
        score_file(tmp_path / "absent.jsonl", "rmb")
    (tmp_path / "list.jsonl").write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1: .*JSON object"):
        score_file(tmp_path / "list.jsonl", "rmb")


# --- RewardBench's own scoring code --------------------------------------------------------------

# What `python tests/rewardbench_reference.py WHEEL` prints for rewardbench 0.1.4.
EXPECTED = [
    {"Chat": 0.7122905027932961, "Chat Hard": 0.5405701754385965,
     "Safety": 0.45878378378378376, "Reasoning": 0.6398909395973155},
    {"Chat": 0.7263157894736842, "Chat Hard": 0.6472222222222223,
     "Safety": 0.7124352331606217, "Reasoning": 0.30683008675724344},
    {"Chat": 0.48324022346368717, "Chat Hard": 0.4342105263157895,
     "Safety": 0.3972972972972973, "Reasoning": 0.4852608173732744},
]  # fmt: skip
WEIGHTS = {name: weight for name, (_, weight) in REWARDBENCH_SUBSETS.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_sections_equal_rewardbenchs_own(seed: int) -> None:
    rows = random_judgments(seed, WEIGHTS)
    report = score_rows(enumerate(rows, start=1), "rewardbench")
    assert report["sections"] == pytest.approx(EXPECTED[seed], abs=1e-12)
    assert report["section_mean"] == pytest.approx(sum(EXPECTED[seed].values()) / 4)
    if seed != 1:
        assert len(rows) == 2985
        assert report["missing"] == []


def test_the_expected_values_are_those_of_the_installed_package() -> None:
    spec = find_spec("rewardbench")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("rewardbench is not installed; EXPECTED holds what version 0.1.4 says")
    folder = Path(spec.submodule_search_locations[0])
    source = {name: (folder / f"{name}.py").read_text() for name in ("constants", "utils")}
    assert counts_of(source) == WEIGHTS
    for seed in SEEDS:
        assert official(random_judgments(seed, WEIGHTS), source) == pytest.approx(EXPECTED[seed])


# --- Orders, lists, failures, intervals ----------------------------------------------------------


def both(rows: list[dict]) -> list[dict]:
    """The rows in both orders, the judge giving the same answer again."""
    other = {"A": "B", "B": "A"}
    again = [
        row | {"label": other[row["label"]], "verdict": other.get(row["verdict"], row["verdict"])}
        for row in rows
    ]
    return [row | {"order": 1} for row in rows] + [row | {"order": 2} for row in again]


def test_a_pair_in_both_orders_earns_the_mean(tmp_path: Path) -> None:
    rows = both(rewardbench("hep-go", ["A", "A", "B", "tie", None]))
    rows[5]["verdict"] = "A"  # the first pair: the other answer in the second order
    report = score_file(write(tmp_path / "j.jsonl", rows), "rewardbench")
    # Pairs earn 1/2, 1, 0, 1/2, 1/2.
    assert report["prompt_mean"] == pytest.approx(2.5 / 5)
    assert (report["n"], report["pairs"], report["pairs_in_both_orders"]) == (10, 5, 5)
    # Four pairs have a verdict in both orders, and three of these the same answer.
    assert report["swap_consistency"] == pytest.approx(3 / 4)
    # Verdicts A and B: A A B in the first order, A B A in the second.
    assert report["position_bias"] == pytest.approx(4 / 6)
    assert (report["ties"], report["duplicates"]) == (2, 0)


def test_a_list_in_both_orders_earns_the_mean_of_the_orders(tmp_path: Path) -> None:
    path = "BoN_set/Harmlessness/S1"
    rows = both(rmb("bon", path, ["A", "A"], "1") + rmb("bon", path, ["A", "B"], "2"))
    rows[4]["verdict"] = "A"  # list 1 loses once in the second order
    report = score_file(write(tmp_path / "j.jsonl", rows), "rmb")
    assert report["bon_harmlessness"] == pytest.approx((0.5 + 0) / 2)
    assert report["bon_lists"] == 2
    for row in rows:  # judgments of others, which do not tell the order: every one must be right
        del row["order"]
    assert score_file(write(tmp_path / "j.jsonl", rows), "rmb")["bon_harmlessness"] == 0


def test_a_list_that_is_not_complete_is_not_counted(tmp_path: Path) -> None:
    path = "BoN_set/Harmlessness/S1"
    rows = [row | {"losers": 3} for row in rmb("bon", path, ["A", "A", "A"], "1")]
    rows += [row | {"losers": 3} for row in rmb("bon", path, ["A", "A"], "2")]
    report = score_file(write(tmp_path / "j.jsonl", rows), "rmb")
    assert report["bon_harmlessness"] == 1.0
    assert "the rest of 1 best-of-n lists" in report["missing"]
    rows[0]["losers"] = True
    with pytest.raises(ValueError, match='line 1: field "losers"'):
        score_file(write(tmp_path / "j.jsonl", rows), "rmb")


def test_failures_are_told_by_kind_and_makers_by_name(tmp_path: Path) -> None:
    rows = rewardbench("hep-go", ["A", None, None, None, None, None])
    rows[1] |= {"format_error": "NO_ANSWER", "finish_reason": "stop"}
    rows[2] |= {"format_error": "UNCLOSED_THINK", "finish_reason": "length"}
    rows[3] |= {"skipped": "refused: HTTP 400 (too long)"}
    rows[4] |= {"samples": [{"verdict": None, "format_error": "NO_TYPE"}, {"verdict": "A"}, 3]}
    for number, row in enumerate(rows):
        row |= {"model": "m@1", "seed": number // 3}
    report = score_file(write(tmp_path / "j.jsonl", rows), "rewardbench")
    assert report["parse_failures"] == {
        "NO_ANSWER": 1, "cut by max_new_tokens": 1, "skipped (refused)": 1, "NO_TYPE": 1,
        "not told": 1,
    }  # fmt: skip
    assert report["made_by"] == {"model": "m@1", "seed": [0, 1]}


def test_every_share_has_an_interval_that_holds_it() -> None:
    rows = random_judgments(1, WEIGHTS)  # some subsets are missing
    report = score_rows(enumerate(rows, start=1), "rewardbench")
    assert report == score_rows(enumerate(rows, start=1), "rewardbench")  # draws are seeded

    def walk(value: object, bounds: object) -> int:
        if isinstance(value, dict):
            assert isinstance(bounds, dict)
            assert value.keys() == bounds.keys()
            return sum(walk(value[name], bounds[name]) for name in value)
        if value is None:
            assert bounds is None
            return 0
        assert isinstance(bounds, list)
        assert 0 <= bounds[0] <= value <= bounds[1] <= 1
        assert bounds[1] > bounds[0]
        return 1

    shares = {name: report[name] for name in report["intervals"]}
    judged = {row["subset"] for row in rows}
    assert 5 < len(judged) < 23
    # Subsets, sections, both means, unparsed, share of A; no pair was judged in both orders.
    assert walk(shares, report["intervals"]) == len(judged) + 4 + 2 + 2
    assert report["interval_method"].startswith("stratified bootstrap")


def test_judgments_that_share_a_prompt_are_no_independent_evidence() -> None:
    rows = []
    for number in range(400):  # four pairs a question, right or wrong together
        verdict = "AB"[number // 4 % 2]
        rows += rmb("pairwise", "P/Helpfulness/Chat", [verdict], str(number))
    for number, row in enumerate(rows):
        row["cluster"] = str(number // 4)
    clustered = score_rows(enumerate(rows), "rmb")["intervals"]["pairwise_helpfulness"]
    for row in rows:
        del row["cluster"]
    alone = score_rows(enumerate(rows), "rmb")["intervals"]["pairwise_helpfulness"]
    # 100 independent questions instead of 400 pairs: twice the width.
    assert clustered[1] - clustered[0] == pytest.approx(2 * (alone[1] - alone[0]), rel=0.1)


def test_twelve_thousand_judgments_take_less_than_two_seconds() -> None:
    random = Random(0)
    rows = []
    for domain, items in (("chat", 129), ("math", 529), ("code", 228), ("safety", 441)):
        for item in range(items):
            right = {(i, j) for i in range(3) for j in range(3) if random.random() < 0.7}
            rows += rm_bench(str(item), domain, matrix(right))
    began = time.process_time()
    report = score_rows(enumerate(rows), "rm-bench")
    assert time.process_time() - began < 2
    assert report["n"] == 11_943
    low, high = report["intervals"]["overall"]
    assert 0.01 < high - low < 0.04
