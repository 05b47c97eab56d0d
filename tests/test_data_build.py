"""`rmr1 data build`: what is dropped and why, sides that tell nothing, whole files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rmr1.data import Message, Pair, read_pairs, write_pairs
from rmr1.datasets.build import build
from rmr1.datasets.build_config import BuildConfig
from rmr1.datasets.build_report import BuildReport
from rmr1.prompts import SHIPPED_PROMPTS, load_prompt
from rmr1.terminal import Phase

RECIPES = Path(__file__).parent.parent / "recipes"
RM_BENCH = Path(__file__).parent.parent.parent / "shared" / "data" / "rm-bench"


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def quiet(title: str, total: int, unit: str) -> Any:
    return nullcontext(Phase(title, total, unit))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def skywork(n: int, source: str = "helpsteer2", **change: Any) -> dict[str, Any]:
    """A row; every third has a conversation of several turns."""
    turns = [user(f"Question {n}?")]
    if n % 3 == 0:
        turns = [user("Hello"), {"role": "assistant", "content": "Hi"}, *turns]
    rows: dict[str, Any] = {
        side: [*turns, {"role": "assistant", "content": f"{side[0]}nswer {n} " + "x" * (n % 7)}]
        for side in ("chosen", "rejected")
    }
    return rows | {"source": source} | change


def write_jsonl(path: str, rows: list[Any]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(**sections: Any) -> BuildConfig:
    """One Skywork source in rows.jsonl, unless the test has others."""
    one = {"path": "rows.jsonl", "format": "skywork", "kind": "chat"}
    sources = sections.pop("sources", {"sky": one | sections.pop("source", {})})
    return BuildConfig.model_validate({"sources": sources, **sections})


def run(**sections: Any) -> BuildReport:
    return build(config(**sections), show=quiet)


def total(report: BuildReport, reason: str) -> int:
    return sum(counts.dropped.get(reason, 0) for counts in report.sources.values())


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


# --- Sides --------------------------------------------------------------------------------------


def many(count: int) -> None:
    write_jsonl("rows.jsonl", [skywork(n, f"source-{n % 5}") for n in range(count)])


def test_sides_are_balanced_in_every_source_and_set() -> None:
    many(503)
    output = {"distill": "distill.jsonl"}
    for inside in (False, True):
        report = run(split={"distill": 101, "distill_in_rl": inside}, output=output)
        rl, distill = read_pairs("rl.jsonl"), read_pairs("distill.jsonl")
        assert (len(distill), len(rl)) == (101, 503 if inside else 402)
        assert report.labels["rl"] == dict(Counter(pair.label for pair in rl))
        assert bool({pair.id for pair in rl} & {pair.id for pair in distill}) == inside
        for pairs in (rl, distill):
            for source in {pair.source for pair in pairs}:
                sides = Counter(pair.label for pair in pairs if pair.source == source)
                assert abs(sides["A"] - sides["B"]) <= 1
                better = {("A", "c"), ("B", "r")}  # the label is where the chosen answer is
                assert {(pair.label, pair.answer_a[0]) for pair in pairs} == better


def test_sides_and_sets_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = [skywork(n, f"source-{n % 5}") for n in range(200)]
    split = {"split": {"distill": 50}, "output": {"distill": "d.jsonl"}}
    made = []
    for order in (rows, rows[::-1]):
        write_jsonl("rows.jsonl", order)
        run(**split)
        made.append((read_pairs("rl.jsonl"), read_pairs("d.jsonl")))
    assert made[0] == made[1]
    run(**split, seed=1)
    assert read_pairs("rl.jsonl") != made[0][0]


def features(pair: Pair, place: int) -> dict[str, object]:
    """What a lazy judge could go by: everything but the answers' words."""
    prompt = load_prompt("rubric").render(pair)[-1]["content"]
    return {
        "place": place % 2,
        "place by four": place % 4,
        "source": pair.source,
        "turns": len(pair.conversation),
        "id": pair.id[-1],
        "speakers": tuple(re.findall(r"^(\w+(?: \w)?): ", prompt, re.MULTILINE)),
        "first line": prompt.split("\n")[0],
        "kind": pair.kind,
    }


def test_a_classifier_by_any_feature_is_right_half_of_the_time() -> None:
    many(2000)
    run()
    pairs = read_pairs("rl.jsonl")
    rows = [features(pair, place) for place, pair in enumerate(pairs)]
    noise = 4 * 0.5 / (len(pairs) / 2) ** 0.5
    for name in rows[0]:
        # The majority of the first half of each value is the guess for the second half.
        seen: dict[object, Counter[str]] = {}
        half = len(pairs) // 2
        for row, pair in zip(rows[:half], pairs[:half], strict=True):
            seen.setdefault(row[name], Counter())[pair.label] += 1
        right = [
            seen[row[name]].most_common(1)[0][0] == pair.label
            for row, pair in zip(rows[half:], pairs[half:], strict=True)
            if row[name] in seen
        ]
        assert abs(sum(right) / len(right) - 0.5) < noise, name


@pytest.mark.parametrize("style", SHIPPED_PROMPTS)
def test_a_prompt_with_its_texts_blanked_is_the_same_for_both_labels(style: str) -> None:
    many(60)
    run()
    prompt = load_prompt(style)
    shown: dict[int, set[str]] = {}
    labels: dict[int, set[str]] = {}
    for pair in read_pairs("rl.jsonl"):
        blank: tuple[Message, ...] = tuple(
            {"role": turn["role"], "content": "…"} for turn in pair.conversation
        )
        empty = Pair("", "", blank, "…", "…", pair.label, pair.kind)
        text = json.dumps(prompt.render(empty))
        shown.setdefault(len(blank), set()).add(text)
        labels.setdefault(len(blank), set()).add(pair.label)
    assert set(shown) == {1, 3}
    for turns, texts in shown.items():
        assert labels[turns] == {"A", "B"}
        assert len(texts) == 1


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
        "source source-2 has 10 rows, expected 11",
        "source source-9 has 0 rows, expected 1",
        "sources.sky.drop names 'source-7', which no row has",
        "the RL set has 50 pairs, expected 51",
    ]
    Path("rl.jsonl").write_text("old")
    with pytest.raises(ValueError, match=r"has 10 rows, expected 11 \(and 3 more\); nothing is wr"):
        run(source=expect, split={"expect_rl": 51}, strict=True)
    assert Path("rl.jsonl").read_text() == "old"
    assert run(source={"expect": {"source-1": 10}}, strict=True).mismatches == []


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
    with pytest.raises(ValueError, match="no pair is left after the filters"):
        run()


# --- Files --------------------------------------------------------------------------------------


def test_parquet_in_and_out_is_the_same() -> None:
    rows = [skywork(n) for n in range(300)]
    write_jsonl("rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    run()
    run(source={"path": "rows.parquet"}, output={"rl": "rl.parquet"})
    assert read_pairs("rl.parquet") == read_pairs("rl.jsonl")


@pytest.mark.parametrize("at", ["Read sky", "Write distill.jsonl", "Write rl.jsonl"])
def test_an_interrupted_build_leaves_the_old_files(at: str) -> None:
    many(50)
    files = {
        "distill": "distill.jsonl",
        "rl": "rl.jsonl",
        "dropped": "no.jsonl",
        "report": "r.json",
    }
    for path in files.values():
        Path(path).write_text("old")

    def stop(title: str, total: int, unit: str) -> Any:
        if title == at:
            raise KeyboardInterrupt
        return quiet(title, total, unit)

    with pytest.raises(KeyboardInterrupt):
        build(config(split={"distill": 9}, output=files), show=stop)
    assert {Path(path).read_text() for path in files.values()} == {"old"}
    assert sorted(path.name for path in Path().iterdir()) == sorted([*files.values(), "rows.jsonl"])


MEASURE = """
import re
from contextlib import nullcontext
from rmr1.datasets.build import build
from rmr1.datasets.build_config import BuildConfig
from rmr1.terminal import Phase
config = BuildConfig.model_validate({
    "sources": {"a": {"path": "rows.jsonl", "format": "trl", "kind": "chat"}},
    "filters": {"near_duplicates": 0.9, "similar_by": "conversation"},
    "split": {"distill": 10}, "output": {"rl": "rl.jsonl", "distill": "d.jsonl"},
})
report = build(config, show=lambda *a: nullcontext(Phase(*a)))
# Not ru_maxrss: that begins with what the parent held when it forked.
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
print(sum(report.sets["rl"].values()), int(peak) // 1024)
"""


def test_memory_does_not_grow_with_the_data() -> None:
    used = []
    for count in (100, 2000):
        rows = [
            {"prompt": f"{n} {n**3} {n**5}", "chosen": f"{n} " * 1500, "rejected": f"{n}\n" * 1500}
            for n in range(1000, 1000 + count)
        ]  # 15 kB each, 30 MB in the end
        write_jsonl("rows.jsonl", rows)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        )
        kept, megabytes = map(int, done.stdout.split())
        assert kept == count - 10
        used.append(megabytes)
    assert used[1] - used[0] < 12, used  # SQLite's cache is 8
