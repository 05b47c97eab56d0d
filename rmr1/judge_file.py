"""Comparisons from a JSONL file, judged in batches into another one.

A row is {"prompt": "...", "answer_a": "...", "answer_b": "..."} or has "conversation", messages
that end with a user turn, in place of "prompt"; an "id" is carried over. Rows of pairs
(rmr1/data.py) fit too. The output has a line for each, in order, so a run that was cut off goes on
after the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from rmr1.answers import Progress
from rmr1.data import Pair, read_rows
from rmr1.judge import Judge, pair_of
from rmr1.judgment_log import append, repair_tail
from rmr1.judgment_view import to_json

BATCH = 64  # comparisons that are judged, and written, at a time


def judge_file(
    judge: Judge,
    source: str | Path,
    output: str | Path,
    *,
    votes: int = 1,
    swap: bool = False,
    progress: Progress | None = None,
) -> int:
    """Judge every row; returns how many were judged now. `progress` counts rows.

    Raises:
        ValueError: a row that is no comparison, or an output of other rows.
    """
    rows = list(_comparisons(source))
    output = Path(output)
    done = _done(output, rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    left = iter(rows[done:])
    count = done
    if progress is not None:
        progress(count, len(rows))
    with output.open("a", encoding="utf-8") as stream:
        while batch := list(islice(left, BATCH)):
            pairs = [pair for _, pair in batch]
            found = judge.compare_all(pairs, votes=votes, swap=swap)
            told = [
                {"id": name} | to_json(one, pair)
                for (name, pair), one in zip(batch, found, strict=True)
            ]
            append(stream, told)
            count += len(batch)
            if progress is not None:
                progress(count, len(rows))
    return len(rows) - done


def _comparisons(source: str | Path) -> Iterator[tuple[Any, Pair]]:
    for number, row in read_rows(source):
        try:
            if not isinstance(row, dict):
                raise ValueError("a row must be a JSON object")
            asked = row.get("prompt", row.get("conversation"))
            missing = [name for name in ("answer_a", "answer_b") if name not in row]
            if asked is None or missing:
                wanted = "prompt (or conversation), answer_a, answer_b"
                raise ValueError(f"wanted {wanted}; found {', '.join(row) or 'nothing'}")
            if not isinstance(asked, str | list):
                raise ValueError("prompt must be a text or a list of messages")
            yield row.get("id", number), pair_of(asked, row["answer_a"], row["answer_b"])
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None


def _done(output: Path, rows: list[tuple[Any, Pair]]) -> int:
    """How many rows the output holds already."""
    if not output.exists():
        return 0
    repair_tail(output)
    count = 0
    for number, row in read_rows(output):
        if count >= len(rows) or not isinstance(row, dict) or row.get("id") != rows[count][0]:
            raise ValueError(
                f"{output}, line {number}: no judgment of row {count + 1} of this input; give"
                " another --output, or remove this one to start over"
            )
        count += 1
    return count
