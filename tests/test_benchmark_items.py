"""The benchmarks' files become items, whatever their format; pairs get balanced placements."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_judges import (
    LISTS,
    Judge,
    rewardbench_row,
    rm_bench_folder,
    rm_bench_row,
    rmb_list,
    rmb_pair,
    run,
    verdict,
    write_json,
)

from rmr1.evals.benchmark_items import Contest, Dataset, Item, plan
from rmr1.evals.judgment_rows import Benchmark
from rmr1.evals.rewardbench_items import load_rewardbench
from rmr1.evals.rm_bench_items import load_rm_bench
from rmr1.evals.rmb_items import load_rmb
from rmr1.evals.score import score_file

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "rm-bench"
real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the RM-Bench files (../shared/data/rm-bench) are not on this machine"
)
LOADERS: dict[str, Callable[[Any], Dataset]] = {
    "rewardbench": load_rewardbench, "rm-bench": load_rm_bench, "rmb": load_rmb,
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "rewardbench": rewardbench_row(1), "rm-bench": rm_bench_row(1, domain="chat"),
    "rmb": rmb_pair("1"),
}  # fmt: skip


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("benchmark", LOADERS)
def test_json_jsonl_and_parquet_read_alike(tmp_path: Path, benchmark: str) -> None:
    name, row = {"rmb": "pair_uid"}.get(benchmark, "id"), ROWS[benchmark]
    rows = [{**row, name: str(number)} for number in range(3)]
    load = LOADERS[benchmark]
    found = load(jsonl(tmp_path / "a.jsonl", rows))
    assert found == load(write_json(tmp_path / "a.json", rows))
    assert found == load(parquet(tmp_path / "a.parquet", rows))
    assert [item.id for item in found.items] == ["0", "1", "2"]
    text = (tmp_path / "a.json").read_bytes()
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert load(tmp_path / "mark.json") == found


def test_what_a_rewardbench_row_becomes(tmp_path: Path) -> None:
    rows = [rewardbench_row(7, "hep-go"), rewardbench_row(7, "donotanswer")]
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    rows.append(rewardbench_row(8, "mt-bench-med", prompt=turns, chosen=""))
    found = load_rewardbench(write_json(tmp_path / "r.json", rows))
    assert [(item.part, item.id, item.kind) for item in found.items] == [
        ("hep-go", "7", "reasoning"), ("donotanswer", "7", "chat"), ("mt-bench-med", "8", "chat"),
    ]  # fmt: skip
    assert found.items[0].contests[0].fields == {"id": 7, "subset": "hep-go"}
    assert [turn["role"] for turn in found.items[2].conversation] == ["user", "assistant", "user"]
    assert len(found.missing) == 20
    assert "math-prm" in found.missing


def test_of_a_rewardbench_folder_the_filtered_files_count(tmp_path: Path) -> None:
    parquet(tmp_path / "raw-00000-of-00001.parquet", [rewardbench_row(n) for n in range(5)])
    parquet(tmp_path / "filtered-00000-of-00001.parquet", [rewardbench_row(n) for n in range(2)])
    assert len(load_rewardbench(tmp_path).items) == 2


def test_what_an_rmb_tree_becomes(tmp_path: Path) -> None:
    code = "Pairwise_set/Helpfulness/Code/Documentation"
    write_json(tmp_path / f"{code}.json", [rmb_pair("3", code), rmb_pair("4", code)])
    same = {"conversation_input": rmb_pair("3")["conversation_input"]}
    write_json(tmp_path / f"{LISTS}.json", [rmb_list("3", 2), rmb_list("9", 4, **same)])
    found = load_rmb(tmp_path)
    lists, pairs = found.items[:2], found.items[2:]
    assert [len(item.contests) for item in found.items] == [2, 4, 1, 1]
    assert [item.kind for item in found.items] == ["chat", "chat", "reasoning", "reasoning"]
    assert lists[1].contests[3].fields == {
        "id": "9/3", "set": "bon", "category_path": LISTS, "bon_uid": "9", "losers": 4,
    }  # fmt: skip
    assert pairs[0].contests[0].fields == {"id": "3", "set": "pairwise", "category_path": code}
    assert lists[0].cluster == lists[1].cluster == pairs[0].cluster != pairs[1].cluster
    assert pairs[0].conversation == ({"role": "user", "content": "Question 3?"},)
    assert found.missing == ("pairwise harmlessness", "bon helpfulness")


def test_total_dataset_names_its_domains(tmp_path: Path) -> None:
    rows = [rm_bench_row(1, domain="math"), rm_bench_row(1, domain="safety-refuse")]
    file = write_json(tmp_path / "total_dataset.json", rows)
    for data in (tmp_path, file):
        found = load_rm_bench(data)
        assert [item.part for item in found.items] == ["math", "safety-refuse"]
        assert found.missing == ("chat", "code", "safety-response")
        assert [item.kind for item in found.items] == ["reasoning", "chat"]
    alone = rm_bench_folder(tmp_path / "one", math=2) / "math_filtered.json"
    assert [item.part for item in load_rm_bench(alone).items] == ["math", "math"]


@pytest.mark.parametrize("benchmark", LOADERS)
def test_a_repeated_id_gets_a_number(tmp_path: Path, benchmark: str) -> None:
    found = LOADERS[benchmark](write_json(tmp_path / "a.json", [ROWS[benchmark]] * 3))
    assert [item.id for item in found.items] == ["1", "1#2", "1#3"]
    assert found.repeated_ids == 2
    keys = {showing.key for item in plan(found, seed=0) for showing in item}
    assert len(keys) == sum(len(item.contests) for item in found.items)


BAD_ROWS = [
    ("rewardbench", ROWS["rmb"], r'no field "prompt"; found category_path, chosen, .*, wanted pro'),
    ("rewardbench", {"text": "x"}, r'no field "prompt"; found text, wanted prompt, chosen, reject'),
    ("rewardbench", {}, r'no field "prompt"; found nothing'),
    ("rewardbench", rewardbench_row(1, "hep-perl"), r'field "subset" must be one of .*\'hep-perl'),
    ("rewardbench", rewardbench_row(1, chosen=None), r'field "chosen" must be a text, got None'),
    ("rewardbench", rewardbench_row(None), r'field "id" must be a text or a whole number'),
    ("rewardbench", rewardbench_row(1, prompt=""), r'field "prompt" must be a non-empty text'),
    ("rewardbench", rewardbench_row(1, prompt=["x"]), r'field "prompt\[0\]" must be a message'),
    ("rewardbench", rewardbench_row(1, rejected="\ud83d"), r'"rejected" holds half a surrogate'),
    ("rm-bench", rm_bench_row(1), r'no field "domain"; found chosen, error_key, .*, wanted id, p'),
    ("rm-bench", rm_bench_row(1, domain="poetry"), r'field "domain" must be one of'),
    ("rm-bench", rm_bench_row(1, domain="chat", chosen=["a"]), r'"chosen" must be .* got 1 entr'),
    ("rm-bench", rm_bench_row(1, domain="chat", rejected="abc"), r"\"rejected\" must .* got 'abc"),
    ("rm-bench", rm_bench_row(1, domain="chat", chosen=["a", "b", 3]), r'field "chosen\[2\]" must'),
    ("rm-bench", rm_bench_row(1, domain="chat", prompt=" "), r'field "prompt" must be a non-empty'),
    ("rm-bench", rm_bench_row(1, domain="chat", prompt="\ud83d"), r'"prompt" holds half a surrog'),
    ("rmb", ROWS["rewardbench"], r'no field "pair_uid"; found chosen, .*, wanted pair_uid, conver'),
    ("rmb", rmb_pair("1", "Pairwise_set/S1"), r'"category_path" must hold one of the steps Helpf'),
    ("rmb", rmb_pair("1", chosen="text"), r'"chosen" must hold an "answer", found \'text'),
    ("rmb", rmb_pair("1", reject={"text": "x"}), r'"reject" must hold an "answer", found text'),
    ("rmb", rmb_pair("1", conversation_input=[]), r'"conversation_input" must be a non-empty text'),
    ("rmb", rmb_list("1", 0), r'"loser_list" must be a list of at least one answer'),
    ("rmb", rmb_list("1", 2) | {"bon_best": {}}, r'"bon_best" must hold an "answer"'),
    ("rmb", {"bon_uid": "1"}, r'no field "conversation_input"; found bon_uid, wanted bon_uid, con'),
    ("rmb", ["x"], "an item must be a JSON object, got list"),
]


@pytest.mark.parametrize(("benchmark", "row", "message"), BAD_ROWS)
def test_a_bad_item_is_named(tmp_path: Path, benchmark: str, row: Any, message: str) -> None:
    path = write_json(tmp_path / "data.json", [ROWS[benchmark], row])
    with pytest.raises(ValueError, match=rf"data\.json, item 1: .*{message}"):
        LOADERS[benchmark](path)
    lines = "".join(json.dumps(one) + "\n" for one in (ROWS[benchmark], row))
    (tmp_path / "data.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: .*{message}"):
        LOADERS[benchmark](tmp_path / "data.jsonl")


@pytest.mark.parametrize("benchmark", LOADERS)
def test_bad_files_are_named(tmp_path: Path, benchmark: str) -> None:
    load, row = LOADERS[benchmark], ROWS[benchmark]
    path = tmp_path / "data.json"
    whole = json.dumps([row, row]).encode()
    for content, message in (
        (whole[:-30], r"data\.json, line 1: no JSON .*cut off"),
        (whole.replace(b"right", b"\xe9right", 1), r"data\.json, line 1: .*no UTF-8"),
        (whole.decode().encode("utf-16"), r"data\.json, line 1: the bytes are no UTF-8"),
        (b"[]", r"data\.json: it holds no items"),
        (b"", r"data\.json: it holds no items"),
        (b"[" * 100_000, r"data\.json, line 1: no JSON that can be read"),
        (b"{}", r'data\.json, line 1: no field "'),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(ValueError, match="absent: no such file"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: .*(no RM-Bench file; wanted|holds no \.jsonl)"):
        load(tmp_path / "empty")
    (tmp_path / "data.csv").write_text("id,prompt\n")
    with pytest.raises(ValueError, match=r"data\.csv: the name must end in \.jsonl"):
        load(tmp_path / "data.csv")


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "filtered.parquet", [ROWS["rewardbench"]] * 50)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"filtered\.parquet: no whole Parquet file"):
        load_rewardbench(path)


@pytest.mark.parametrize("benchmark", LOADERS)
def test_a_hub_name_is_streamed(monkeypatch: pytest.MonkeyPatch, benchmark: str) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, subset: str | None, **options: Any) -> Any:
        asked.append({"name": name, **options})
        if name == "nobody/nothing":
            raise ConnectionError("no route")
        return type("Streamed", (list,), {"info": SimpleNamespace(splits=None)})([ROWS[benchmark]])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    load = LOADERS[benchmark]
    assert len(load("some/data").items) == 1
    assert asked[0]["streaming"] is True
    assert asked[0]["split"] == {"rewardbench": "filtered"}.get(benchmark, "train")
    load("some/data:raw")
    assert (asked[1]["name"], asked[1]["split"]) == ("some/data", "raw")
    with pytest.raises(ValueError, match=r"nobody/nothing is no file or folder here.*no route"):
        load("nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'rmr1\[data\]'"):
        load("some/data")


# --- Placement -----------------------------------------------------------------------------------


def dataset(count: int, size: int = 9, *, part: str = "chat") -> Dataset:
    contests = tuple(Contest("good", "bad", {"id": k}) for k in range(size))
    return Dataset("rmb", tuple(Item(str(n), part, "", (), "chat", contests) for n in range(count)))


def labels(data: Dataset, seed: int, **options: Any) -> dict[str, str]:
    return {
        item[0].item.id: "".join(showing.label for showing in item)
        for item in plan(data, seed=seed, **options)
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_placement_is_balanced_in_every_cell(seed: int, size: int) -> None:
    placed = labels(dataset(21, size), seed)
    for cell in range(size):
        assert sum(one[cell] == "A" for one in placed.values()) in (10, 11)  # of 21
    assert {one.count("A") for one in placed.values()} <= {size // 2, -(-size // 2)}


@pytest.mark.parametrize("limit", [1, 5, 10, 20])
@pytest.mark.parametrize("size", [1, 9])
def test_a_part_of_the_items_is_as_balanced(size: int, limit: int) -> None:
    """A judge that always says A must get no more from the first items than from all."""
    for seed in range(4):
        placed = labels(dataset(40, size), seed, limit=limit)
        for cell in range(size):
            said = sum(one[cell] == "A" for one in placed.values())
            assert said in (limit // 2, -(-limit // 2))


def test_placement_depends_on_seed_and_ids_alone() -> None:
    data = dataset(40)
    by_seed = {seed: labels(data, seed) for seed in range(6)}
    for seed, mine in by_seed.items():
        assert mine == labels(data, seed)
        backwards = Dataset("rmb", data.items[::-1])
        assert mine == labels(backwards, seed)
        few, more = labels(data, seed, limit=7), labels(data, seed, limit=20)
        assert few.items() <= more.items() <= mine.items()
        assert (len(few), len(more)) == (7, 20)
        both = labels(data, seed, both_orders=True)
        assert {name: one[::2] for name, one in both.items()} == mine
        for other in range(seed):
            # Two seeds agree on a cell half of the time: 180 of 360. Items come in pairs of
            # opposite patterns, which agree together: a standard deviation of about 13.
            theirs = by_seed[other]
            agree = sum(a == b for n in mine for a, b in zip(mine[n], theirs[n], strict=True))
            assert 180 - 54 < agree < 180 + 54
    share: Counter[int] = Counter()
    for seed in range(300):  # over seeds each cell of an item is A half of the time
        share.update(k for k, label in enumerate(labels(dataset(2), seed)["0"]) if label == "A")
    assert all(150 - 40 < share[k] < 150 + 40 for k in range(9))


def test_what_is_shown_follows_the_label() -> None:
    (first, second), *_ = plan(dataset(1, 1), seed=0, both_orders=True)
    shown = {one.label: (one.pair().answer_a, one.pair().answer_b) for one in (first, second)}
    assert shown == {"A": ("good", "bad"), "B": ("bad", "good")}
    assert (first.order, second.order) == (1, 2)
    assert first.content == second.content


# --- The files of RM-Bench that are here ---------------------------------------------------------


@real_data
def test_the_real_files() -> None:
    found = load_rm_bench(REAL)
    assert Counter(item.part for item in found.items) == {
        "chat": 129, "safety-refuse": 284, "safety-response": 157,
    }  # fmt: skip
    assert found.missing == ("math", "code")
    planned = [showing for item in plan(found, seed=0) for showing in item]
    assert len({showing.key for showing in planned}) == len(planned) == 570 * 9
    assert all(one.pair().answer_a and one.pair().answer_b for one in planned)


@real_data
def test_real_items_judged_and_rescored(tmp_path: Path) -> None:
    def likes_short(first: str, second: str, sample: int) -> str:
        return verdict("A" if len(first) < len(second) else "B")

    benchmark: Benchmark = "rm-bench"
    done = run(load_rm_bench(REAL), tmp_path / "j.jsonl", Judge(likes_short), limit=20)
    assert done.judgments == 3 * 20 * 9
    again = score_file(done.output, benchmark)
    assert again == done.score
    assert set(again["missing"]) == {"math", "code"}
    # Who likes it short is right when style argues for the wrong answer, and wrong otherwise.
    assert again["hard"] > 0.9
    assert again["easy"] < 0.2
