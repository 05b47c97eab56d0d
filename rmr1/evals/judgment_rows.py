"""One row of a file of judgments: what tells it apart, and what the scorer reads in it.

See rmr1/evals/score.py for the fields.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rmr1.evals.score_rules import REWARDBENCH_SUBSETS, RM_BENCH_DOMAINS, RMB_GOALS, Part

Benchmark = Literal["rewardbench", "rm-bench", "rmb"]

# What tells judgments apart, besides the placement.
KEYS: dict[Benchmark, tuple[str, ...]] = {
    "rewardbench": ("subset", "id"),
    "rm-bench": ("domain", "id", "chosen_index", "rejected_index"),
    "rmb": ("set", "category_path", "bon_uid", "id"),
}
_MADE_BY = ("model", "prompt_hash", "seed", "votes", "temperature", "max_new_tokens", "dtype")


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One judgment reduced to what the rules need: where it counts and what it earns.

    `key` names the pair; `list_` the best-of-n list in one order, () for a row of no list.
    """

    part: Part
    stratum: str
    cluster: str
    key: tuple[str, ...]
    label: str
    verdict: str | None
    credit: float
    list_: tuple[str, ...] = ()
    losers: int = 0


def key_of(row: Mapping[str, Any], benchmark: Benchmark) -> tuple[str, ...]:
    """What identifies a judgment in a file: its pair, then its label."""
    return (*(str(row.get(field, "")) for field in KEYS[benchmark]), str(row.get("label")))


def _choice(row: Mapping[str, Any], field: str, allowed: Sequence[Any]) -> Any:
    """A field that must hold one of a few values."""
    wanted = ", ".join("null" if value is None else str(value) for value in allowed)
    if field not in row:
        raise ValueError(f'field "{field}" is missing; it must be one of {wanted}')
    value = row[field]
    # 0 == False and 1 == True in Python; a JSON true is no style index.
    if isinstance(value, bool) or not any(value == option for option in allowed):
        raise ValueError(f'field "{field}" must be one of {wanted}, got {value!r}')
    return value


def _name(row: Mapping[str, Any], field: str) -> str:
    """A field that names something: a non-empty text or a whole number."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        found = "is missing" if field not in row else f"is {value!r}"
        raise ValueError(f'field "{field}" {found}; it must be a text or a whole number')
    return str(value)


def _part(row: Mapping[str, Any], benchmark: Benchmark) -> tuple[Part, str, str]:
    """Where a row counts, the stratum that it is resampled in, and its cluster if none is told."""
    if benchmark == "rewardbench":
        subset = str(_choice(row, "subset", list(REWARDBENCH_SUBSETS)))
        return (subset,), subset, _name(row, "id")
    if benchmark == "rm-bench":
        domain = str(_choice(row, "domain", list(RM_BENCH_DOMAINS)))
        chosen, rejected = (
            int(_choice(row, field, [0, 1, 2])) for field in ("chosen_index", "rejected_index")
        )
        return (RM_BENCH_DOMAINS[domain], chosen, rejected), domain, _name(row, "id")
    part = str(_choice(row, "set", ["pairwise", "bon"]))
    path = _name(row, "category_path")
    steps = {step.strip().lower() for step in path.split("/")}
    goals = [goal for goal in RMB_GOALS if goal in steps]
    if len(goals) != 1:
        raise ValueError(
            'field "category_path" must hold one of the steps Helpfulness and Harmlessness,'
            f" got {path!r}"
        )
    own = _name(row, "bon_uid" if part == "bon" else "id")
    return (part, goals[0]), goals[0], f"{path}/{own}"


def _scored(row: Any, benchmark: Benchmark, unparsed: float) -> ScoredRow:
    """Check one decoded row; ValueError names the field that is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"a judgment must be a JSON object, got {type(row).__name__}")
    _choice(row, "benchmark", [benchmark])
    _name(row, "id")
    label = str(_choice(row, "label", ["A", "B"]))
    verdict = _choice(row, "verdict", ["A", "B", "tie", None])
    part, stratum, cluster = _part(row, benchmark)
    credit = float(verdict == label) if verdict in ("A", "B") else unparsed
    *key, _ = key_of(row, benchmark)
    of_list: tuple[str, ...] = ()
    if part[0] == "bon":
        of_list = (row["category_path"], str(row["bon_uid"]), str(row.get("order", 1)))
    losers = row.get("losers", 0)
    if isinstance(losers, bool) or not isinstance(losers, int):
        raise ValueError(f'field "losers" must be a whole number, got {losers!r}')
    return ScoredRow(
        part, stratum, str(row.get("cluster", cluster)), tuple(key), label, verdict, credit,
        of_list, losers,
    )  # fmt: skip


def scored_rows(
    rows: Iterable[tuple[int, Any]], benchmark: Benchmark, *, where: str, unparsed: float = 0.0
) -> list[ScoredRow]:
    """Check (line number, decoded row) pairs. ValueError names `where`, the line and the field."""
    scored = []
    for number, row in rows:
        try:
            scored.append(_scored(row, benchmark, unparsed))
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None
    return scored


def failures(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Why judgments have no verdict; of a vote each sample counts."""
    kinds: Counter[str] = Counter()
    for row in rows:
        samples = row.get("samples")
        for one in samples if isinstance(samples, list) and samples else [row]:
            if not isinstance(one, dict) or one.get("verdict") is not None:
                continue
            if skipped := row.get("skipped"):
                kinds[f"skipped ({str(skipped).split(':')[0]})"] += 1
            elif one.get("finish_reason") == "length":
                kinds["cut by max_new_tokens"] += 1
            else:
                kinds[str(one.get("format_error") or "not told")] += 1
    return kinds


def made_by(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What made the rows, as far as they say: a value, or a list where they differ."""
    found = {}
    for field in _MADE_BY:
        values = {json.dumps(row[field]): row[field] for row in rows if field in row}
        if values:
            found[field] = next(iter(values.values())) if len(values) == 1 else [*values.values()]
    return found
