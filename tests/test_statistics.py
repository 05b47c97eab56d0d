"""Intervals: known values, edge cases, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from rmr1.statistics import (
    CLUSTERED_WILSON,
    WILSON,
    Ratio,
    clustered_wilson,
    paired_difference,
    percentiles,
    pooled,
    resample,
    wilson,
)


def test_wilson_known_values() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 3.8415 / 20) / (1 + 0.38415) = 0.71674, half width
    # 1.96 sqrt(0.016 + 3.8415 / 400) / 1.38415 = 0.22659: [0.4902, 0.9433].
    interval = wilson(0.8, 10)
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)
    # 0 of 10: low 0, high z^2 / (10 + z^2) = 3.8415 / 13.8415 = 0.27753; 10 of 10 mirrors it.
    assert wilson(0.0, 10).to_json() == [0.0, pytest.approx(0.27753, abs=1e-5)]
    assert wilson(1.0, 10).to_json() == [pytest.approx(1 - 0.27753, abs=1e-5), 1.0]
    with pytest.raises(ValueError, match="share"):
        wilson(1.2, 10)
    with pytest.raises(ValueError, match="trials"):
        wilson(0.5, 0)


def test_clusters_of_one_are_plain_wilson() -> None:
    interval = clustered_wilson([Ratio(1, 1)] * 8 + [Ratio(0, 1)] * 2)
    assert interval == wilson(0.8, 10)
    assert interval is not None
    assert interval.method == WILSON


def test_perfectly_dependent_placements_count_once() -> None:
    # Both placements of a pair always agree: 20 judgments carry what 10 pairs carry.
    clustered = clustered_wilson([Ratio(2, 2)] * 8 + [Ratio(0, 2)] * 2)
    assert clustered is not None
    assert clustered.to_json() == pytest.approx(wilson(0.8, 10).to_json())
    assert clustered.method == CLUSTERED_WILSON


def test_a_judge_that_always_says_a_still_gets_a_width() -> None:
    # Each pair is right once and wrong once: no variance between pairs. 20 judgments is the cap.
    interval = clustered_wilson([Ratio(1, 2)] * 10)
    assert interval is not None
    assert interval.to_json() == pytest.approx(wilson(0.5, 20).to_json())


def test_ends_and_emptiness() -> None:
    sure = clustered_wilson([Ratio(2, 2)] * 10)
    assert sure is not None
    assert sure.to_json() == pytest.approx(wilson(1.0, 10).to_json())  # pairs, not judgments
    assert clustered_wilson([]) is None
    assert clustered_wilson([Ratio(0, 0)] * 3) is None
    assert pooled([Ratio(0, 0)]) is None
    assert pooled([Ratio(1, 2), Ratio(1, 1)]) == pytest.approx(2 / 3)
    # Pairs without a parsed verdict carry nothing for the accuracy among parsed.
    assert clustered_wilson([Ratio(1, 2), Ratio(2, 2), Ratio(0, 0)]) == clustered_wilson(
        [Ratio(1, 2), Ratio(2, 2)]
    )


@pytest.mark.parametrize("pairs", [40, 250])
def test_coverage_under_dependent_placements(pairs: int) -> None:
    """The clustered interval holds the truth about 95 times in 100; the naive one far less.

    A pair is easy (right with 0.95) or hard (0.25), so its two placements agree too often;
    one judgment in ten is unparsed, so the number of trials varies.
    """
    random = np.random.default_rng(5)
    truth, runs, held, naive = 0.6, 400, 0, 0
    for _ in range(runs):
        right = np.where(random.random(pairs) < 0.5, 0.95, 0.25)
        parsed = random.random((pairs, 2)) < 0.9
        hits = (random.random((pairs, 2)) < right[:, None]) & parsed
        clusters = [
            Ratio(float(hit), float(trial))
            for hit, trial in zip(hits.sum(1), parsed.sum(1), strict=True)
        ]
        interval = clustered_wilson(clusters)
        share = pooled(clusters)
        assert interval is not None
        assert share is not None
        held += interval.low <= truth <= interval.high
        plain = wilson(share, float(parsed.sum()))
        naive += plain.low <= truth <= plain.high
    assert 0.92 <= held / runs <= 0.98
    assert naive / runs < held / runs - 0.02


def test_paired_difference_uses_the_pairing() -> None:
    random = np.random.default_rng(1)
    before = [Ratio(float(hit), 1) for hit in random.random(400) < 0.5]
    # After: the same answers, and 20 of the wrong ones put right: +20 / 400 = 0.05 exactly.
    wrong = [index for index, one in enumerate(before) if one.hits == 0][:20]
    after = [Ratio(1, 1) if index in wrong else one for index, one in enumerate(before)]
    difference = paired_difference(before, after)
    assert difference is not None
    assert difference.value == pytest.approx(0.05)
    # Sum of 400 draws with probability 0.05 each: standard error sqrt(0.05 x 0.95 / 400) = 0.0109.
    assert difference.interval.low == pytest.approx(0.05 - 1.96 * 0.0109, abs=0.004)
    assert difference.interval.high == pytest.approx(0.05 + 1.96 * 0.0109, abs=0.004)
    # Side by side, the two intervals overlap by far.
    old, new = clustered_wilson(before), clustered_wilson(after)
    assert old is not None
    assert new is not None
    assert old.high > new.low


def test_no_difference_is_noise_and_draws_are_seeded() -> None:
    random = np.random.default_rng(2)
    before = [Ratio(float(hit), 1) for hit in random.random(200) < 0.5]
    after = [Ratio(float(hit), 1) for hit in random.random(200) < 0.5]
    first, again = paired_difference(before, after), paired_difference(before, after)
    assert first is not None
    assert first == again
    assert first.interval.low < 0 < first.interval.high
    assert paired_difference([Ratio(0, 0)], [Ratio(1, 1)]) is None
    with pytest.raises(ValueError, match="same clusters"):
        paired_difference(before, after[:-1])


# --- Resampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clusters", "easy", "both_right"),
    [(30, 0.6, False), (200, 0.6, False), (40, 0.97, False), (25, 1.0, True)],
)
def test_coverage_of_a_figure_made_of_two_shares(
    clusters: int, easy: float, both_right: bool
) -> None:
    """The interval of a mean of two parts holds the truth about 95 times in 100.

    Each stratum has clusters of three judgments of its own part; a cluster is easy or hard, so its
    judgments depend on each other. `easy` near 1 is where a plain bootstrap has no width at times.
    """
    random = np.random.default_rng(7)
    runs, held, widths = 150, 0, []
    rights = [0.95, 1.0 if both_right else 0.9]
    truth = np.mean([easy * right + (1 - easy) * 0.2 for right in rights])
    strata = np.repeat([0, 1], clusters)
    for seed in range(runs):
        hits, trials = np.zeros((2 * clusters, 2)), np.zeros((2 * clusters, 2))
        for part, right in enumerate(rights):
            share = np.where(random.random(clusters) < easy, right, 0.2)
            hits[strata == part, part] = (random.random((3, clusters)) < share).sum(0)
            trials[strata == part, part] = 3
        figure = resample(hits, trials, strata, resamples=400, seed=seed).mean(axis=1)
        bounds = percentiles(figure)
        assert bounds is not None
        assert bounds[0] <= figure[0] <= bounds[1]
        held += bounds[0] <= truth <= bounds[1]
        widths.append(bounds[1] - bounds[0])
    assert 0.88 <= held / runs <= 1.0
    assert min(widths) > 0


def test_shares_of_one_resample_belong_together() -> None:
    # The second share is the first one's complement: their sum is 1 in every resample.
    random = np.random.default_rng(0)
    right = (random.random(50) < 0.7).astype(float)
    hits = np.stack([right, 1 - right], axis=1)
    found = resample(hits, np.ones_like(hits), np.zeros(50))
    assert found.shape == (2001, 2)
    assert found[0] == pytest.approx([right.mean(), 1 - right.mean()])
    assert found.sum(axis=1) == pytest.approx(np.ones(2001))
    assert np.array_equal(found, resample(hits, np.ones_like(hits), np.zeros(50)))


def test_a_share_without_variance_gets_the_width_of_jeffreys_interval() -> None:
    hits = np.ones((30, 1))
    bounds = percentiles(resample(hits, hits, np.zeros(30))[:, 0])
    assert bounds is not None
    # Beta(30.5, 0.5): 2.5% of it lie below 0.9196, its mean is 0.9839.
    assert bounds[0] == pytest.approx(1 - (0.9839 - 0.9196), abs=0.01)
    assert bounds[1] == 1.0
    single = percentiles(resample(np.ones((1, 1)), np.ones((1, 1)), np.zeros(1))[:, 0])
    assert single is not None
    assert single[0] < 0.5  # one item says next to nothing


def test_a_mean_of_shares_without_variance_is_not_pulled_to_the_middle() -> None:
    hits = np.zeros((3, 9))
    drawn = resample(hits, np.ones((3, 9)), np.zeros(3)).mean(axis=1)
    assert drawn[1:].mean() == pytest.approx(0, abs=0.01)


def test_a_share_without_trials_is_nan() -> None:
    hits = np.array([[1.0, 0.0], [0.0, 0.0]])
    found = resample(hits, np.array([[1.0, 0.0], [1.0, 0.0]]), np.zeros(2), resamples=10)
    assert np.isnan(found[:, 1]).all()
    assert percentiles(found[:, 1]) is None
