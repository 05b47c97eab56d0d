"""`rmr1 eval rewardbench | rm-bench | rmb`: a judge works through a benchmark.

Its judgments land in JSONL, batch by batch, in the format of rmr1/evals/score.py, with their text
and what made them; a run that was cut off goes on where it stopped, with any number of ranks
(rmr1/evals/benchmark_files.py). One vote is greedy, as the published figures are; several are
sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmr1.answers import Answers, CutShort, Progress, Reply
from rmr1.engine.launch import Launch
from rmr1.engine.sampling import SamplingParams
from rmr1.evals.benchmark_files import JudgmentFiles
from rmr1.evals.benchmark_items import Dataset, Showing, digest, plan
from rmr1.evals.judgment_rows import key_of, scored_rows
from rmr1.evals.score import Report, score_file
from rmr1.judge import Judgment, judgments_of, majority
from rmr1.judgment_log import append
from rmr1.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Making:
    """What makes a judgment. All of it stands in every row; rows that differ are not mixed.

    `model` names the judge (see `rmr1.models.model_id`). `votes` samples are drawn at `temperature`
    and the majority counts, equal numbers being a tie; one vote is greedy. `seed` is that of
    placements and draws. `temperature=None`: the server's own, of which nothing is known.
    """

    model: str
    prompt: Prompt
    seed: int = 0
    votes: int = 1
    temperature: float | None = 1.0
    max_new_tokens: int = 1024
    max_prompt_tokens: int | None = None
    dtype: str = ""

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise ValueError(f"votes must be at least 1, got {self.votes}")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError("several votes at temperature 0 are all the same; raise it")

    @property
    def drawn_at(self) -> float | None:
        """The temperature of a judgment."""
        return self.temperature if self.votes > 1 or self.temperature is None else 0.0

    def fields(self) -> dict[str, Any]:
        """What a row says about its making."""
        return {
            "model": self.model,
            "prompt_hash": self.prompt.hash,
            "seed": self.seed,
            "votes": self.votes,
            "temperature": self.drawn_at,
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "dtype": self.dtype,
        }

    def sampling(self, first: str) -> SamplingParams:
        """How a batch is drawn: its first judgment decides, so that no two batches draw alike."""
        drawn = int(digest(f"{self.seed}/{first}")[:8], 16)
        return SamplingParams(
            n=self.votes,
            temperature=self.drawn_at or 0.0,
            max_new_tokens=self.max_new_tokens,
            seed=drawn,
        )


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """What a run did. `score` is `score_file` of everything the output file holds.

    `resumed` judgments were there when this process looked, before it judged any.
    """

    output: Path
    judgments: int
    resumed: int
    dataset: Dataset
    score: Report

    def to_json(self) -> dict[str, Any]:
        """The score, and what a reader must know beside it."""
        return {
            **self.score,
            "judgments_file": str(self.output),
            "new": self.judgments - self.resumed,
            "resumed": self.resumed,
            "missing_from_data": list(self.dataset.missing),
            "repeated_ids": self.dataset.repeated_ids,
        }


def run_benchmark(
    judge: Answers,
    dataset: Dataset,
    making: Making,
    *,
    output: str | Path,
    limit: int | None = None,
    both_orders: bool = False,
    batch_size: int = 64,
    unparsed: float | None = None,
    place: Launch | None = None,
    progress: Progress | None = None,
) -> BenchmarkRun | None:
    """Judge a benchmark; judgments that `output` holds are not made again.

    `limit` takes so many items of each part (see `plan`); `both_orders` judges each pair twice. As
    rank `place` of a job this process judges its share of the items; the first rank waits for the
    others and scores, the others return None. `progress` counts judgments of the share, those
    found included. `unparsed` is what a judgment earns that names neither answer (score.py).

    Raises:
        ValueError: the output holds judgments of another making, or none of this benchmark; the
            judge failed (what was judged before is in the output); a rank is gone.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    planned = plan(dataset, seed=making.seed, both_orders=both_orders, limit=limit)
    showings = [showing for item in planned for showing in item]
    if not showings:
        raise ValueError("the data hold no items; nothing can be judged")
    files = JudgmentFiles(Path(output), place)
    name = digest(repr([making.fields(), [one.key for one in showings], place and place.size]))
    before = files.said_before()
    with files.working(name), files.appending() as stream:
        done = _done(files, dataset, making)
        rank, size = (place.rank, place.size) if place else (0, 1)
        share = [showing for item in planned[rank::size] for showing in item]
        todo = [showing for showing in share if showing.key not in done]
        batches = _judged(judge, making, todo, batch_size, len(share) - len(todo), progress)
        for batch, judgments in batches:
            append(stream, [_row(*one, making) for one in zip(batch, judgments, strict=True)])
    if rank:
        return None
    files.wait_for_all(name, before)
    files.merge(lambda row: key_of(row, dataset.benchmark), [one.key for one in showings])
    return BenchmarkRun(
        output=files.output,
        judgments=len(showings),
        resumed=sum(showing.key in done for showing in showings),
        dataset=dataset,
        score=score_file(files.output, dataset.benchmark, unparsed=unparsed),
    )


def _done(files: JudgmentFiles, dataset: Dataset, making: Making) -> set[tuple[str, ...]]:
    """Which judgments are there already.

    ValueError when something else made one of them, or when one is no judgment of these data: all
    that the file holds is scored at the end.
    """
    settings = {"benchmark": dataset.benchmark, **making.fields()}
    # Those of a larger limit, or of the other order, may be there too.
    everything = plan(dataset, seed=making.seed, both_orders=True)
    contents = {showing.key: showing.content for item in everything for showing in item}
    done = set()
    for path, number, row in files.rows():
        scored_rows([(number, row)], dataset.benchmark, where=str(path))
        key = key_of(row, dataset.benchmark)
        for field, value in {**settings, "content": contents.get(key)}.items():
            if row.get(field) != value:
                if field == "content" and value is None:
                    raise ValueError(
                        f"{path}, line {number}: a judgment of what is not in these data; give"
                        " another output file"
                    )
                raise ValueError(
                    f'{path}, line {number}: field "{field}" is {row.get(field)!r}, but this run'
                    f" has {value!r}; give another output file, or remove this one to start over"
                )
        done.add(key)
    return done


def _judged(
    judge: Answers,
    making: Making,
    todo: Sequence[Showing],
    batch_size: int,
    resumed: int,
    progress: Progress | None,
) -> Iterator[tuple[Sequence[Showing], list[Judgment]]]:
    """The judgments of `todo`, batch by batch. A vote's parts count when all of them are there."""
    tell: Progress = progress or (lambda _done, _total: None)
    total = resumed + len(todo)
    lacking, failure = 0, ""
    tell(resumed, total)
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]

        def within(done: int, _of_batch: int, before: int = resumed + start) -> None:
            tell(before + done // making.votes, total)

        chats = [making.prompt.render(showing.pair()) for showing in batch]
        try:
            replies = judge.answer(chats, making.sampling(str(batch[0].key)), progress=within)
        except CutShort as cut:  # what was answered until then is kept
            pairs = zip(batch, cut.replies, strict=True)
            answered = [(one, samples) for one, samples in pairs if samples is not None]
            if answered:
                kept, made = zip(*answered, strict=True)
                yield kept, _voted(kept, made)
            if cut.interrupted:
                raise KeyboardInterrupt from None
            if not cut.passing and (answered or start or resumed):
                raise ValueError(f"{cut}; `rmr1 score` scores what is there") from None
            if not cut.passing:
                raise
            lacking, failure = lacking + len(batch) - len(answered), str(cut)
            continue
        yield batch, _voted(batch, replies)
    if lacking:
        raise ValueError(_missing(lacking, failure))


def _missing(count: int, failure: str) -> str:
    """What to say where a judge failed at some prompts and answered the others."""
    return (
        f"{count} judgments are missing: {failure}; run the same again to make them, or `rmr1"
        " score` to score those that are there"
    )


def _voted(batch: Sequence[Showing], replies: Sequence[list[Reply]]) -> list[Judgment]:
    """The judgment of each showing, by the majority of its samples."""
    samples = judgments_of([(showing.pair(), "ab") for showing in batch], replies)
    votes = len(replies[0])
    return [majority(samples[at : at + votes]) for at in range(0, len(samples), votes)]


def _row(showing: Showing, judgment: Judgment, making: Making) -> dict[str, Any]:
    """One line of the file: the fields that `rmr1 score` reads, then what made the judgment."""
    return {
        "benchmark": showing.benchmark,
        "label": showing.label,
        **showing.contest.fields,
        "order": showing.order,
        "cluster": showing.item.cluster,
        "placement": "ab" if showing.label == "A" else "ba",  # "ab": the chosen answer comes first
        **outcome(judgment),
        "content": showing.content,
        **making.fields(),
    }


def outcome(judgment: Judgment) -> dict[str, Any]:
    """What a line says of the judgment itself; of a vote its samples too."""
    voted = {}
    if judgment.samples:
        voted = {
            "vote_counts": judgment.votes,
            "samples": [
                {
                    "verdict": one.verdict,
                    "text": one.text,
                    "new_tokens": one.new_tokens,
                    "finish_reason": one.finish_reason,
                    "format_error": one.format_error,
                }
                for one in judgment.samples
            ],
        }
    return {
        "verdict": judgment.verdict,
        "text": judgment.text,
        "format_error": judgment.format_error,
        "skipped": judgment.skipped,
        "prompt_tokens": judgment.prompt_tokens,
        "new_tokens": judgment.new_tokens,
        "finish_reason": judgment.finish_reason,
        **voted,
    }
