"""`rmr1 eval rm-bench`: a judge works through RM-Bench, and its judgments land in a JSONL file.

Rows are appended batch by batch in the format of rmr1/score.py, with the judgment's text and what
made it; a run that was cut off goes on where it stopped. Judging is greedy, as the benchmark's
published figures are. Items and placements come from rmr1/rm_bench_items.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rmr1.answers import Answers, Progress
from rmr1.data import read_rows
from rmr1.engine.generator import SamplingParams
from rmr1.judge import Judgment, judge_pairs
from rmr1.judgment_log import append, repair_tail
from rmr1.prompts import Prompt
from rmr1.rm_bench_items import Cell, Key, load_items, plan
from rmr1.score import Report, score_file, score_rows


@dataclass(frozen=True, slots=True)
class RmBenchRun:
    """What a run did. `score` is `score_file` of everything the output file holds."""

    output: Path
    judgments: int
    resumed: int
    prompts_too_long: int
    missing_domains: tuple[str, ...]
    score: Report

    def to_json(self) -> dict[str, Any]:
        """The score, and what a reader must know beside it."""
        return {
            **self.score,
            "judgments_file": str(self.output),
            "new": self.judgments - self.resumed,
            "resumed": self.resumed,
            "prompts_too_long": self.prompts_too_long,
            "missing_files": list(self.missing_domains),
        }


def model_id(directory: str | Path) -> str:
    """A name for a model's very weights: the folder's name and twelve hex digits.

    The digits are a SHA-256 over config and tokenizer files and, of each weight file, its name,
    size, first and last megabyte: quick on any size, and another checkpoint in the same folder
    gets another name.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a model directory")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return f"{folder.resolve().name}@{digest.hexdigest()[:12]}"


def _done(path: Path, settings: dict[str, Any]) -> set[Key]:
    """Which judgments a file holds already.

    ValueError when other settings made one of them, or when one is no judgment of RM-Bench: the
    score at the end would refuse it, after hours of judging.
    """
    if not path.exists():
        return set()
    repair_tail(path)
    rows = list(read_rows(path))
    for number, row in rows:
        if not isinstance(row, dict):
            continue  # refused below
        for field, value in settings.items():
            if row.get(field) != value:
                raise ValueError(
                    f'{path}, line {number}: field "{field}" is {row.get(field)!r}, but this run'
                    f" has {value!r}; give another output file, or remove this one to start over"
                )
    if rows:
        score_rows(rows, "rm-bench", where=str(path))
    return {
        (row["domain"], str(row["id"]), row["chosen_index"], row["rejected_index"], row["label"])
        for _, row in rows
    }


def _row(cell: Cell, judgment: Judgment, settings: dict[str, Any]) -> dict[str, Any]:
    """One line of the file: the fields that `rmr1 score` reads, then what made the judgment."""
    return {
        "benchmark": "rm-bench",
        "id": cell.item.id,
        "label": cell.label,
        "verdict": judgment.verdict,
        "domain": cell.item.domain,
        "chosen_index": cell.chosen_index,
        "rejected_index": cell.rejected_index,
        "placement": "ab" if cell.label == "A" else "ba",  # "ab": the chosen answer comes first
        "text": judgment.text,
        "format_error": judgment.format_error,
        "skipped": judgment.skipped,
        "prompt_tokens": judgment.prompt_tokens,
        "new_tokens": judgment.new_tokens,
        "finish_reason": judgment.finish_reason,
        **{field: value for field, value in settings.items() if field != "benchmark"},
    }


def _judged(
    judge: Callable[..., list[Judgment]],
    cells: list[Cell],
    *,
    batch_size: int,
    resumed: int,
    progress: Progress | None,
) -> Iterator[list[tuple[Cell, Judgment]]]:
    """The judgments of `cells`, batch by batch.

    `judge` is `judge_pairs` but for pairs and progress. `progress(done, total)` counts judgments,
    the `resumed` ones included.
    """
    tell: Progress = progress or (lambda _done, _total: None)
    total = resumed + len(cells)
    tell(resumed, total)
    for start in range(0, len(cells), batch_size):
        batch = cells[start : start + batch_size]

        def within(done: int, _of_batch: int, before: int = resumed + start) -> None:
            tell(before + done, total)

        judgments = judge(pairs=[cell.pair() for cell in batch], progress=within)
        yield list(zip(batch, judgments, strict=True))


def run_rm_bench(
    judge: Answers,
    *,
    data: str | Path,
    output: str | Path,
    model: str,
    prompt: Prompt,
    seed: int = 0,
    limit: int | None = None,
    both_orders: bool = False,
    max_new_tokens: int = 1024,
    max_prompt_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> RmBenchRun:
    """Judge RM-Bench and append each judgment to `output`; rows that are there are not made again.

    `model` names the judge (see `model_id`); with it `prompt`, `seed` (of the placement) and the
    token limits must be those of the rows that the file already holds. `progress` counts
    judgments, those found in the file included.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    dataset = load_items(data, limit=limit)
    cells = plan(dataset.items, seed=seed, both_orders=both_orders)
    settings = {
        "benchmark": "rm-bench",
        "model": model,
        "prompt_hash": prompt.hash,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
    }
    output = Path(output)
    done = _done(output, settings)
    todo = [cell for cell in cells if cell.key not in done]
    resumed = len(cells) - len(todo)
    judging = partial(
        judge_pairs,
        judge,
        prompt=prompt,
        sampling=SamplingParams(n=1, temperature=0.0, max_new_tokens=max_new_tokens),
    )
    batches = _judged(judging, todo, batch_size=batch_size, resumed=resumed, progress=progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as stream:
        for batch in batches:
            append(stream, [_row(cell, judgment, settings) for cell, judgment in batch])
    return RmBenchRun(
        output=output,
        judgments=len(cells),
        resumed=resumed,
        prompts_too_long=sum(bool(row.get("skipped")) for _, row in read_rows(output)),
        missing_domains=dataset.missing,
        score=score_file(output, "rm-bench"),
    )
