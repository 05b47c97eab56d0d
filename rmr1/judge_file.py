"""Comparisons from a JSONL file, judged in batches into another one.

A row is {"prompt": "...", "answer_a": "...", "answer_b": "..."} or has "conversation", messages
that end with a user turn, in place of "prompt"; an "id" is carried over. Rows of pairs
(rmr1/data.py) fit too. The output has a line for each, in order, with what made it, so a run that
was cut off goes on after the last one. A prompt that is too long for the model gets a line too,
with no verdict and the reason in "skipped".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rmr1.answers import Progress
from rmr1.data import Pair, read_rows
from rmr1.judge import Judge, judge_pairs, pair_of, placements_of, vote
from rmr1.judgment_log import append, appending, content_of
from rmr1.judgment_view import to_json

BATCH = 64  # comparisons that are judged, and written, at a time
_SAMPLES = 1024  # the most judgments of them


def judge_file(
    judge: Judge,
    source: str | Path,
    output: str | Path,
    *,
    votes: int = 1,
    swap: bool = False,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Judge every row; returns how many were judged now, and how many of these were too long.

    `progress` counts rows.

    Raises:
        ValueError: a row that is no comparison; an output of other rows, of another judge or
            settings, or one that another process writes to.
    """
    rows = list(_comparisons(source))
    making = judge.making(votes=votes, swap=swap)
    output = Path(output)
    with appending(output) as stream:
        done = count = _done(output, rows, making)
        left = iter(rows[done:])
        skipped = 0
        if progress is not None:
            progress(count, len(rows))
        each = votes * len(placements_of(swap=swap))
        while batch := list(islice(left, max(1, min(BATCH, _SAMPLES // each)))):
            within = _within(progress, count, len(rows), each)
            told = _judged(judge, batch, count, votes, swap, within)
            append(
                stream,
                [
                    {"id": name} | one | {"content": content_of(pair)} | making
                    for (name, pair), one in zip(batch, told, strict=True)
                ],
            )
            skipped += sum("skipped" in one for one in told)
            count += len(batch)
            if progress is not None:
                progress(count, len(rows))
    return len(rows) - done, skipped


def _within(progress: Progress | None, before: int, total: int, each: int) -> Progress:
    """Judgments of a batch, told as comparisons of the file: `each` of them make one."""

    def tell(done: int, _of_batch: int) -> None:
        if progress is not None:
            progress(before + done // each, total)

    return tell


def _judged(
    judge: Judge,
    batch: list[tuple[Any, Pair]],
    before: int,
    votes: int,
    swap: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What each comparison of a batch came to; `before` stand before them in the file."""
    placements = placements_of(swap=swap)
    # No two comparisons draw alike, and each draws the same wherever a batch begins.
    sampling = replace(judge.sampling(votes), first_prompt=before * len(placements))
    found = judge_pairs(
        judge.model,
        [pair for _, pair in batch],
        prompt=judge.prompt,
        sampling=sampling,
        placements=placements,
        progress=progress,
    )
    each = sampling.n * len(placements)
    told = []
    for number, (_, pair) in enumerate(batch):
        own = found[number * each : (number + 1) * each]
        reasons = [one.skipped for one in own if one.skipped]
        if reasons:
            told.append({"verdict": None, "skipped": reasons[0]})
        else:
            told.append(to_json(vote(own), pair))
    return told


def _comparisons(source: str | Path) -> Iterator[tuple[Any, Pair]]:
    for number, row in read_rows(source):
        try:
            if not isinstance(row, dict):
                raise ValueError("a row must be a JSON object")
            asked = row.get("prompt")
            asked = row.get("conversation") if asked is None else asked
            missing = [name for name in ("answer_a", "answer_b") if name not in row]
            if asked is None or missing:
                wanted = "prompt (or conversation), answer_a, answer_b"
                raise ValueError(f"wanted {wanted}; found {', '.join(row) or 'nothing'}")
            if not isinstance(asked, str | list):
                raise ValueError("prompt must be a text or a list of messages")
            yield row.get("id", number), pair_of(asked, row["answer_a"], row["answer_b"])
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None


def _done(output: Path, rows: list[tuple[Any, Pair]], making: Mapping[str, Any]) -> int:
    """How many rows the output holds already; ValueError when something else made one of them."""
    count = 0
    for number, row in read_rows(output):
        other = f"give another --output, or remove {output} to start over"
        if count >= len(rows) or not isinstance(row, dict) or row.get("id") != rows[count][0]:
            raise ValueError(
                f"{output}, line {number}: no judgment of row {count + 1} of this input; {other}"
            )
        for name, value in {"content": content_of(rows[count][1]), **making}.items():
            if row.get(name) != value:
                raise ValueError(
                    f"{output}, line {number}: {name} is {row.get(name)!r}, but this run has"
                    f" {value!r}; {other}"
                )
        count += 1
    return count
