"""Rewards of judgments, and the same as other trainers call them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rmr1.config import RlvrConfig, load_config
from rmr1.data import Pair, read_pairs
from rmr1.grpo_config import RewardConfig
from rmr1.rewards import (
    correctness,
    grounding,
    overlong,
    shortness,
    swap_consistency,
    weighed,
    well_formed,
)
from rmr1.verdict import parse_verdicts

PAIR = Pair(
    "p", "tests", ({"role": "user", "content": "?"},), "The Nile is long.", "No idea", "A", "chat"
)
BACK = PAIR.swapped()


def says(*verdicts: str | None) -> list[str]:
    return ["nothing" if one is None else f"<answer>[[{one}]]</answer>" for one in verdicts]


def test_agreement_with_the_other_order() -> None:
    """Three judgments of each order: in the first A, A, B; in the second B, none, B."""
    pairs = [PAIR] * 3 + [BACK] * 3
    verdicts = parse_verdicts(says("A", "A", "B", "B", None, "B"))
    # Those who say A first agree with both others, B first with none; B second with two of three.
    assert swap_consistency(verdicts, pairs) == pytest.approx([1, 1, 0, 2 / 3, 0, 2 / 3])
    assert swap_consistency(verdicts[:3], pairs[:3]) == [0, 0, 0]  # the other order is not there
    others = [replace(PAIR, id="q")] * 3
    assert swap_consistency(verdicts, pairs[:3] + others) == [0] * 6
    assert swap_consistency(parse_verdicts(says("tie", None)), [PAIR, BACK]) == [0, 0]


def test_agreement_does_not_ask_who_is_right() -> None:
    wrong = parse_verdicts(says("B", "A"))
    assert swap_consistency(wrong, [PAIR, BACK]) == [1, 1]
    assert correctness(wrong, [PAIR, BACK]) == [-1, -1]


def quoting(*quotes: tuple[str, str]) -> str:
    body = "".join(f"<quote_{side}>{text}</quote_{side}>" for side, text in quotes)
    return f"<eval>{body}</eval><answer>[[A]]</answer>"


@pytest.mark.parametrize(
    ("quotes", "share"),
    [
        ([], 0.0),
        ([("A", "The Nile is long.")], 1.0),
        ([("A", ' "The  Nile\nis long" ')], 1.0),
        ([("A", "the nile is long")], 0.0),
        ([("B", "The Nile is long.")], 0.0),  # from the other answer
        ([("A", "Nile")], 0.0),  # too short to say anything
        ([("B", "No idea")], 1.0),  # short, but all of it
        ([("B", "")], 0.0),
        ([("A", "The Nile is long."), ("B", "made up by the judge")], 0.5),
    ],
)
def test_quotes_stand_in_their_answers(quotes: list[tuple[str, str]], share: float) -> None:
    text = quoting(*quotes)
    assert grounding(parse_verdicts([text]), [text], [PAIR]) == [share]


def test_a_quote_outside_the_evaluation_is_none() -> None:
    text = "<quote_A>The Nile is long.</quote_A><eval>x</eval><answer>[[A]]</answer>"
    assert grounding(parse_verdicts([text]), [text], [PAIR]) == [0.0]


def test_format_and_length() -> None:
    good = "<type>Reasoning</type><solution>1</solution><eval>2</eval><answer>[[A]]</answer>"
    assert well_formed(parse_verdicts([good, "x" + good[5:], ""])) == [1, 0, 0]
    assert shortness([0, 50, 100, 120], 100) == [0, -0.5, -1, -1]
    assert overlong([90, 95], 100, 10) == [0, -0.5]


def test_parts_are_weighed_and_named() -> None:
    text = quoting(("A", "The Nile is long."))
    given: Any = (parse_verdicts([text] * 2), [text] * 2, [10, 20], [PAIR, BACK])
    alone = weighed(RewardConfig(), *given, limit=40, buffer=0)
    assert alone == {"correctness": [1.0, -1.0]}
    config = RewardConfig(correctness=2, swap_consistency=0.5, grounding=0.25, format=1, length=0.1)
    parts = weighed(config, *given, limit=40, buffer=20)
    assert list(parts) == [
        "correctness", "swap_consistency", "grounding", "format", "length", "overlong",
    ]  # fmt: skip
    assert parts["correctness"] == [2, -2]
    assert parts["grounding"] == [0.25, 0]  # exchanged, it is the other answer
    assert parts["length"] == pytest.approx([-0.025, -0.05])
    assert weighed(config, [], [], [], [], limit=40, buffer=20) == {name: [] for name in parts}


@pytest.mark.parametrize(
    "wrong",
    [{"rollout.prompts": 3}, {"rollout.prompts": 4, "grpo.resample_rounds": 1}],
)
def test_both_orders_need_their_room(wrong: dict[str, Any]) -> None:
    given = {
        "model": "pocket",
        "data.tasks": 4,
        "reward.swap_consistency": 0.5,
        "grpo.minibatches": 1,
    }
    with pytest.raises(ValueError, match="swap_consistency judges each pair in both orders"):
        load_config(RlvrConfig, None, given | wrong)


def test_a_run_with_every_part(rlvr_config: Any, tmp_path: Path) -> None:
    """Both orders of a pair side by side, and each part in the log."""
    from rmr1.rlvr import rlvr

    config = rlvr_config(
        steps=2,
        rollout={"prompts": 4, "samples": 4, "max_new_tokens": 8},
        grpo={"minibatches": 1, "overlong_buffer": 2},
        reward={"swap_consistency": 0.5, "grounding": 0.1, "format": 0.1, "length": 0.1},
    )
    rlvr(config)
    import json

    rows = [json.loads(line) for line in (config.directory / "metrics.jsonl").open()]
    names = ("correctness", "swap_consistency", "grounding", "format", "length", "overlong")
    for row in rows:
        assert row["reward"] == pytest.approx(sum(row[f"rewards/{name}/mean"] for name in names))
        assert row["prompts"] == 4
    assert any(row["rewards/length/mean"] < 0 for row in rows)
    trainer = json.loads((config.directory / "checkpoints/step-000002/trainer.json").read_text())
    assert trainer["drawn"] == 8  # prompts, two a pair
    assert len(read_pairs(config.data.path)) >= 2
