"""Pairs judged in both placements, batch by batch, with a log from which the same call goes on.

An answer may have been paid for, or taken a minute to write: whatever ends a run, those that came
are in the log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rmr1.answers import Answers, CutShort, Progress, Reply
from rmr1.data import Pair, read_rows
from rmr1.engine.sampling import SamplingParams
from rmr1.judge import BOTH_PLACEMENTS, Judgment, Placement, judgments_of, placed
from rmr1.judgment_log import append, appending, content_of
from rmr1.prompts import Prompt

Place = tuple[Pair, Placement]  # a pair as it is shown


@dataclass(frozen=True, slots=True)
class PairLog:
    """A JSONL file of judgments, and what each line says of their making (model, prompt, ...)."""

    path: Path
    made_by: Mapping[str, Any]

    def row(self, pair: Pair, judgment: Judgment) -> dict[str, Any]:
        """A line."""
        return asdict(judgment) | {"content": content_of(pair), **self.made_by}

    def read(self, places: Iterable[Place]) -> dict[tuple[str, str], Judgment]:
        """The judgments of these places that it holds.

        ValueError where something else made one, or it is of none of these.
        """
        if not self.path.exists():
            return {}
        pairs = {(pair.id, placement): pair for pair, placement in places}
        names = {one.name for one in fields(Judgment)}
        found = {}
        for number, row in read_rows(self.path):
            other = f"remove {self.path} to start over, or give another output"
            try:
                key = row["id"], row["placement"]
                pair = pairs[key]
                wanted = {**self.made_by, "content": content_of(pair)}
                for name, value in wanted.items():
                    if row[name] != value:
                        raise ValueError(
                            f"{self.path}, line {number}: {name} is {row[name]!r}, but this run has"
                            f" {value!r}; {other}"
                        )
                own = {name: value for name, value in row.items() if name in names}
                told = {"source": pair.source, "kind": pair.kind, "samples": ()}
                found[key] = Judgment(**own | told)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: no judgment of these pairs ({error}); {other}"
                ) from None
        return found


def judge_both_orders(
    model: Answers,
    pairs: Sequence[Pair],
    *,
    prompt: Prompt,
    sampling: SamplingParams,
    log: PairLog | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[Judgment]:
    """Judge each pair in both placements, once each: two judgments a pair, in that order.

    What `log` holds is not judged again; what is judged is in it as soon as its batch is there.
    Without a log all are one batch.
    `progress(done, total)` counts judgments, those of the log and of skipped prompts too.

    Raises:
        ValueError: the log is of something else; the judge failed, what it had answered is in the
            log.
    """
    places = placed(pairs, BOTH_PLACEMENTS)
    how = "run the same again" if log else "give --output FILE, and the same command goes on"
    lacking, failure = 0, ""
    with appending(log.path) if log else nullcontext() as stream:
        found = log.read(places) if log else {}
        todo = [one for one in places if _key(one) not in found]
        if progress is not None and found:
            progress(len(found), len(places))
        size = batch_size if log else max(1, len(todo))
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            judged, cut = _judged(
                model, prompt, _draws(sampling, batch[0], places[0]), batch,
                _shifted(progress, len(places) - len(todo) + start, len(places)),
            )  # fmt: skip
            if log and stream:
                append(stream, [log.row(pair, one) for (pair, _), one in judged])
            found |= {_key(place): one for place, one in judged}
            if cut and cut.interrupted:
                raise KeyboardInterrupt from None
            if cut and not cut.passing:
                raise cut
            if cut:
                lacking, failure = lacking + len(batch) - len(judged), str(cut)
    if lacking:
        raise ValueError(f"{lacking} judgments are missing: {failure}; {how}")
    return [found[_key(one)] for one in places]


def _judged(
    model: Answers,
    prompt: Prompt,
    sampling: SamplingParams,
    batch: Sequence[Place],
    progress: Progress,
) -> tuple[list[tuple[Place, Judgment]], CutShort | None]:
    """The judgments that came, and why others did not."""
    chats = [prompt.render(pair) for pair, _ in batch]
    replies: Sequence[list[Reply] | None]
    cut = None
    try:
        replies = model.answer(chats, sampling, progress=progress)
    except CutShort as error:
        replies, cut = error.replies, error
    answered = [(place, own) for place, own in zip(batch, replies, strict=True) if own is not None]
    places = [place for place, _ in answered]
    judgments = judgments_of(places, [own for _, own in answered])
    return list(zip(places, judgments, strict=True)), cut


def _key(place: Place) -> tuple[str, str]:
    pair, placement = place
    return pair.id, placement


def _draws(sampling: SamplingParams, first: Place, of_all: Place) -> SamplingParams:
    """How a batch is drawn: its first judgment decides, so that no two batches draw alike."""
    if first is of_all:
        return sampling
    told = repr((sampling.seed, *_key(first)))
    return replace(sampling, seed=int(hashlib.sha256(told.encode()).hexdigest()[:8], 16))


def _shifted(progress: Progress | None, before: int, total: int) -> Progress:
    """Progress within a batch as that of the whole."""

    def tell(done: int, _of_batch: int) -> None:
        if progress is not None:
            progress(before + done, total)

    return tell
