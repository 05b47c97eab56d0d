"""`rmr1 data build`: sides and sets that tell nothing and depend on nothing but the pairs."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from data_builds import many, run, skywork, write_jsonl

from rmr1.data import Message, Pair, read_pairs
from rmr1.prompts import SHIPPED_PROMPTS, load_prompt


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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


def sides_by_question(path: str) -> dict[str, tuple[str, str]]:
    """Question -> the better side and the answer there."""
    return {
        pair.conversation[-1]["content"]: (pair.label, pair.answer_a) for pair in read_pairs(path)
    }


def test_nor_do_they_where_ids_collide() -> None:
    """The second pair of an id gets another name, which must not give it another side."""
    rows = [skywork(n, id=n % 20) for n in range(200)]
    made = []
    for order in (rows, rows[::-1]):
        write_jsonl("rows.jsonl", order)
        run(split={"distill": 50}, output={"distill": "d.jsonl"})
        made.append([sides_by_question(path) for path in ("rl.jsonl", "d.jsonl")])
    assert made[0] == made[1]


def test_small_sources_are_balanced_together() -> None:
    """One pair of each source: a side for each by itself would be 200 tosses of a coin."""
    rows = [skywork(n, f"https://example.org/{n % 400}") for n in range(400)]
    rows += [skywork(n, "large") for n in range(400, 501)]
    made = []
    for order in (rows, rows[::-1]):
        write_jsonl("rows.jsonl", order)
        run(split={"distill": 51}, output={"distill": "d.jsonl"})
        made.append([read_pairs("rl.jsonl"), read_pairs("d.jsonl")])
    assert made[0] == made[1]
    for pairs in made[0]:
        for large in (False, True):
            sides = Counter(pair.label for pair in pairs if (pair.source == "large") == large)
            assert abs(sides["A"] - sides["B"]) <= 1, sides


def test_a_small_source_is_balanced_too() -> None:
    write_jsonl("rows.jsonl", [skywork(n, f"source-{n % 10}") for n in range(80)])
    run(split={"distill": 20}, output={"distill": "d.jsonl"})
    for path in ("rl.jsonl", "d.jsonl"):
        found = Counter((pair.source, pair.label) for pair in read_pairs(path))
        for source in {name for name, _ in found}:
            assert abs(found[source, "A"] - found[source, "B"]) <= 1


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
