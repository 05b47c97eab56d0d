"""`rmr1 score`: judgments in, a benchmark's figures out, by the benchmark's official rule.

A judgment is one JSONL row: {"benchmark", "id", "label": "A|B", "verdict": "A|B|tie|null"} and
  rewardbench: "subset"
  rm-bench:    "domain", "chosen_index", "rejected_index" (0 concise, 1 detailed, 2 markdown)
  rmb:         "set": "pairwise|bon", "category_path", and in best-of-n rows "bon_uid"
`null` is a judgment whose verdict could not be read. Rows that `rmr1 eval` wrote say more, which is
used where it is there: "cluster" (what judgments share), "order" (1: the seeded placement, 2: the
other one), "losers" (the length of a best-of-n list), why there is no verdict, what made the row.

Rows of both orders of one pair are simply averaged: a pair's credit is the mean of both. A
best-of-n list is right in an order when its best answer beats every loser in that order; its credit
is the mean over the orders. A part without any judgment is None and named in "missing".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rmr1.data import read_rows
from rmr1.evals.judgment_rows import Benchmark, ScoredRow, failures, made_by, scored_rows
from rmr1.evals.score_rules import (
    EVERY,
    STYLES,
    Part,
    parts_of,
    rewardbench,
    rm_bench,
    rmb,
)
from rmr1.statistics import BOOTSTRAP, percentiles, resample

Report = dict[str, Any]

# What upstream gives a judgment that names neither answer, a tie included.
_OFFICIAL_CREDIT: dict[Benchmark, float] = {"rewardbench": 0.5, "rm-bench": 0.0, "rmb": 0.0}

_PARSED: Part = ("parsed",)
_AGREES: Part = ("both orders agree",)
_SAYS_A: Part = ("says A",)


class _Tally:
    """Hits and trials by cluster and part, which is what is resampled."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.columns = {part: column for column, part in enumerate(parts)}
        self.clusters: dict[tuple[str, str], int] = {}
        self.places: list[tuple[int, int]] = []
        self.hits: list[float] = []

    def add(self, row: ScoredRow, part: Part, hit: float) -> None:
        cluster = self.clusters.setdefault((row.stratum, row.cluster), len(self.clusters))
        self.places.append((cluster, self.columns[part]))
        self.hits.append(hit)

    def shares(self) -> dict[Part, np.ndarray]:
        """Each part's share and its resamples, [1 + R]."""
        size = len(self.clusters), len(self.columns)
        hits, trials = np.zeros(size), np.zeros(size)
        at = tuple(np.array(self.places).T)
        np.add.at(hits, at, self.hits)
        np.add.at(trials, at, 1.0)
        _, strata = np.unique([stratum for stratum, _ in self.clusters], return_inverse=True)
        rows = resample(hits, trials, strata)  # [1 + R, K]
        return {part: rows[:, column] for part, column in self.columns.items()}


def _tallied(rows: Sequence[ScoredRow], benchmark: Benchmark) -> tuple[_Tally, int, int]:
    """The tally of all rows, how many pairs were judged in both orders, and the broken lists."""
    tally = _Tally([*dict.fromkeys([EVERY, *parts_of(benchmark), _PARSED, _AGREES, _SAYS_A])])
    lists: dict[tuple[Part, tuple[str, ...]], list[ScoredRow]] = defaultdict(list)
    pairs: dict[tuple[str, ...], dict[str, ScoredRow]] = defaultdict(dict)
    for row in rows:
        tally.add(row, EVERY, row.credit)
        tally.add(row, _PARSED, float(row.verdict is not None))
        if row.verdict in ("A", "B"):
            tally.add(row, _SAYS_A, float(row.verdict == "A"))
        if row.list_:
            lists[row.part, row.list_].append(row)
        else:
            tally.add(row, row.part, row.credit)
        pairs[row.key][row.label] = row
    broken = 0
    for (part, _), own in lists.items():
        if len({row.key for row in own}) < own[0].losers:
            broken += 1  # who was cut off before the end has not beaten every loser
            continue
        # A list is right only when its best answer beats every loser; one miss loses the list.
        tally.add(own[0], part, float(min(row.credit for row in own) == 1))
    both = [pair for pair in pairs.values() if len(pair) == 2]
    for pair in both:
        first, second = pair["A"].verdict, pair["B"].verdict
        if first is not None and second is not None:
            # The same answer twice is the other letter, as the answers were exchanged.
            tally.add(pair["A"], _AGREES, float({"A": "B", "B": "A"}.get(first, first) == second))
    return tally, len(both), broken


def _split(figures: Any) -> tuple[Any, Any]:
    """Nested arrays [1 + R] become nested values and nested intervals, None where there is none."""
    if isinstance(figures, dict):
        both = {name: _split(value) for name, value in figures.items()}
        return {n: v for n, (v, _) in both.items()}, {n: i for n, (_, i) in both.items()}
    if isinstance(figures, list):
        pairs = [_split(value) for value in figures]
        return [value for value, _ in pairs], [bounds for _, bounds in pairs]
    bounds = percentiles(figures)
    return None if np.isnan(figures[0]) else float(figures[0]), list(bounds) if bounds else None


def _missing(values: Report, benchmark: Benchmark) -> list[str]:
    """The parts of a benchmark that have no judgment."""
    if benchmark == "rewardbench":
        return [n for n, value in (values["sections"] | values["subsets"]).items() if value is None]
    if benchmark == "rmb":
        names = [f"{part}_{goal}" for part, goal in parts_of("rmb")]
        return [name for name in names if values[name] is None]
    missing = []
    for name, matrix in values["matrices"].items():
        empty = [(i, j) for i in range(3) for j in range(3) if matrix[i][j] is None]
        missing += (
            [name]
            if len(empty) == 9
            else [f"{name}: chosen {STYLES[i]}, rejected {STYLES[j]}" for i, j in empty]
        )
    return missing


def credit_unparsed(benchmark: Benchmark, wanted: float | None) -> float:
    """What a judgment earns that names neither answer; None is the official value."""
    if benchmark not in get_args(Benchmark):
        raise ValueError(
            f"benchmark must be one of {', '.join(get_args(Benchmark))}, got {benchmark!r}"
        )
    credit = _OFFICIAL_CREDIT[benchmark] if wanted is None else float(wanted)
    if credit not in (0.0, 0.5) or (credit and benchmark != "rewardbench"):
        raise ValueError(
            "argument unparsed must be 0 or, for rewardbench only, 0.5,"
            f" got {wanted!r} for {benchmark}"
        )
    return credit


def score_rows(
    rows: Iterable[tuple[int, Any]],
    benchmark: Benchmark,
    *,
    where: str = "judgments",
    unparsed: float | None = None,
) -> Report:
    """Score (line number, decoded row) pairs; see `score_file`. `where` names them in errors."""
    credit = credit_unparsed(benchmark, unparsed)
    numbered = list(rows)
    scored = scored_rows(numbered, benchmark, where=where, unparsed=credit)
    if not scored:
        raise ValueError(f"{where}: the file holds no judgments")
    decoded = [row for _, row in numbered]
    tally, both, broken = _tallied(scored, benchmark)
    shares = tally.shares()
    values, intervals = _split(
        {
            **{"rewardbench": rewardbench, "rm-bench": rm_bench, "rmb": rmb}[benchmark](shares),
            "parse_failure_rate": 1 - shares[_PARSED],
            "swap_consistency": shares[_AGREES],
            "position_bias": shares[_SAYS_A],
        }
    )
    missing = _missing(values, benchmark)
    of_rmb: Report = {}
    if benchmark == "rmb":
        of_rmb["bon_lists"] = len({row.list_[:2] for row in scored if row.list_})
        missing += [f"the rest of {broken} best-of-n lists"] if broken else []
    return {
        "benchmark": benchmark,
        **values,
        **of_rmb,
        "missing": missing,
        "n": len(scored),
        "pairs": len({row.key for row in scored}),
        "pairs_in_both_orders": both,
        "parse_failures": dict(failures(decoded).most_common()),
        "ties": sum(row.verdict == "tie" for row in scored),
        "unparsed_credit": credit,
        "duplicates": len(scored) - len({(row.key, row.label) for row in scored}),
        "made_by": made_by(decoded),
        "intervals": intervals,
        "interval_method": BOOTSTRAP,
    }


def score_file(path: str | Path, benchmark: Benchmark, *, unparsed: float | None = None) -> Report:
    """Score a JSONL file of judgments by the official rule of its benchmark.

    Accuracies lie in [0, 1]; one that has no judgments is None and named in "missing".
    `unparsed` is what a judgment earns that names neither answer (null or a tie): None takes the
    official value, 0.5 for RewardBench and 0 for the others; RM-R1 counts 0 in RewardBench too.
    "duplicates" counts rows that repeat another row's place, id and label: they are scored, and a
    number above 0 says that two runs were joined. "intervals" mirrors the figures: 95%, by a seeded
    bootstrap over clusters. ValueError names the file, the line and the field.
    """
    return score_rows(read_rows(path), benchmark, where=str(path), unparsed=unparsed)
