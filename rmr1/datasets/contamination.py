"""Contamination: training prompts that a benchmark asks too.

What the user says in a conversation, as a whole and each turn by itself, is compared with every
benchmark prompt. It is contaminated

- if the two are the same words in the same order (case and punctuation aside),
- if a turn holds the whole of a prompt under 13 words, one word after the other, or
- if they share so many runs of 13 words that these are the share `overlap` or more of the shorter
  one's runs: one text that contains the other counts however long that one is.

Prompts under 5 words or 20 characters are found by the first rule only: "What is suicide?" is part
of many other questions, and where every character counts as a word five of them say little. Answers
are not looked at: the same instruction is what a judge could have learned by heart.

Legend: G runs of all benchmark prompts, H runs of one text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmr1.data import Message
from rmr1.datasets.row_files import rows_of
from rmr1.datasets.shingles import Hashes, runs, word_codes, words

RUN = 13  # words, as GPT-3's authors and most since have it
# What a prompt must have to be looked for inside longer turns.
LEAST_WORDS, LEAST_CHARACTERS = 5, 20
_FIELDS = ("prompt", "conversation_input")


@dataclass(frozen=True, slots=True)
class Hit:
    """A benchmark prompt that a conversation repeats; `overlap` is 1 for equal texts."""

    benchmark: str
    item: str
    overlap: float


def asked(conversation: Iterable[Mapping[str, Any]]) -> str:
    """The user's side of a conversation."""
    return "\n".join(str(turn["content"]) for turn in conversation if turn["role"] == "user")


def benchmark_prompts(path: str | Path) -> Iterator[tuple[str, str]]:
    """(where, prompt) of the rows of RewardBench, RM-Bench or RMB in a file or folder.

    The prompt is the field `prompt`, a text or messages, or RMB's `conversation_input`.
    """
    for where, row in rows_of(path):
        fields = row if isinstance(row, dict) else {}
        value = next((fields[name] for name in _FIELDS if name in fields), None)
        if isinstance(value, str):
            yield where, value
        elif isinstance(value, list) and all(
            isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value
        ):
            yield where, asked(value)
        else:
            raise ValueError(
                f"{where}: a benchmark's row needs {' or '.join(_FIELDS)}, a text or messages;"
                f" found {', '.join(map(str, fields)) or type(row).__name__}"
            )


class Benchmarks:
    """The prompts of benchmarks, ready to be looked up. They are held in memory.

    Args:
        paths: benchmark -> file or folder.
        overlap: the share of common runs from which a conversation is contaminated, 0 to 1.
    """

    def __init__(self, paths: Mapping[str, str], *, overlap: float) -> None:
        self.overlap = overlap
        self.prompts = dict.fromkeys(paths, 0)
        self._items: list[tuple[str, str]] = []
        self._same: dict[str, int] = {}
        self._short: dict[int, list[tuple[list[str], int]]] = {}  # by their first words
        sizes: list[int] = []
        every: list[Hashes] = []
        for name, path in paths.items():
            for where, text in benchmark_prompts(path):
                found = words(text)
                key = " ".join(found)
                if key in self._same or not key:
                    continue  # RM-Bench and RMB ask most of their prompts more than once
                item = self._same[key] = len(self._items)
                self._items.append((name, where))
                self.prompts[name] += 1
                codes = word_codes(found)
                every.append(np.unique(runs(codes, RUN)))
                sizes.append(len(every[-1]))
                if LEAST_WORDS <= len(found) < RUN and len(key) >= LEAST_CHARACTERS:
                    start = int(runs(codes, LEAST_WORDS)[0])
                    self._short.setdefault(start, []).append((found, item))
        self._starts = np.array(list(self._short), np.uint64)
        self._sizes = sizes
        together = np.concatenate(every) if every else np.empty(0, np.uint64)  # [G]
        order = np.argsort(together, kind="stable")
        self._runs: Hashes = together[order]
        self._owner: NDArray[np.int64] = np.repeat(np.arange(len(sizes)), sizes)[order]

    def hit(self, conversation: Sequence[Message]) -> Hit | None:
        """The benchmark prompt that a conversation repeats most of, or None."""
        turns = [words(turn["content"]) for turn in conversation if turn["role"] == "user"]
        texts = [list(chain.from_iterable(turns)), *(turns if len(turns) > 1 else [])]
        for text in texts:
            if (same := self._same.get(" ".join(text))) is not None:
                return Hit(*self._items[same], 1.0)
        codes = [word_codes(text) for text in texts]
        # Not in the turns as one text: its words would run on from turn to turn.
        for turn, own in zip(turns, codes[len(texts) - len(turns) :], strict=True):
            if (held := self._held(turn, own)) is not None:
                return Hit(*self._items[held], 1.0)
        found = [hit for own in codes if (hit := self._common(np.unique(runs(own, RUN))))]
        return max(found, key=lambda hit: hit.overlap, default=None)

    def _held(self, turn: list[str], codes: Hashes) -> int | None:
        """The longest short prompt of which a turn holds all words in a row."""
        starts = runs(codes, LEAST_WORDS)
        held = [
            (len(wanted), item)
            for at in np.flatnonzero(np.isin(starts, self._starts))
            for wanted, item in self._short[int(starts[at])]
            if turn[at : at + len(wanted)] == wanted
        ]
        return max(held)[1] if held else None

    def _common(self, own: Hashes) -> Hit | None:
        """The prompt that has most of the runs [H] of a text, if these are enough."""
        first = np.searchsorted(self._runs, own, "left")
        last = np.searchsorted(self._runs, own, "right")
        common: Counter[int] = Counter()
        for start, end in zip(first[last > first], last[last > first], strict=True):
            common.update(self._owner[start:end].tolist())
        best: Hit | None = None
        for item, count in common.items():
            overlap = count / min(len(own), self._sizes[item])
            if overlap >= self.overlap and (best is None or overlap > best.overlap):
                best = Hit(*self._items[item], overlap)
        return best
