"""How well a model judges: accuracy with an interval, parse rate, swap consistency, by family.

Each pair is judged in both placements, so a judge that always says A scores 50%, not the share of
pairs whose label happens to be A. The two placements of one pair are one cluster in every
interval (see rmr1/statistics.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rmr1.answers import Answers, Progress
from rmr1.data import Pair
from rmr1.engine.generator import SamplingParams
from rmr1.judge import Judgment
from rmr1.pair_judging import PairLog, judge_both_orders
from rmr1.prompts import Prompt
from rmr1.statistics import (
    Difference,
    Interval,
    Ratio,
    clustered_wilson,
    paired_difference,
    pooled,
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Accuracy of a set of judgments. `accuracy` counts unparsed and skipped ones as wrong.

    `accuracy_parsed` and its interval are None when nothing was parsed. `n` counts pairs.
    """

    n: int
    judgments: int
    accuracy: float
    ci: Interval
    accuracy_parsed: float | None
    ci_parsed: Interval | None
    parse_rate: float

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values; intervals as [low, high]."""
        return {
            "accuracy": self.accuracy,
            "accuracy_parsed": self.accuracy_parsed,
            "parse_rate": self.parse_rate,
            "ci": self.ci.to_json(),
            "ci_parsed": self.ci_parsed.to_json() if self.ci_parsed else None,
            "n": self.n,
            "judgments": self.judgments,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate_pairs` found. `judgments` are all of them, in order, for the report.

    `swap_consistency`: of the pairs with a verdict in both placements, the share that name the
    same answer twice; None when there is no such pair. `position_bias`: the share of A among the
    verdicts A and B (0.5 is no bias); None without a verdict. `skipped` counts judgments whose
    prompt was too long. `mean_completion_length` is in tokens, over those that were generated.
    """

    figures: Figures
    families: dict[str, Figures]
    swap_consistency: float | None
    position_bias: float | None
    mean_completion_length: float | None
    skipped: int
    format_errors: dict[str, int]
    prompt_hash: str
    seed: int
    judgments: tuple[Judgment, ...]

    def to_json(self) -> dict[str, Any]:
        """Every figure, without the judgments."""
        return {
            **self.figures.to_json(),
            "ci_method": self.figures.ci.method,
            "swap_consistency": self.swap_consistency,
            "position_bias": self.position_bias,
            "mean_completion_length": self.mean_completion_length,
            "skipped_prompt_too_long": self.skipped,
            "format_errors": self.format_errors,
            "families": {name: figures.to_json() for name, figures in self.families.items()},
            "prompt_hash": self.prompt_hash,
            "seed": self.seed,
        }


def evaluate_pairs(
    model: Answers,
    pairs: Sequence[Pair],
    *,
    prompt: Prompt,
    sampling: SamplingParams,
    log: PairLog | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge `pairs` in both placements and sum up.

    `sampling` is normally greedy (temperature 0, n=1). `batch_size` judgments are made at a time
    and written to `log`, from which the same call goes on.

    Raises:
        ValueError: there are no pairs, two share an id (they would count as one), `sampling.n` is
            not 1; see also `judge_both_orders`.
    """
    if not pairs:
        raise ValueError("there are no pairs to evaluate; give at least one")
    if sampling.n != 1:
        raise ValueError(
            f"evaluation judges once a placement: sampling.n must be 1, got {sampling.n}"
        )
    repeated = [name for name, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"pair ids must be unique, {repeated[0]!r} occurs more than once")
    judgments = judge_both_orders(
        model,
        pairs,
        prompt=prompt,
        sampling=sampling,
        log=log,
        batch_size=batch_size,
        progress=progress,
    )
    return summarise(judgments, prompt_hash=prompt.hash, seed=sampling.seed)


def summarise(judgments: Sequence[Judgment], *, prompt_hash: str, seed: int) -> Evaluation:
    """The figures of judgments that are there already; see `Evaluation`."""
    if not judgments:
        raise ValueError("there are no judgments to sum up; give at least one")
    repeated = [
        key for key, count in Counter((one.id, one.placement) for one in judgments).items()
        if count > 1
    ]  # fmt: skip
    if repeated:
        raise ValueError(
            f"pair {repeated[0][0]!r} was judged more than once in placement {repeated[0][1]};"
            " pair ids must be unique, and one judgment a placement counts"
        )
    by_family: dict[str, list[Judgment]] = defaultdict(list)
    for one in judgments:
        by_family[one.source].append(one)
    verdicts = Counter(one.verdict for one in judgments)
    decided = verdicts["A"] + verdicts["B"]
    generated = [one for one in judgments if not one.skipped]
    return Evaluation(
        figures=_figures(judgments),
        families={name: _figures(by_family[name]) for name in sorted(by_family)},
        swap_consistency=_swap_consistency(judgments),
        position_bias=verdicts["A"] / decided if decided else None,
        mean_completion_length=(
            sum(one.new_tokens for one in generated) / len(generated) if generated else None
        ),
        skipped=len(judgments) - len(generated),
        format_errors=dict(sorted(Counter(one.format_error for one in generated).items())),
        prompt_hash=prompt_hash,
        seed=seed,
        judgments=tuple(judgments),
    )


def compare(before: Evaluation, after: Evaluation) -> tuple[Difference | None, Difference | None]:
    """after - before on the same pairs: accuracy, and accuracy among parsed, with intervals.

    The difference is taken pair by pair, which is sharper than laying two intervals side by side.
    """
    old, new = _by_pair(before.judgments), _by_pair(after.judgments)
    if old.keys() != new.keys():
        raise ValueError("the two evaluations judged different pairs; compare like with like")
    return (
        paired_difference([_ratio(old[name]) for name in old], [_ratio(new[name]) for name in old]),
        paired_difference(
            [_parsed_ratio(old[name]) for name in old], [_parsed_ratio(new[name]) for name in old]
        ),
    )


def _by_pair(judgments: Sequence[Judgment]) -> dict[str, list[Judgment]]:
    pairs: dict[str, list[Judgment]] = defaultdict(list)
    for one in judgments:
        pairs[one.id].append(one)
    return dict(pairs)


def _ratio(judgments: Sequence[Judgment]) -> Ratio:
    return Ratio(sum(one.correct for one in judgments), len(judgments))


def _parsed_ratio(judgments: Sequence[Judgment]) -> Ratio:
    return _ratio([one for one in judgments if one.verdict is not None])


def _figures(judgments: Sequence[Judgment]) -> Figures:
    pairs = _by_pair(judgments).values()
    every, parsed = [_ratio(pair) for pair in pairs], [_parsed_ratio(pair) for pair in pairs]
    accuracy, interval = pooled(every), clustered_wilson(every)
    assert accuracy is not None  # there is at least one judgment
    assert interval is not None
    return Figures(
        n=len(pairs),
        judgments=len(judgments),
        accuracy=accuracy,
        ci=interval,
        accuracy_parsed=pooled(parsed),
        ci_parsed=clustered_wilson(parsed),
        parse_rate=sum(one.verdict is not None for one in judgments) / len(judgments),
    )


def _swap_consistency(judgments: Sequence[Judgment]) -> float | None:
    agreements = []
    for pair in _by_pair(judgments).values():
        told = {one.placement: one.pair_verdict for one in pair}
        if len(told) == 2 and None not in told.values():
            agreements.append(told["ab"] == told["ba"])
    return sum(agreements) / len(agreements) if agreements else None
