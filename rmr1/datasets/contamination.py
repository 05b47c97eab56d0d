"""Contamination: training prompts that a benchmark asks too.

A conversation is compared by its user turns with every benchmark prompt. It is contaminated

- if the two are the same words in the same order (case and punctuation aside), or
- if they share so many runs of 13 words that these are the share `overlap` or more of the shorter
  one's runs: one text that contains the other counts however long that one is.

Prompts under 13 words have no such run; they are found by the first rule only. Answers are not
looked at: the same instruction is what a judge could have learned by heart.

Legend: G runs of all benchmark prompts, H runs of one conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmr1.data import Message
from rmr1.datasets.row_files import rows_of
from rmr1.datasets.shingles import Hashes, ngrams, words

RUN = 13  # words, as GPT-3's authors and most since have it
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
    """The prompts of benchmarks, ready to be looked up. Their runs are held in memory.

    Args:
        paths: benchmark -> file or folder.
        overlap: the share of common runs from which a conversation is contaminated, 0 to 1.
    """

    def __init__(self, paths: Mapping[str, str], *, overlap: float) -> None:
        self.overlap = overlap
        self.prompts = dict.fromkeys(paths, 0)
        self._items: list[tuple[str, str]] = []
        self._same: dict[str, int] = {}
        sizes: list[int] = []
        runs: list[Hashes] = []
        for name, path in paths.items():
            for where, text in benchmark_prompts(path):
                key = " ".join(words(text))
                if key in self._same or not key:
                    continue  # RM-Bench and RMB ask most of their prompts more than once
                self._same[key] = len(self._items)
                self._items.append((name, where))
                self.prompts[name] += 1
                runs.append(ngrams(text, RUN))
                sizes.append(len(runs[-1]))
        self._sizes = sizes
        every = np.concatenate(runs) if runs else np.empty(0, np.uint64)  # [G]
        order = np.argsort(every, kind="stable")
        self._runs: Hashes = every[order]
        self._owner: NDArray[np.int64] = np.repeat(np.arange(len(sizes)), sizes)[order]

    def hit(self, conversation: Sequence[Message]) -> Hit | None:
        """The benchmark prompt that a conversation repeats most of, or None."""
        text = asked(conversation)
        if (same := self._same.get(" ".join(words(text)))) is not None:
            return Hit(*self._items[same], 1.0)
        own = ngrams(text, RUN)  # [H]
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
