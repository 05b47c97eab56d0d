"""`rmr1 eval rmb --best_of_n round_robin | knockout`: does a judge find the best of a list?

RMB's own rule asks whether the best answer beats each loser; nobody who uses a judge to pick knows
which answer that is. Here the judge picks from the whole list by comparisons of two (best_of_n.py),
and is right where it picks the best one. An extra figure, which no benchmark's code computes.

Every comparison is a line of JSONL, from which a run goes on; both tournaments of one file may
share comparisons, as what is asked depends on the seed and on what was said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rmr1.answers import Answers, CutShort, Progress, Reply
from rmr1.best_of_n import Method, Ranking, go_on
from rmr1.data import Pair
from rmr1.engine.launch import Launch
from rmr1.evals.benchmark_files import JudgmentFiles
from rmr1.evals.benchmark_items import Dataset, Item, digest, plan
from rmr1.evals.benchmark_run import Making
from rmr1.judge import Answer, judgments_of, majority, pair_of
from rmr1.judgment_log import append, content_of
from rmr1.statistics import Ratio, clustered_wilson, pooled

Comparison = tuple[int, int]


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
        """Two of them, as they are shown."""
        first, second = (self.answers[number] for number in comparison)
        return pair_of(list(self.item.conversation), first, second)

    def goes_on(
        self, method: Method, verdicts: Mapping[Comparison, Answer | None], seed: int
    ) -> Ranking | tuple[Comparison, ...]:
        """The ranking, or the comparisons that it still needs."""
        drawn = int(digest(f"{seed}/{self.key}")[:8], 16)
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

    `progress` counts lists of this rank's share. Other arguments as `run_benchmark`.

    Raises:
        ValueError: there are no lists; the output is of another making; the judge failed (what was
            judged before is in the output); a rank is gone.
    """
    items = [one[0].item for one in plan(dataset, seed=making.seed, limit=limit)]
    lists = [Contenders(item) for item in items if item.part.startswith("bon/")]
    if not lists:
        raise ValueError("the data hold no best-of-n lists; nothing can be picked")
    files = JudgmentFiles(Path(output), place)
    name = digest(repr([method, making.fields(), [one.key for one in lists]]))
    rank, size = (place.rank, place.size) if place else (0, 1)
    with files.working(name), files.appending() as stream:
        known = _known(files, lists, making)
        share = lists[rank::size]
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            _settle(judge, batch, known, making, method, stream)
            if progress is not None:
                progress(start + len(batch), len(share))
    if rank:
        return None
    files.wait_for_all(name)
    files.merge(lambda row: (row["id"], str(row["first"]), str(row["second"])), [])
    return _figures(lists, _known(files, lists, making), making, method)


def _settle(
    judge: Answers,
    lists: Sequence[Contenders],
    known: dict[str, dict[Comparison, Answer | None]],
    making: Making,
    method: Method,
    stream: TextIO,
) -> None:
    """Round after round of all these tournaments, each round one batch, until they have ended."""
    while asked := list(_asked(lists, known, making, method)):
        pairs = [one.pair(comparison) for one, comparison in asked]
        chats = [making.prompt.render(pair) for pair in pairs]
        sampling = making.sampling(f"{asked[0][0].key}/{asked[0][1]}")
        replies: Sequence[list[Reply] | None]
        failure: BaseException | None = None
        try:
            replies = judge.answer(chats, sampling)
        except CutShort as cut:  # what was answered until then is kept
            replies, failure = cut.replies, KeyboardInterrupt() if cut.interrupted else cut
        rows = []
        for (one, comparison), pair, samples in zip(asked, pairs, replies, strict=True):
            if samples is None:
                continue
            found = majority(judgments_of([(pair, "ab")], [samples]))
            known[one.key][comparison] = found.verdict
            first, second = comparison
            rows.append(
                {"benchmark": "rmb", "best_of_n": True, "id": one.key, "first": first,
                 "second": second, "verdict": found.verdict, "text": found.text,
                 "skipped": found.skipped, "format_error": found.format_error,
                 "new_tokens": found.new_tokens, "content": content_of(pair), **making.fields()}
            )  # fmt: skip
        append(stream, rows)
        if failure is not None:
            raise failure


def _asked(
    lists: Sequence[Contenders],
    known: Mapping[str, Mapping[Comparison, Answer | None]],
    making: Making,
    method: Method,
) -> Iterator[tuple[Contenders, Comparison]]:
    for one in lists:
        wanted = one.goes_on(method, known[one.key], making.seed)
        if not isinstance(wanted, Ranking):
            for comparison in wanted:
                yield one, comparison


def _known(
    files: JudgmentFiles, lists: Sequence[Contenders], making: Making
) -> dict[str, dict[Comparison, Answer | None]]:
    """The verdicts that are there; ValueError when something else made one of them."""
    named = {one.key: one for one in lists}
    found: dict[str, dict[Comparison, Answer | None]] = defaultdict(dict)
    for path, number, row in files.rows():
        try:
            if not row["best_of_n"]:
                raise KeyError("best_of_n")
            comparison, one = (int(row["first"]), int(row["second"])), named.get(row["id"])
            wanted = making.fields()
            if one is not None:
                wanted["content"] = content_of(one.pair(comparison))
            for field, value in wanted.items():
                if row[field] != value:
                    raise ValueError(
                        f'{path}, line {number}: field "{field}" is {row[field]!r}, but this run'
                        f" has {value!r}; give another output file, or remove this one to start"
                        " over"
                    )
            found[row["id"]][comparison] = row["verdict"]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: no comparison of a best-of-n run ({error}); give another"
                " output file"
            ) from None
    return found


def _figures(
    lists: Sequence[Contenders],
    known: Mapping[str, Mapping[Comparison, Answer | None]],
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
    return {
        "benchmark": "rmb",
        "best_of_n": method,
        "lists": len(lists),
        "picked_right": pooled(clusters),
        "interval": bounds.to_json(),
        "by_chance": chance / len(lists),
        "comparisons": int(comparisons),
        "undecided": int(undecided),
        "categories": {name: pooled(own) for name, own in sorted(credit.items())},
        "made_by": making.fields(),
    }
