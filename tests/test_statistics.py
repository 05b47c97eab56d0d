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
    pooled,
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
