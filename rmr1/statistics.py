"""Intervals for accuracies whose judgments come in clusters (two placements of one pair).

Single accuracies get a Wilson interval, as follows; figures that are put together from many shares
(a benchmark's total) are resampled, by `resample` below.

A cluster is one pair. Its judgments share the pair, so they are not independent: a pair that is
hard in one placement is hard in the other. An interval that counts them as independent is too
narrow. Here an accuracy is a ratio of sums over clusters (right judgments by judgments), its
variance is the linearised cluster variance, and that variance sets the *effective* number of
judgments for a Wilson interval. Wilson's form keeps the interval inside [0, 1] and honest near
its ends, where a normal interval has no width. With one judgment a cluster it is exactly Wilson's.

Sources: Wilson (1927); Dean and Pagano (2015) for the effective sample size in survey proportions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054  # the 97.5% point of the normal distribution

WILSON = "wilson"
CLUSTERED_WILSON = "wilson, effective sample size from pairs as clusters"
PAIRED_BOOTSTRAP = "paired bootstrap over pairs, percentile"
BOOTSTRAP = "stratified bootstrap over prompts, percentile, 95%"
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval and the name of the method that made it."""

    low: float
    high: float
    method: str

    def to_json(self) -> list[float]:
        """The two ends, low first."""
        return [self.low, self.high]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Right judgments (`hits`) out of those that count (`trials`) in one cluster."""

    hits: float
    trials: float


@dataclass(frozen=True, slots=True)
class Difference:
    """after - before, with the 95% interval of that difference."""

    value: float
    interval: Interval


def wilson(share: float, trials: float, *, method: str = WILSON) -> Interval:
    """Wilson's 95% interval of a share in [0, 1] seen in `trials` > 0 independent trials.

    `trials` may be a fraction: an effective sample size.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"argument share must lie in [0, 1], got {share}")
    if trials <= 0:
        raise ValueError(f"argument trials must be positive, got {trials}")
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    half /= 1 + z2 / trials
    # Rounding may push an end a hair beyond the share itself (0 right of 10 gives low = 1e-17).
    return Interval(
        max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)), method
    )


def pooled(clusters: Sequence[Ratio]) -> float | None:
    """Hits by trials over all clusters; None when nothing was tried."""
    trials = sum(cluster.trials for cluster in clusters)
    return sum(cluster.hits for cluster in clusters) / trials if trials else None


def clustered_wilson(clusters: Sequence[Ratio]) -> Interval | None:
    """The 95% interval of `pooled(clusters)`; None when nothing was tried.

    Clusters without trials carry nothing and are left out. The effective sample size is
    share (1 - share) / variance, where the variance is sum((hits - share trials)^2) / trials^2.
    It is never taken above the number of judgments: a judge that always says A has no variance
    between pairs at all, and an interval of no width would claim too much. At a share of 0 or 1
    the variance says nothing; there the number of clusters is the (careful) sample size.
    """
    clusters = [cluster for cluster in clusters if cluster.trials > 0]
    share = pooled(clusters)
    if share is None:
        return None
    if all(cluster.trials == 1 for cluster in clusters):
        return wilson(share, len(clusters))
    trials = sum(cluster.trials for cluster in clusters)
    if share in (0.0, 1.0):
        return wilson(share, len(clusters), method=CLUSTERED_WILSON)
    variance = sum((c.hits - share * c.trials) ** 2 for c in clusters) / trials**2
    effective = share * (1 - share) / variance if variance > 0 else trials
    return wilson(share, min(effective, trials), method=CLUSTERED_WILSON)


def paired_difference(
    before: Sequence[Ratio], after: Sequence[Ratio], *, resamples: int = 4000, seed: int = 0
) -> Difference | None:
    """pooled(after) - pooled(before) for the same clusters in the same order, by bootstrap.

    Whole clusters are drawn, the same ones on both sides, so what the two models share (hard and
    easy pairs) cancels. None when one side tried nothing, as a whole or in some resample.
    """
    if len(before) != len(after):
        raise ValueError(
            f"both sides must hold the same clusters, got {len(before)} before and"
            f" {len(after)} after"
        )
    first, second = pooled(before), pooled(after)
    if first is None or second is None:
        return None
    rows = np.array(
        [
            (old.hits, old.trials, new.hits, new.trials)
            for old, new in zip(before, after, strict=True)
        ],
        dtype=np.float64,
    )  # [clusters, 4]
    random = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for index in range(resamples):
        sums = rows[random.integers(0, len(rows), len(rows))].sum(axis=0)  # [4]
        if sums[1] == 0 or sums[3] == 0:
            return None
        differences[index] = sums[2] / sums[3] - sums[0] / sums[1]
    low, high = np.quantile(differences, [0.025, 0.975])
    return Difference(second - first, Interval(float(low), float(high), PAIRED_BOOTSTRAP))


def resample(
    hits: np.ndarray,  # [C, K]
    trials: np.ndarray,  # [C, K]
    strata: np.ndarray,  # [C]
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """K shares of C clusters as they are and resampled: [1 + resamples, K], NaN without trials.

    Row 0 is hits by trials over all clusters. In every other row each stratum (whose size the
    benchmark fixes) gives as many clusters as it has, drawn with replacement, the same ones for all
    shares: what is computed from a row keeps the dependence between shares.

    A share that is the same in every cluster of a stratum (all of them right, say) has no variance
    to draw from, and would get an interval of no width. There it is drawn with the spread, about
    its own value, of Jeffreys' posterior for as many judgments as there are clusters. Such a draw
    may lie outside [0, 1]: without the shift to its own value, a figure that is the mean of many
    such shares would be pulled towards one half.
    """
    random = np.random.default_rng(seed)
    shares = hits.shape[1]
    sums = np.zeros((resamples, 2 * shares))
    for stratum in np.unique(strata):
        own = strata == stratum
        # Equal clusters are exchangeable: how often each kind is drawn is all that matters.
        kinds, counts = np.unique(
            np.hstack([hits[own], trials[own]]), axis=0, return_counts=True
        )  # [kinds, 2K], [kinds]
        size = int(counts.sum())
        drawn = random.multinomial(size, counts / size, size=resamples) @ kinds  # [R, 2K]
        for share in range(shares):
            hit, tried = kinds[:, share], kinds[:, shares + share]
            total = float(counts @ tried)
            mean = float(counts @ hit) / total if total else 0.0
            if total and np.allclose(hit, mean * tried):
                clusters = int(counts[tried > 0].sum())
                right, wrong = mean * clusters + 0.5, (1 - mean) * clusters + 0.5
                spread = random.beta(right, wrong, size=resamples) - right / (right + wrong)
                drawn[:, share] = (mean + spread) * drawn[:, shares + share]
        sums += drawn
    whole = np.hstack([hits.sum(axis=0), trials.sum(axis=0)])  # [2K]
    rows = np.vstack([whole, sums])  # [1 + R, 2K]
    with np.errstate(invalid="ignore"):
        found: np.ndarray = rows[:, :shares] / rows[:, shares:]
    return found


def percentiles(figure: np.ndarray) -> tuple[float, float] | None:
    """The 95% interval of a share computed from `resample`'s rows [1 + R]; None where it is NaN.

    It lies in [0, 1] and always holds the share itself, row 0.
    """
    drawn = figure[1:][~np.isnan(figure[1:])]
    if np.isnan(figure[0]) or not len(drawn):
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    own = float(figure[0])
    return max(0.0, min(float(low), own)), min(1.0, max(float(high), own))
