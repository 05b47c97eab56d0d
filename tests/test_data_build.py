"""`rmr1 data build`: what is dropped and why, which rows are taken, and what is expected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from data_builds import many, run, skywork, total, user, write_jsonl

from rmr1.data import Pair, read_pairs, write_pairs
from rmr1.datasets.build_report import BuildReport

RM_BENCH = Path(__file__).parent.parent.parent / "shared" / "data" / "rm-bench"


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


# --- Filters ------------------------------------------------------------------------------------


def answer(side: str, text: str) -> dict[str, Any]:
    return {side: [user("Why?"), {"role": "assistant", "content": text}]}


def test_every_reason_is_counted_and_listed() -> None:
    pair = answer("chosen", "Because.") | answer("rejected", "No idea.")
    alone = [{"role": "assistant", "content": "x"}]
    rows: list[tuple[str, Any]] = [
        ("", skywork(0)),
        ("", pair | {"source": "mine"}),
        ("repeated pair", pair | {"source": "mine"}),
        ("repeated, other label", {"chosen": pair["rejected"], "rejected": pair["chosen"]}),
        ("empty prompt", {s: [user(" \n"), *pair[s][1:]] for s in ("chosen", "rejected")}),
        ("empty answer", pair | answer("rejected", " \n")),
        ("identical answers", pair | answer("rejected", "Because. ")),
        ("stray token", pair | answer("rejected", "Well <im_start>assistant")),
        ("no user turn last", {"chosen": alone, "rejected": [{**alone[0], "content": "y"}]}),
        ("two conversations", pair | {"rejected": [user("When?"), *alone]}),
        ("no assistant turn last", pair | {"rejected": [user("Why?")]}),
    ]
    write_jsonl("rows.jsonl", [{"source": "mine", **row} for _, row in rows])
    report = run(
        filters={"stray_tokens": ["<im_start>"]}, output={"rl": "rl.jsonl", "dropped": "no.jsonl"}
    )
    wanted = Counter(reason for reason, _ in rows if reason)
    found = report.sources["mine"].dropped
    assert found == wanted
    assert [pair.source for pair in read_pairs("rl.jsonl")].count("mine") == 1
    listed = [json.loads(line) for line in Path("no.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in listed) == wanted
    assert listed[0]["row"] == "rows.jsonl, line 3"
    assert listed[0]["detail"] == next(p.id for p in read_pairs("rl.jsonl") if p.source == "mine")
    for counts in report.sources.values():  # nothing is lost
        assert counts.read == counts.left_out + counts.all_dropped + counts.not_drawn + counts.kept


def test_long_prompts_in_either_order(tiny_model: Path) -> None:
    long = {side: [user("0 " * 30), {"role": "assistant", "content": side}] for side in
            ("chosen", "rejected")}  # fmt: skip
    write_jsonl("rows.jsonl", [skywork(1), {**long, "source": "long"}])
    filters = {"max_prompt_tokens": 32, "model": str(tiny_model), "prompt_style": "compact"}
    report = run(filters=filters)
    assert report.sources["long"].dropped == {"prompt too long": 1}
    assert report.sources["helpsteer2"].kept == 1


def test_near_duplicates_go_and_the_first_stays() -> None:
    rng = Random(0)
    text = " ".join("".join(rng.choices("abcdefgh", k=6)) for _ in range(60))
    other = text[::-1]
    rows = [
        {"prompt": f"Say something about {topic}", "chosen": answer, "rejected": "no"}
        for topic, answer in (("cats", text), ("cats, please", text), ("Portugal", other))
    ]
    write_jsonl("rows.jsonl", rows)
    source = {"format": "trl"}
    assert run(source=source).sources["sky"].kept == 3
    assert run(source=source, filters={"near_duplicates": 0.8}).sources["sky"].dropped == {
        "near duplicate": 1
    }
    kept = {pair.conversation[0]["content"] for pair in read_pairs("rl.jsonl")}
    assert kept == {rows[0]["prompt"], rows[2]["prompt"]}
    by = {"near_duplicates": 0.8, "similar_by": "conversation"}
    assert run(source=source, filters=by).sources["sky"].kept == 3


@pytest.mark.skipif(not RM_BENCH.is_dir(), reason=f"{RM_BENCH} is not here")
def test_contaminated_pairs_are_listed_by_benchmark() -> None:
    item = json.loads((RM_BENCH / "chat_filtered.json").read_text())[5]
    bad = {"prompt": item["prompt"].upper(), "chosen": "a", "rejected": "b"}
    write_jsonl("rows.jsonl", [bad, {**bad, "prompt": "Something that no benchmark asks"}])
    report = run(
        source={"format": "trl"},
        contamination={"rm_bench": str(RM_BENCH)},
        output={"dropped": "no.jsonl"},
    )
    assert report.sources["sky"].dropped == {"in rm-bench": 1}
    assert report.benchmark_prompts["rm-bench"] > 500
    assert "chat_filtered.json, item 5 (100%)" in Path("no.jsonl").read_text()


def test_bad_rows_stop_the_build_or_are_counted() -> None:
    write_jsonl("rows.jsonl", [skywork(1), {"question": "x"}, skywork(2)])
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: no column chosen, .*found question"):
        run()
    report = run(bad_rows="drop")
    assert total(report, "bad row") == 1
    assert report.sources["helpsteer2"].kept == 2
    # A column `source` that is left out may hold anything.
    write_jsonl("rows.jsonl", [skywork(1), {"source": "junk"}])
    assert run(source={"drop": ["junk"]}).sources["junk"].left_out == 1


def test_damaged_lines_stop_the_build_or_are_counted() -> None:
    lines = [json.dumps(skywork(n)).encode() for n in range(20)]
    damaged = [b'{"source": "caf\xe9"}', b'{"source": "helpsteer2", "chosen": [']
    Path("rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines[:9], *damaged, *lines[9:]]))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 10: the bytes are no UTF-8"):
        run()
    # `keep` does not hide them: nobody can tell which source such a line is of.
    source = {"keep": ["helpsteer2"]}
    report = run(source=source, bad_rows="drop", output={"dropped": "no.jsonl"})
    assert report.sources["helpsteer2"].kept == 20
    assert report.sources["sky"].dropped == {"damaged line": 2}
    listed = [json.loads(line) for line in Path("no.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == ["rows.jsonl, line 10", "rows.jsonl, line 11"]
    assert "no UTF-8" in listed[0]["detail"]
    assert "no JSON" in listed[1]["detail"]


def test_half_a_character_in_an_id_is_a_bad_row() -> None:
    write_jsonl("rows.jsonl", [skywork(1), skywork(2, id="\ud800"), skywork(3, id=7)])
    with pytest.raises(ValueError, match=r'rows.jsonl, line 2: column "id" holds half a surrogate'):
        run()
    report = run(bad_rows="drop", output={"dropped": "no.jsonl"})
    assert total(report, "bad row") == 1
    assert "7" in {pair.id for pair in read_pairs("rl.jsonl")}
    assert "half a surrogate" in Path("no.jsonl").read_text()


def test_equal_ids_of_different_pairs_are_made_unique() -> None:
    pairs = [
        Pair("1", "mine", ({"role": "user", "content": f"q{n}"},), "a", "b", "A", "chat")
        for n in range(3)
    ]
    for number, pair in enumerate(pairs):
        write_pairs(f"{number}.jsonl", [pair])
    report = run(sources={f"s{n}": {"path": f"{n}.jsonl"} for n in range(3)})
    assert (report.sources["mine"].kept, report.sources["mine"].renamed) == (3, 2)
    ids = [pair.id for pair in read_pairs("rl.jsonl")]
    assert sorted(name.split("#")[0] for name in ids) == ["1"] * 3
    assert len(set(ids)) == 3


# --- Sources, counts, the split -----------------------------------------------------------------


def test_keep_drop_limit_and_sample() -> None:
    many(100)
    assert set(read(run(source={"drop": ["source-1"]}))) == {0, 2, 3, 4}
    assert set(read(run(source={"keep": ["source-1"]}))) == {1}
    report = run(source={"limit": 7})
    assert sum(counts.read for counts in report.sources.values()) == 7
    report = run(source={"sample": 30})
    assert sum(counts.kept for counts in report.sources.values()) == 30
    assert sum(counts.not_drawn for counts in report.sources.values()) == 70
    assert report.mismatches == []
    assert run(source={"sample": 101}).mismatches == [
        "sources.sky has 100 pairs left, too few for a sample of 101"
    ]


def read(report: BuildReport) -> Counter[int]:
    return Counter(int(pair.source[-1]) for pair in read_pairs("rl.jsonl"))


def test_a_sample_does_not_crowd_the_distillation_set() -> None:
    write_jsonl("rows.jsonl", [skywork(n, "whole") for n in range(400)])
    write_jsonl("more.jsonl", [skywork(n, "part") for n in range(400, 2400)])
    form = {"format": "skywork", "kind": "chat"}
    report = run(
        sources={
            "whole": {"path": "rows.jsonl", **form},
            "part": {"path": "more.jsonl", "sample": 400, **form},
        },
        split={"distill": 200},
        output={"distill": "d.jsonl"},
    )
    assert 70 <= report.sets["distill"]["part"] <= 130  # half of it; the deviation is 6


def test_expected_counts_warn_or_stop() -> None:
    many(50)
    expect = {"expect": {"source-1": 10, "source-2": 11, "source-9": 1}, "drop": ["source-7"]}
    report = run(source=expect, split={"expect_rl": 51})
    assert report.mismatches == [
        "source source-2 has 10 rows, expected 11 (sources.sky)",
        "source source-9 has 0 rows, expected 1 (sources.sky)",
        "sources.sky.drop names 'source-7', which no row has",
        "the RL set has 50 pairs, expected 51",
    ]
    Path("rl.jsonl").write_text("old")
    with pytest.raises(
        ValueError, match=r"expected 11 \(sources.sky\) \(and 3 more\); nothing is wr"
    ):
        run(source=expect, split={"expect_rl": 51}, strict=True)
    assert Path("rl.jsonl").read_text() == "old"
    assert run(source={"expect": {"source-1": 10}}, strict=True).mismatches == []


def test_each_source_is_compared_with_its_own_count() -> None:
    """Two sources of the config may bring rows of one value, and a third that expects nothing."""
    form = {"format": "skywork", "kind": "chat"}
    sources: dict[str, Any] = {}
    for name, rows in (("one", range(34)), ("two", range(34, 67)), ("rest", range(67, 70))):
        write_jsonl(f"{name}.jsonl", [skywork(n, "s0") for n in rows])
        sources[name] = {"path": f"{name}.jsonl", **form}
    sources["one"]["expect"], sources["two"]["expect"] = {"s0": 34}, {"s0": 33}
    report = run(sources=sources, strict=True)
    assert report.mismatches == []
    assert (report.sources["s0"].expected, report.sources["s0"].as_expected) == (67, True)
    sources["one"]["expect"], sources["two"]["expect"] = {"s0": 33}, {"s0": 34}
    report = run(sources=sources)
    assert report.mismatches == [
        "source s0 has 34 rows, expected 33 (sources.one)",
        "source s0 has 33 rows, expected 34 (sources.two)",
    ]
    assert not report.sources["s0"].as_expected


def traced(n: int) -> Pair:
    row = skywork(n)
    texts = [row[side][-1]["content"] for side in ("chosen", "rejected")]
    conversation = tuple(row["chosen"][:-1])
    return Pair(f"t{n}", "traced", conversation, *texts, "A", "chat", "because A")


def test_traced_pairs_are_distilled_and_kept_out_of_rl() -> None:
    many(30)
    write_pairs("traced.jsonl", [traced(n) for n in range(10)])
    sources = {
        "traced": {"path": "traced.jsonl"},
        "sky": {"path": "rows.jsonl", "format": "skywork", "kind": "chat"},
    }
    output = {"distill": "distill.jsonl"}
    report = run(sources=sources, output=output)
    assert total(report, "repeated pair") == 10
    assert {pair.trace for pair in read_pairs("distill.jsonl")} == {"because A"}
    assert {pair.label for pair in read_pairs("distill.jsonl")} == {"A"}  # a trace names sides
    assert len(read_pairs("rl.jsonl")) == 20
    assert not any(pair.trace for pair in read_pairs("rl.jsonl"))
    with pytest.raises(ValueError, match="the pair has a trace; name a file"):
        run(sources=sources)
    sources["traced"]["traces"] = False  # type: ignore[assignment]
    run(sources=sources)
    placed = [pair for pair in read_pairs("rl.jsonl") if pair.source == "traced"]
    assert Counter(pair.label for pair in placed) == {"A": 5, "B": 5}
    assert not any(pair.trace for pair in placed)


def test_nothing_left_is_an_error() -> None:
    write_jsonl("rows.jsonl", [answer("chosen", "a") | answer("rejected", "a") | {"source": "s"}])
    told = r"no pair is left after the filters \(most are dropped as: identical answers\)"
    with pytest.raises(ValueError, match=told):
        run()
    many(10)
    told = r"no pair is left .*; sources.sky.keep has 'sorce-1', 'x', and no row .*; nothing is wri"
    with pytest.raises(ValueError, match=told):
        run(source={"keep": ["sorce-1", "x"]})
