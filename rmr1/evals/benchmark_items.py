"""What a benchmark asks of a judge: its items, the pairs in them, and how each pair is placed.

Placement is seeded and balanced: within each part of a benchmark (a subset, domain or category) the
items are put into an order that the seed and their ids decide, and taken two by two. The first of
two gets a random placement for its pairs (half of them, give or take one, with the better answer
first), the second the opposite one. So every part, and every cell of RM-Bench's matrix, has the
better answer first half of the time; which half depends on the seed and the ids alone, not on the
order of the file and not on `limit`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from rmr1.data import Kind, Label, Message, Pair, refuse_half_characters
from rmr1.datasets.row_files import files_of, hub_rows, rows_of
from rmr1.evals.judgment_rows import Benchmark, key_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?")
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Contest:
    """A better and a worse answer; `fields` are those by which `rmr1 score` groups."""

    chosen: str
    rejected: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """What belongs together: one pair, the nine of an RM-Bench item, or a best-of-n list.

    `part` is where placement is balanced and `limit` counts; `cluster` names what its judgments
    share with others: intervals are drawn over clusters.
    """

    id: str
    part: str
    cluster: str
    conversation: tuple[Message, ...]
    kind: Kind
    contests: tuple[Contest, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The items that were found, the parts of the benchmark that were not, and repeated ids.

    Judgments are told apart by part and id, so an id that occurs again in its part gets a number.
    """

    benchmark: Benchmark
    items: tuple[Item, ...]
    missing: tuple[str, ...] = ()
    repeated_ids: int = 0


@dataclass(frozen=True)
class Showing:
    """One judgment to make. `order` is 1 for the seeded placement and 2 for the opposite one."""

    benchmark: Benchmark
    item: Item
    contest: Contest
    label: Label
    order: int = 1

    @cached_property
    def key(self) -> tuple[str, ...]:
        """What identifies the judgment in a file."""
        return key_of({**self.contest.fields, "label": self.label}, self.benchmark)

    @cached_property
    def content(self) -> str:
        """Twelve hex digits of what is judged, whatever the placement."""
        told = [*map(dict, self.item.conversation), self.contest.chosen, self.contest.rejected]
        return digest(json.dumps(told, ensure_ascii=False, sort_keys=True))

    def pair(self) -> Pair:
        """The pair as it is shown."""
        answers = self.contest.chosen, self.contest.rejected
        first, second = answers if self.label == "A" else answers[::-1]
        return Pair(
            id="/".join(self.key),
            source=f"{self.benchmark}/{self.item.part}",
            conversation=self.item.conversation,
            answer_a=first,
            answer_b=second,
            label=self.label,
            kind=self.item.kind,
        )


def digest(text: str) -> str:
    """Twelve hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plan(
    dataset: Dataset, *, seed: int, both_orders: bool = False, limit: int | None = None
) -> list[list[Showing]]:
    """The judgments of each item, with their placements: one a pair, or two with both orders.

    `limit` takes so many items of each part, drawn with the seed: a larger one adds to a smaller
    one, and each is as balanced as the whole.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 item of each part, got {limit}")
    draws = [Random(f"{seed}/{item.part}/{item.id}") for item in dataset.items]
    ranks = [draw.random() for draw in draws]
    placed = _placements(dataset.items, draws, ranks)
    parts: dict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(ranks)), key=ranks.__getitem__):
        parts[dataset.items[index].part].append(index)
    taken = {index for members in parts.values() for index in members[:limit]}
    planned = []
    for index, (item, pattern) in enumerate(zip(dataset.items, placed, strict=True)):
        if index not in taken:
            continue
        showings = []
        for contest, chosen_first in zip(item.contests, pattern, strict=True):
            labels: tuple[Label, Label] = ("A", "B") if chosen_first else ("B", "A")
            for order, label in enumerate(labels if both_orders else labels[:1], start=1):
                showings.append(Showing(dataset.benchmark, item, contest, label, order))
        planned.append(showings)
    return planned


def _placements(
    items: Sequence[Item], draws: Sequence[Random], ranks: Sequence[float]
) -> list[list[bool]]:
    """For each item, of each of its pairs, whether the better answer is shown first.

    In the order of `ranks` every second item of a part is the opposite of the one before.
    """
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        alike[item.part, len(item.contests)].append(index)
    placed: list[list[bool]] = [[] for _ in items]
    for (_, size), members in alike.items():
        pattern: list[bool] = []
        for place, index in enumerate(sorted(members, key=ranks.__getitem__)):
            if place % 2 == 0:
                odd = [draws[index].random() < 0.5] * (size % 2)
                pattern = [True] * (size // 2) + [False] * (size // 2) + odd
                draws[index].shuffle(pattern)
            else:
                pattern = [not chosen_first for chosen_first in pattern]
            placed[index] = pattern
    return placed


class Ids:
    """Ids that occur again in their part, told apart by a number."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], int] = defaultdict(int)
        self.repeated = 0

    def own(self, part: str, name: Any) -> Any:
        """The id, or `id#2` where there is one already."""
        self._seen[part, str(name)] += 1
        times = self._seen[part, str(name)]
        self.repeated += times > 1
        return name if times == 1 else f"{name}#{times}"


# --- Rows and their fields -----------------------------------------------------------------------


def rows_from(data: str | Path, *, split: str, named: str = "") -> Iterator[tuple[str, Any]]:
    """(where, row) of a file, a folder, or a data set of the hub: NAME/DATA or NAME/DATA:SPLIT.

    Of a folder, the files whose names begin with `named` if there are any, else all data files.
    """
    path = Path(data)
    if not path.exists() and _HUB_NAME.fullmatch(str(data)):
        name, _, own_split = str(data).partition(":")
        try:
            _, rows = hub_rows(name, split=own_split or split)
            yield from rows
        except ValueError as error:
            raise ValueError(f"{data} is no file or folder here; as a hub name: {error}") from None
        return
    files = files_of(path)
    for file in [file for file in files if named and file.name.startswith(named)] or files:
        where = ""
        for where, row in rows_of(file):
            yield where, row
        if not where:
            raise ValueError(f"{file}: it holds no items; fetch the file again or remove it")


def need(row: Any, *wanted: str) -> dict[str, Any]:
    """The row, if it has these columns; ValueError names found and wanted ones."""
    if not isinstance(row, dict):
        raise ValueError(f"an item must be a JSON object, got {type(row).__name__}")
    missing = [name for name in wanted if name not in row]
    if missing:
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise ValueError(
            f'no field "{missing[0]}"; found {found}, wanted {", ".join(wanted)}: is this the right'
            " benchmark?"
        )
    return row


def text(value: Any, field: str, *, empty: bool = True) -> str:
    """A field that holds a text. An empty answer is part of a benchmark like any other."""
    if not isinstance(value, str) or not (empty or value.strip()):
        kind = "a text" if empty else "a non-empty text"
        raise ValueError(f'field "{field}" must be {kind}, got {value!r:.80}')
    refuse_half_characters(value, f'field "{field}"')
    return value


def name_of(value: Any, field: str) -> str | int:
    """A field that names something."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f'field "{field}" must be a text or a whole number, got {value!r:.80}')
    refuse_half_characters(str(value), f'field "{field}"')
    return value


def conversation(value: Any, field: str) -> tuple[Message, ...]:
    """A prompt: a text, or a list of messages."""
    if isinstance(value, str):
        return ({"role": "user", "content": text(value, field, empty=False)},)
    if not isinstance(value, list) or not value:
        raise ValueError(f'field "{field}" must be a non-empty text or messages, got {value!r:.80}')
    turns: list[Message] = []
    for index, turn in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            raise ValueError(
                f'field "{where}" must be a message with role ({", ".join(_ROLES)}) and content,'
                f" got {turn!r:.80}"
            )
        content = text(turn.get("content"), f"{where}.content")
        turns.append({"role": turn["role"], "content": content})
    return tuple(turns)
