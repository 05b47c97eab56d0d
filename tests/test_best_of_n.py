"""Tournaments over n candidates: the best wins, batches are whole rounds, ties are said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from benchmark_judges import Judge, says_a, verdict

from rmr1.best_of_n import Compare, Ranking, comparer, knockout, round_robin
from rmr1.engine.sampling import SamplingParams
from rmr1.judge import BOTH_PLACEMENTS, Answer
from rmr1.prompts import load_prompt

Batches = list[list[tuple[int, int]]]


def by_worth(worth: Sequence[float], batches: Batches | None = None) -> Compare:
    """The worthier wins; equal worth is a tie."""

    def compare(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
        if batches is not None:
            batches.append(list(pairs))
        return [
            "tie" if worth[i] == worth[j] else "A" if worth[i] > worth[j] else "B" for i, j in pairs
        ]

    return compare


@pytest.mark.parametrize("count", range(1, 18))
def test_the_best_wins_either_way(count: int) -> None:
    worth = [(number * 7) % count for number in range(count)]
    if len(set(worth)) < count:
        worth = list(range(count))
    best = worth.index(max(worth))
    for seed in range(3):
        batches: Batches = []
        found = round_robin(count, by_worth(worth, batches), seed=seed)
        assert found.best == best
        assert list(found.order) == sorted(range(count), key=lambda i: -worth[i])
        assert found.places == tuple(count - worth[i] for i in range(count))
        assert found.wins == tuple(worth)
        assert found.comparisons == count * (count - 1) // 2
        assert len(batches) == min(1, found.comparisons)  # one batch
        batches.clear()
        found = knockout(count, by_worth(worth, batches), seed=seed)
        assert found.best == best
        assert found.comparisons == sum(map(len, batches)) == count - 1
        assert len(batches) == (count - 1).bit_length()
        assert sum(found.wins) == count - 1
        assert found.places[best] == 1
        assert sorted(found.order) == list(range(count))
        assert found.undecided == ()


@pytest.mark.parametrize("count", [3, 5, 6, 9, 13])
def test_nobody_has_two_byes(count: int) -> None:
    for seed in range(20):
        batches: Batches = []
        knockout(count, by_worth(range(count), batches), seed=seed)
        left = set(range(count))
        byes: Counter[int] = Counter()
        for pairs in batches:
            playing = {one for pair in pairs for one in pair}
            byes.update(left - playing)
            left -= {min(pair) for pair in pairs}  # who is worth less
        assert max(byes.values(), default=0) <= 1
        assert sum(byes.values()) == (1 << (count - 1).bit_length()) - count


def test_brackets_and_sides_are_drawn_by_the_seed() -> None:
    def batches_of(seed: int) -> Batches:
        batches: Batches = []
        knockout(16, by_worth(range(16), batches), seed=seed)
        return batches

    assert batches_of(0) == batches_of(0)
    assert batches_of(0) != batches_of(1)
    first = Counter(i > j for seed in range(60) for pairs in batches_of(seed) for i, j in pairs)
    assert 360 < first[True] < 540  # of 900


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_a_judge_that_goes_by_position_favours_nobody(count: int) -> None:
    def first(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
        shown = Counter(i for i, _ in pairs)
        assert {shown[i] for i in range(count)} <= {(count - 1) // 2, count // 2}
        return ["A"] * len(pairs)

    found = round_robin(count, first)
    if count % 2:  # everybody is first as often as second
        assert set(found.places) == {1}
        assert found.tied == (found.order,)
    winners = Counter(knockout(count, first_shown_wins, seed=seed).best for seed in range(300))
    assert all(300 / count * 0.5 < winners[i] < 300 / count * 1.6 for i in range(count))


def first_shown_wins(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
    return ["A"] * len(pairs)


def test_equal_wins_are_decided_among_the_equal() -> None:
    # 0 beats 1, 1 beats 2, 2 beats 3, 0 beats 2 and 3, 3 beats 1: wins 3, 1, 1, 1, and among 1, 2
    # and 3 everybody has won once: they share the second place.
    winner = {(0, 1): 0, (1, 2): 1, (2, 3): 2, (0, 2): 0, (0, 3): 0, (1, 3): 3}

    def compare(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
        return ["A" if winner[min(p), max(p)] == p[0] else "B" for p in pairs]

    found = round_robin(4, compare)
    assert (found.wins, found.places) == ((3, 1, 1, 1), (1, 2, 2, 2))
    assert [set(group) for group in found.tied] == [{1, 2, 3}]
    # 0, 1 and 2 have two wins each and have beaten each other in a circle; 3 has none.
    winner = {(0, 1): 0, (1, 2): 1, (0, 2): 2, (0, 3): 0, (1, 3): 1, (2, 3): 2}
    assert round_robin(4, compare).places == (1, 1, 1, 4)
    # 0 and 3 have two wins each, and 3 beat 0; 1 and 2 have one, and 1 beat 2: no tie is left.
    winner = {(0, 1): 0, (1, 2): 1, (0, 2): 0, (0, 3): 3, (1, 3): 3, (2, 3): 2}
    found = round_robin(4, compare)
    assert (found.wins, found.order, found.tied) == ((2, 1, 1, 2), (3, 0, 1, 2), ())


def test_ties_and_unreadable_verdicts_are_said() -> None:
    def silent(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
        return [None] * len(pairs)

    found = round_robin(3, silent, seed=4)
    assert (found.wins, found.places) == ((1.0, 1.0, 1.0), (1, 1, 1))
    assert len(found.undecided) == 3
    assert found.tied == (found.order,)
    lots = Counter(knockout(3, silent, seed=seed).best for seed in range(90))
    assert len(lots) == 3
    found = knockout(4, by_worth([1, 1, 1, 0]), seed=1)
    assert found.best != 3
    assert 1 <= len(found.undecided) <= 2
    assert sum(found.wins) == 3 - len(found.undecided)
    assert sorted(found.places) == [1, 2, 3, 3]
    assert len(found.tied) == 1
    # The lot decides, and the same lot again.
    assert knockout(4, by_worth([1, 1, 1, 0]), seed=1) == found


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        round_robin(0, by_worth([]))
    with pytest.raises(ValueError, match="at least one candidate"):
        knockout(0, by_worth([]))
    with pytest.raises(ValueError, match="must answer each of 3 pairs, got 1"):
        round_robin(3, lambda pairs: ["A"])
    only = Ranking((0,), (1,), (0.0,), 0, ())
    assert round_robin(1, by_worth([1])) == knockout(1, by_worth([1])) == only


def test_a_judge_compares_in_batches() -> None:
    def longer(first: str, second: str, sample: int) -> str:
        return verdict("A" if len(first) > len(second) else "B")

    answers = ["x", "xxxx", "xx", "xxx"]
    judge = Judge(longer)
    options = {"prompt": load_prompt("compact"), "sampling": SamplingParams(temperature=0.0)}
    compare = comparer(judge, [{"role": "user", "content": "?"}], answers, **options)
    assert round_robin(4, compare).order == (1, 3, 2, 0)
    assert len(judge.samplings) == 1  # one batch of six pairs
    assert knockout(4, compare).best == 1
    assert len(judge.samplings) == 3
    both = comparer(
        Judge(says_a), [{"role": "user", "content": "?"}], answers, placements=BOTH_PLACEMENTS,
        **options,
    )  # fmt: skip
    assert both([(0, 1), (2, 3)]) == ["tie", "tie"]
