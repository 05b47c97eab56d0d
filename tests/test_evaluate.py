"""Evaluation: the figures of hand-made judgments, and a run over pairs with a fake generator."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from rmr1.answers import LocalModel
from rmr1.data import Pair
from rmr1.engine.generator import Rollout, SamplingParams
from rmr1.evaluate import Evaluation, compare, evaluate_pairs, summarise
from rmr1.judge import Judgment
from rmr1.prompts import load_prompt
from rmr1.statistics import wilson

GREEDY = SamplingParams(n=1, temperature=0.0, max_new_tokens=16, seed=7)


def two(name: str, ab: str | None, ba: str | None, source: str = "tasks/x") -> list[Judgment]:
    """Both placements of a pair whose label is A as it stands (and so B when exchanged)."""
    return [
        Judgment(name, source, "chat", "A", ab, "ab", new_tokens=10, format_error="OK"),  # type: ignore[arg-type]
        Judgment(name, source, "chat", "B", ba, "ba", new_tokens=20, format_error="OK"),  # type: ignore[arg-type]
    ]


def summed(*pairs: list[Judgment]) -> Evaluation:
    return summarise([one for pair in pairs for one in pair], prompt_hash="abc", seed=0)


def test_figures_by_hand() -> None:
    found = summed(
        two("1", "A", "B"),  # right twice, consistent
        two("2", "A", "A", "tasks/y"),  # right once, goes by position
        two("3", "B", None, "tasks/y"),  # wrong, unparsed
        two("4", "B", "A"),  # wrong twice, consistently
    )
    # Right: 2 + 1 + 0 + 0 = 3 of 8 judgments; parsed 7; pairs parsed twice: 1, 2, 4, of which
    # 1 and 4 name the same answer twice. Verdicts A: pair 1 one, pair 2 two, pair 4 one = 4 of 7.
    assert found.figures.accuracy == pytest.approx(3 / 8)
    assert found.figures.accuracy_parsed == pytest.approx(3 / 7)
    assert found.figures.parse_rate == pytest.approx(7 / 8)
    assert (found.figures.n, found.figures.judgments) == (4, 8)
    assert found.swap_consistency == pytest.approx(2 / 3)
    assert found.position_bias == pytest.approx(4 / 7)
    assert found.mean_completion_length == pytest.approx(15)
    # Variance of the mean over clusters: hits - 3/8 x 2 = 1.25, 0.25, -0.75, -0.75; squares
    # 1.5625 + 0.0625 + 0.5625 + 0.5625 = 2.75, by 8^2: 0.04296875. Effective judgments
    # (3/8 x 5/8) / 0.04296875 = 5.4545...
    assert found.figures.ci.to_json() == pytest.approx(wilson(3 / 8, 60 / 11).to_json())
    # Families: x holds pairs 1 and 4 (2 of 4), y pairs 2 and 3 (1 of 4, 1 of 3 parsed).
    assert list(found.families) == ["tasks/x", "tasks/y"]
    assert found.families["tasks/x"].accuracy == pytest.approx(1 / 2)
    assert found.families["tasks/y"].accuracy == pytest.approx(1 / 4)
    assert found.families["tasks/y"].accuracy_parsed == pytest.approx(1 / 3)
    assert found.families["tasks/y"].n == 2


def test_skipped_counts_as_wrong_and_is_told() -> None:
    skipped = Judgment("2", "tasks/x", "chat", "A", None, skipped="prompt_too_long")
    found = summed(two("1", "A", "B"), [skipped])
    assert found.figures.accuracy == pytest.approx(2 / 3)
    assert found.figures.accuracy_parsed == 1.0
    assert found.skipped == 1
    assert found.mean_completion_length == 15  # the skipped one wrote nothing and does not count
    assert found.format_errors == {"OK": 2}


def test_nothing_parsed_is_none_and_not_zero() -> None:
    found = summed(two("1", None, None))
    assert found.figures.accuracy == 0
    report = found.to_json()
    assert report["accuracy_parsed"] is None
    assert report["ci_parsed"] is None
    assert report["swap_consistency"] is None
    assert report["position_bias"] is None
    with pytest.raises(ValueError, match="no judgments"):
        summarise([], prompt_hash="abc", seed=0)
    with pytest.raises(ValueError, match="'1' was judged more than once in placement ab"):
        summed(two("1", "A", "B"), two("1", "A", "B"))


def test_json_has_the_promised_fields() -> None:
    report = json.loads(json.dumps(summed(two("1", "A", "B"), two("2", "A", "A")).to_json()))
    assert {
        "accuracy", "accuracy_parsed", "parse_rate", "ci", "ci_parsed", "n", "swap_consistency",
        "position_bias", "mean_completion_length", "families", "prompt_hash", "seed",
    } <= set(report)  # fmt: skip
    low, high = report["ci"]
    assert 0 <= low < report["accuracy"] < high <= 1
    assert "pairs as clusters" in report["ci_method"]


def test_difference_is_taken_pair_by_pair() -> None:
    names = [str(index) for index in range(60)]
    before = summed(*(two(name, "A", "A") for name in names))  # 50%
    after = summed(*(two(name, "A", "B" if int(name) < 30 else None) for name in names))
    # After: 30 pairs right twice, 30 right once and unparsed once: (60 + 30) / 120 = 75%;
    # among parsed 90 / 90 = 100%.
    overall, parsed = compare(before, after)
    assert overall is not None
    assert parsed is not None
    assert overall.value == pytest.approx(0.25)
    assert parsed.value == pytest.approx(0.5)
    assert overall.interval.low > 0
    with pytest.raises(ValueError, match="different pairs"):
        compare(before, summed(two("other", "A", "B")))


class FakeTokenizer:
    """One token a character."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def apply_chat_template(self, messages: list[dict], **_options: Any) -> str:
        return "\n".join(message["content"] for message in messages)

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class GoesByLength:
    """A judge that prefers the longer answer and finds no words when both are as long."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        answers = []
        for ids in prompts:
            first, second = "".join(map(chr, ids)).split("[Answer A]\n")[1].split("[Answer B]\n")
            second = second.removesuffix("\n[End]")
            first = first.removesuffix("\n")
            verdict = "A" if len(first) > len(second) else "B"
            text = "?" if len(first) == len(second) else f"<answer>[[{verdict}]]</answer>"
            answers.append([Rollout([0] * 5, [0.0] * 5, text, "stop")])
        if progress is not None:
            progress(len(prompts), 5 * len(prompts))
        return answers


def pair(name: str, good: str, bad: str) -> Pair:
    return Pair(name, "tasks/x", ({"role": "user", "content": "?"},), good, bad, "A", "chat")


def test_evaluate_pairs_judges_both_placements() -> None:
    pairs = [pair("1", "long", "x"), pair("2", "y", "longer"), pair("3", "ab", "cd")]
    told: list[tuple[int, int]] = []
    found = evaluate_pairs(
        LocalModel(GoesByLength(), FakeTokenizer()),
        pairs,
        prompt=load_prompt("compact"),
        sampling=GREEDY,
        progress=lambda done, total: told.append((done, total)),
    )
    # Pair 1 right twice, pair 2 wrong twice, pair 3 unparsed twice.
    assert found.figures.accuracy == pytest.approx(2 / 6)
    assert found.figures.accuracy_parsed == pytest.approx(2 / 4)
    assert found.swap_consistency == 1.0
    assert found.position_bias == 0.5
    assert (found.prompt_hash, found.seed) == (load_prompt("compact").hash, 7)
    assert told == [(0, 6), (6, 6)]


def test_bad_calls() -> None:
    def run(pairs: list[Pair], sampling: SamplingParams = GREEDY) -> Evaluation:
        return evaluate_pairs(
            LocalModel(GoesByLength(), FakeTokenizer()),
            pairs,
            prompt=load_prompt("compact"),
            sampling=sampling,
        )

    with pytest.raises(ValueError, match="no pairs"):
        run([])
    with pytest.raises(ValueError, match="'1' occurs more than once"):
        run([pair("1", "a", "b"), pair("1", "c", "d")])
    with pytest.raises(ValueError, match=r"sampling\.n must be 1"):
        run([pair("1", "a", "b")], SamplingParams(n=2))
