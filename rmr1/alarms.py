"""Warnings while RL runs: what in the figures of the last steps means that it goes wrong.

The bounds are chosen here, wide enough to be silent in the demo; a warning stops nothing.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 5  # steps that a mean is taken over
QUIET = 10  # steps before the same warning comes again
REWARD_FALL = 0.5  # of the mean over WINDOW steps, below the best one
MISMATCH, MISMATCH_GROWTH = 0.01, 10.0  # nats a token, and times that of the first steps
KL = 1.0  # nats a token


class Alarms:
    """Looks at one row of metrics after the other."""

    def __init__(self) -> None:
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._best = -math.inf
        self._first_mismatches: list[float] = []
        self._told: dict[str, int] = {}
        self._step = 0

    def look(self, row: Mapping[str, Any]) -> list[str]:
        """The warnings of a step, a sentence each."""
        self._step += 1
        found = {
            "gradient": _gradient(row),
            "equal": _equal(row),
            "reward": self._reward(row),
            "kl": _kl(row),
            "mismatch": self._mismatch(row),
        }
        told = []
        for name, sentence in found.items():
            if sentence and self._step >= self._told.get(name, 0):
                self._told[name] = self._step + QUIET
                told.append(sentence)
        return told

    def _reward(self, row: Mapping[str, Any]) -> str | None:
        self._rewards.append(row["reward"])
        if len(self._rewards) < WINDOW:
            return None
        mean = statistics.fmean(self._rewards)
        self._best = max(self._best, mean)
        if mean > self._best - REWARD_FALL:
            return None
        return (
            f"the reward has fallen to {mean:.2f} from {self._best:.2f} (means over {WINDOW}"
            " steps); lower optim.learning_rate, raise grpo.beta, or go back to a checkpoint"
        )

    def _mismatch(self, row: Mapping[str, Any]) -> str | None:
        mismatch: float = row["logprob_mismatch"]
        if len(self._first_mismatches) < WINDOW:
            self._first_mismatches.append(mismatch)
        usual = statistics.median(self._first_mismatches)
        if mismatch <= max(MISMATCH, MISMATCH_GROWTH * usual):
            return None
        return (
            f"generator and trainer differ by {mismatch:.3g} nats a token (at first {usual:.2g});"
            ' set grpo.old_logprobs = "recompute" and grpo.correction = "truncate"'
        )


def _gradient(row: Mapping[str, Any]) -> str | None:
    if math.isfinite(row["grad_norm"]):
        return None
    return "a gradient was not finite, so its update was skipped; lower optim.learning_rate"


def _equal(row: Mapping[str, Any]) -> str | None:
    if row["frac_reward_zero_std"] < 1:
        return None
    return (
        "all samples of every prompt got the same reward, so this step teaches nothing; take pairs"
        " that are neither too easy nor too hard, or more samples of each"
    )


def _kl(row: Mapping[str, Any]) -> str | None:
    if row.get("kl", 0.0) <= KL:
        return None
    return (
        f"the policy is {row['kl']:.2f} nats a token away from the start; raise grpo.beta or lower"
        " optim.learning_rate"
    )
