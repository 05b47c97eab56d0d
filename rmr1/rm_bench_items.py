"""RM-Bench's files become items, and items become a plan of placed pairs.

An item has three chosen and three rejected answers (concise, detailed, markdown): nine judgments.
Placement is seeded and balanced: items are taken two by two in file order, the first gets a random
placement for each of its nine cells (four or five with the chosen answer first), the second the
opposite one. So every cell of the matrix has the chosen answer first half of the time, no matter
how many items are judged, and which half depends on the seed alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from rmr1.data import Kind, Label, Pair, refuse_half_characters

DOMAINS = ("chat", "math", "code", "safety-refuse", "safety-response")
TOTAL = "total_dataset.json"
_REASONING = ("math", "code")

Key = tuple[str, str, int, int, Label]


@dataclass(frozen=True, slots=True)
class Item:
    """One RM-Bench item: a prompt, three right answers and three wrong ones, by style."""

    id: str | int
    domain: str
    prompt: str
    chosen: tuple[str, str, str]
    rejected: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The items that were found, and the domains whose file was not."""

    items: tuple[Item, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One judgment to make: an item, a chosen style, a rejected style and a placement."""

    item: Item
    chosen_index: int
    rejected_index: int
    label: Label

    @property
    def key(self) -> Key:
        """What identifies the judgment in a file."""
        return (
            self.item.domain, str(self.item.id), self.chosen_index, self.rejected_index, self.label
        )  # fmt: skip

    def pair(self) -> Pair:
        """The pair as it is shown."""
        good, bad = self.item.chosen[self.chosen_index], self.item.rejected[self.rejected_index]
        first, second = (good, bad) if self.label == "A" else (bad, good)
        kind: Kind = "reasoning" if self.item.domain in _REASONING else "chat"
        return Pair(
            id="/".join(map(str, self.key)),
            source=f"rm-bench/{self.item.domain}",
            conversation=({"role": "user", "content": self.item.prompt},),
            answer_a=first,
            answer_b=second,
            label=self.label,
            kind=kind,
        )


def _read_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the bytes are no UTF-8 (at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: no JSON ({error.msg}); fetch the file again"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep; an endless number
        raise ValueError(
            f"{path}: no JSON that can be read ({error}); fetch the file again"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a JSON list of items, got {type(rows).__name__}")
    if not rows:
        raise ValueError(f"{path}: the list holds no items; fetch the file again or remove it")
    return rows


def _answers(row: dict[str, Any], field: str) -> tuple[str, str, str]:
    value = row.get(field)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(answer, str) for answer in value)
    ):
        found = f"{len(value)} entries" if isinstance(value, list) else repr(value)
        raise ValueError(
            f'field "{field}" must be a list of three texts (concise, detailed, markdown),'
            f" got {found}"
        )
    for index, answer in enumerate(value):
        refuse_half_characters(answer, f'field "{field}[{index}]"')
    return (value[0], value[1], value[2])


def _item(row: Any, domain: str | None) -> Item:
    """Check one item; ValueError names the field. Fields that are not needed are left alone.

    An empty answer is let through: it is part of the benchmark and is judged like any other.
    """
    if not isinstance(row, dict):
        raise ValueError(f"an item must be a JSON object, got {type(row).__name__}")
    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f'field "id" must be a text or a whole number, got {name!r}')
    refuse_half_characters(str(name), 'field "id"')
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'field "prompt" must be a non-empty text, got {row.get("prompt")!r}')
    refuse_half_characters(row["prompt"], 'field "prompt"')
    if domain is None:
        domain = row.get("domain")
        if domain not in DOMAINS:
            raise ValueError(f'field "domain" must be one of {", ".join(DOMAINS)}, got {domain!r}')
    return Item(name, domain, row["prompt"], _answers(row, "chosen"), _answers(row, "rejected"))


def load_items(data: str | Path, *, limit: int | None = None) -> Dataset:
    """Read RM-Bench from a folder: `<domain>_filtered.json` files, else `total_dataset.json`.

    `limit` takes the first so many items of each domain. A domain without a file is allowed and
    named in `missing`. ValueError names the file, the item and the field.
    """
    folder = Path(data)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 item a file, got {limit}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder with RM-Bench's JSON files")
    sources: list[tuple[Path, str | None]] = [
        (path, domain)
        for domain in DOMAINS
        if (path := folder / f"{domain}_filtered.json").is_file()
    ]
    if not sources and (folder / TOTAL).is_file():
        sources = [(folder / TOTAL, None)]
    if not sources:
        raise ValueError(
            f"{folder}: no RM-Bench file; wanted {', '.join(f'{d}_filtered.json' for d in DOMAINS)}"
            f" or {TOTAL}"
        )
    items: dict[str, list[Item]] = {domain: [] for domain in DOMAINS}
    seen: Counter[tuple[str, str]] = Counter()
    for path, domain in sources:
        for index, row in enumerate(_read_list(path)):
            try:
                item = _item(row, domain)
            except ValueError as error:
                raise ValueError(f"{path}, item {index}: {error}") from None
            seen[item.domain, str(item.id)] += 1
            if (count := seen[item.domain, str(item.id)]) > 1:
                # Judgments are told apart by domain and id, so a repeated id gets a number.
                item = replace(item, id=f"{item.id}#{count}")
            items[item.domain].append(item)
    return Dataset(
        tuple(item for found in items.values() for item in found[:limit]),
        tuple(domain for domain, found in items.items() if not found),
    )


def plan(items: Sequence[Item], *, seed: int, both_orders: bool = False) -> list[Cell]:
    """The judgments of `items`, nine each (eighteen with both orders), with their placements."""
    cells = []
    pattern: list[bool] = []
    position: dict[str, int] = {}
    for item in items:
        place = position.setdefault(item.domain, 0)
        position[item.domain] += 1
        if place % 2 == 0:
            random = Random(f"{seed}/{item.domain}/{item.id}")
            pattern = [True] * 4 + [False] * 4 + [random.random() < 0.5]
            random.shuffle(pattern)
        else:
            pattern = [not chosen_first for chosen_first in pattern]
        for cell, chosen_first in enumerate(pattern):
            label: Label = "A" if chosen_first else "B"
            other: Label = "B" if chosen_first else "A"
            for shown in (label, other) if both_orders else (label,):
                cells.append(Cell(item, cell // 3, cell % 3, shown))
    return cells
