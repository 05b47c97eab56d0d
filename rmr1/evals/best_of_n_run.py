"""`rmr1 eval rmb --best_of_n round_robin | knockout`: does a judge find the best of a list?

RMB's own rule asks whether the best answer beats each loser; nobody who uses a judge to pick knows
which answer that is. Here the judge picks from the whole list by comparisons of two (best_of_n.py),
and is right where it picks the best one. An extra figure, which no benchmark's code computes.

Every comparison is a line of JSONL, from which a run goes on; both tournaments of one file may
share comparisons, as what is asked depends on the seed and on what was said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rmr1.answers import Answers, CutShort, Progress, Reply
from rmr1.best_of_n import Method, Ranking, go_on
from rmr1.data import Pair
from rmr1.engine.launch import Launch
from rmr1.evals.benchmark_files import JudgmentFiles
from rmr1.evals.benchmark_items import Dataset, Item, digest, plan
from rmr1.evals.benchmark_run import Making, outcome
from rmr1.evals.judgment_rows import failures
from rmr1.judge import Judgment, judgments_of, majority
from rmr1.judgment_log import append, content_of
from rmr1.statistics import Ratio, clustered_wilson, pooled

Comparison = tuple[int, int]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Contenders:
    """A list: candidate 0 is the best one, which the tournament does not know."""

    item: Item

    @property
    def key(self) -> str:
        """What names the list in the file."""
        return f"{self.item.part}/{self.item.id}"

    @property
    def answers(self) -> list[str]:
        """The candidates."""
        contests = self.item.contests
        return [contests[0].chosen, *(contest.rejected for contest in contests)]

    def pair(self, comparison: Comparison) -> Pair:
        """Two of them, as they are shown. (The label means nothing.)"""
        first, second = (self.answers[number] for number in comparison)
        item = self.item
        return Pair(
            f"{self.key}/{comparison}", "rmb/bon", item.conversation, first, second, "A", item.kind
        )

    def goes_on(
        self, method: Method, known: Mapping[Comparison, Row], seed: int
    ) -> Ranking | tuple[Comparison, ...]:
        """The ranking, or the comparisons that it still needs."""
        drawn = int(digest(f"{seed}/{self.key}")[:8], 16)
        verdicts = {comparison: row["verdict"] for comparison, row in known.items()}
        return go_on(method, len(self.answers), verdicts, seed=drawn)


def pick_best(
    judge: Answers,
    dataset: Dataset,
    making: Making,
    *,
    method: Method,
    output: str | Path,
    limit: int | None = None,
    batch_size: int = 64,
    place: Launch | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Judge all lists to their end; the figures, or None on all ranks but the first.

    `batch_size` comparisons are judged, and saved, at a time. `progress` counts lists of this
    rank's share. Other arguments as `run_benchmark`.

    Raises:
        ValueError: there are no lists; the output is of another making; the judge failed (what was
            judged before is in the output); a rank is gone.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    lists = _lists(dataset, making, limit)
    if not lists:
        raise ValueError("the data hold no best-of-n lists; nothing can be picked")
    files = JudgmentFiles(Path(output), place)
    rank, size = (place.rank, place.size) if place else (0, 1)
    name = digest(repr([method, making.fields(), [one.key for one in lists], size]))
    before = files.said_before()
    with files.working(name), files.appending() as stream:
        known = _known(files, dataset, making)
        resumed = sum(len(known[one.key]) for one in lists)
        tournaments = _Tournaments(judge, making, method, known, batch_size)
        tournaments.settle(lists[rank::size], stream, progress or (lambda _done, _total: None))
    if rank:
        return None
    files.wait_for_all(name, before)
    rows = _known(files, dataset, making)
    rankings = [one.goes_on(method, rows[one.key], making.seed) for one in lists]
    if lacking := sum(not isinstance(one, Ranking) for one in rankings):
        raise ValueError(
            f"{files.output.parent}: {lacking} of {len(lists)} lists are in no rank's file to their"
            " end; run the same again to go on"
        )
    files.merge(lambda row: (row["id"], str(row["first"]), str(row["second"])), [])
    told = {"judgments_file": str(files.output), "resumed": resumed}
    return _figures(lists, rows, making, method) | told


@dataclass(frozen=True, slots=True)
class _Tournaments:
    """All lists' tournaments, a batch of comparisons at a time."""

    judge: Answers
    making: Making
    method: Method
    known: dict[str, dict[Comparison, Row]]
    batch_size: int

    def settle(self, lists: Sequence[Contenders], stream: TextIO, progress: Progress) -> None:
        """Ask until every tournament has ended; each batch is saved as soon as it is there.

        A tournament one of whose comparisons fails is left for the next run. ValueError at the end
        says how many.
        """
        going, lacking, left = list(lists), 0, ""
        while True:
            asked: list[tuple[Contenders, Comparison]] = []
            still = []
            for at, one in enumerate(going):
                if len(asked) >= self.batch_size:
                    still += going[at:]
                    break
                wanted = one.goes_on(self.method, self.known[one.key], self.making.seed)
                if not isinstance(wanted, Ranking):
                    still.append(one)
                    asked += [(one, comparison) for comparison in wanted]
            going = still
            progress(len(lists) - len(going) - lacking, len(lists))
            if not asked:
                break
            failure = self._ask(asked[: self.batch_size], stream)
            if failure is not None:
                lost = {one.key for one, comparison in asked[: self.batch_size]
                        if comparison not in self.known[one.key]}  # fmt: skip
                going = [one for one in going if one.key not in lost]
                lacking, left = lacking + len(lost), str(failure)
        if lacking:
            raise ValueError(
                f"{lacking} lists are not judged to their end: {left}; run the same again to go on"
            )

    def _ask(
        self, asked: Sequence[tuple[Contenders, Comparison]], stream: TextIO
    ) -> CutShort | None:
        """Judge and save; the failure where only some comparisons failed."""
        pairs = [one.pair(comparison) for one, comparison in asked]
        chats = [self.making.prompt.render(pair) for pair in pairs]
        sampling = self.making.sampling(f"{asked[0][0].key}/{asked[0][1]}")
        replies: Sequence[list[Reply] | None]
        failure: CutShort | None = None
        try:
            replies = self.judge.answer(chats, sampling)
        except CutShort as cut:  # what was answered until then is kept
            replies, failure = cut.replies, cut
        rows = []
        for (one, comparison), pair, samples in zip(asked, pairs, replies, strict=True):
            if samples is not None:
                found = majority(judgments_of([(pair, "ab")], [samples]))
                row = _row(one, comparison, pair, found, self.making)
                self.known[one.key][comparison] = row
                rows.append(row)
        append(stream, rows)
        if failure is None or failure.passing:
            return failure
        raise KeyboardInterrupt if failure.interrupted else failure


def _lists(dataset: Dataset, making: Making, limit: int | None) -> list[Contenders]:
    items = [one[0].item for one in plan(dataset, seed=making.seed, limit=limit)]
    return [Contenders(item) for item in items if item.part.startswith("bon/")]


def _row(
    one: Contenders, comparison: Comparison, pair: Pair, found: Judgment, making: Making
) -> dict[str, Any]:
    """One line of the file."""
    first, second = comparison
    return {
        "benchmark": "rmb",
        "best_of_n": True,
        "id": one.key,
        "first": first,
        "second": second,
        **outcome(found),
        "content": content_of(pair),
        **making.fields(),
    }


def _known(
    files: JudgmentFiles, dataset: Dataset, making: Making
) -> dict[str, dict[Comparison, Row]]:
    """The comparisons that are there, by list; ValueError when something else made one of them."""
    named = {one.key: one for one in _lists(dataset, making, None)}
    found: dict[str, dict[Comparison, Row]] = defaultdict(dict)
    for path, number, row in files.rows():
        try:
            if not row["best_of_n"]:
                raise KeyError("best_of_n")
            comparison = int(row["first"]), int(row["second"])
            one = named[row["id"]]
            wanted = making.fields() | {"content": content_of(one.pair(comparison))}
            for field, value in wanted.items():
                if row[field] != value:
                    raise ValueError(
                        f'{path}, line {number}: field "{field}" is {row[field]!r}, but this run'
                        f" has {value!r}; give another output file, or remove this one to start"
                        " over"
                    )
            found[one.key][comparison] = row
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: no comparison of a best-of-n run on these lists"
                f" ({error}); give another output file"
            ) from None
    return found


def _figures(
    lists: Sequence[Contenders],
    known: Mapping[str, Mapping[Comparison, Row]],
    making: Making,
    method: Method,
) -> dict[str, Any]:
    """How often the best one is picked; candidates that share the first place share the credit."""
    credit: dict[str, list[Ratio]] = defaultdict(list)
    by_cluster: dict[str, list[float]] = defaultdict(list)
    chance = undecided = comparisons = 0.0
    for one in lists:
        ranking = one.goes_on(method, known[one.key], making.seed)
        assert isinstance(ranking, Ranking)
        first = [number for number, place in enumerate(ranking.places) if place == 1]
        right = (0 in first) / len(first)
        credit[one.item.part.removeprefix("bon/")].append(Ratio(right, 1.0))
        by_cluster[one.item.cluster].append(right)
        chance += 1 / len(one.answers)
        undecided += len(ranking.undecided)
        comparisons += ranking.comparisons
    clusters = [Ratio(sum(own), len(own)) for own in by_cluster.values()]
    bounds = clustered_wilson(clusters)
    assert bounds is not None
    judged = [row for one in lists for row in known[one.key].values()]
    return {
        "benchmark": "rmb",
        "best_of_n": method,
        "lists": len(lists),
        "picked_right": pooled(clusters),
        "interval": bounds.to_json(),
        "by_chance": chance / len(lists),
        "comparisons": int(comparisons),
        "undecided": int(undecided),
        "parse_failures": dict(failures(judged).most_common()),
        "categories": {name: pooled(own) for name, own in sorted(credit.items())},
        "made_by": making.fields(),
    }
