"""Warnings come when the figures go wrong, and only then."""

from __future__ import annotations

import math

from rmr1.alarms import QUIET, WINDOW, Alarms

FINE = {
    "reward": 0.2,
    "frac_reward_zero_std": 0.5,
    "kl": 0.01,
    "logprob_mismatch": 1e-6,
    "grad_norm": 1.0,
}


def told(*rows: dict[str, float]) -> list[list[str]]:
    alarms = Alarms()
    return [alarms.look(row) for row in rows]


def test_a_run_that_is_fine_is_silent() -> None:
    rising = [FINE | {"reward": -0.5 + i / 20, "kl": i / 50} for i in range(30)]
    without_reference = [{k: v for k, v in FINE.items() if k != "kl"}] * 3
    assert told(*rising, *without_reference) == [[]] * 33


def test_every_fault_is_named() -> None:
    faults = {
        "teaches nothing": {"frac_reward_zero_std": 1.0},
        "1.50 nats a token away": {"kl": 1.5},
        "differ by 0.05 nats": {"logprob_mismatch": 0.05},
        "was not finite": {"grad_norm": math.nan},
    }
    for words, wrong in faults.items():
        *before, last = told(*[FINE] * WINDOW, FINE | wrong)
        assert before == [[]] * WINDOW
        assert len(last) == 1
        assert words in last[0]


def test_a_reward_that_collapses() -> None:
    good, bad = FINE | {"reward": 0.6}, FINE | {"reward": -0.9}
    found = told(*[good] * WINDOW, *[bad] * WINDOW)
    assert found[:WINDOW] == [[]] * WINDOW
    sentences = [one for row in found for one in row]
    assert len(sentences) == 1
    assert "from 0.60" in sentences[0]


def test_a_warning_is_repeated_after_a_while_only() -> None:
    found = told(*[FINE | {"kl": 3.0}] * (2 * QUIET + 1))
    assert [len(row) for row in found] == [1, *[0] * (QUIET - 1)] * 2 + [1]


def test_a_mismatch_that_was_there_from_the_start_has_to_grow() -> None:
    """In 16 bits it is larger than in fp32, and no news."""
    usual = FINE | {"logprob_mismatch": 0.008}
    assert told(*[usual] * WINDOW, FINE | {"logprob_mismatch": 0.05})[-1] == []
    assert told(*[usual] * WINDOW, FINE | {"logprob_mismatch": 0.09})[-1] != []
