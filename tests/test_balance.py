"""Micro-batches: within the limit, even, equally many for every rank, nothing lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmr1.engine.balance import _fill, shares
from rmr1.engine.packing import Group

GROUPS = st.lists(
    st.builds(
        Group,
        prompt=st.integers(1, 30),
        responses=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    ),
    min_size=1,
    max_size=8,
)


def tokens(groups: list[Group], run: tuple[int, int]) -> int:
    """Of a run, a prompt once for its samples in it."""
    owners = [index for index, group in enumerate(groups) for _ in group.responses]
    lengths = [length for group in groups for length in group.responses]
    prompts = {owners[at] for at in range(*run)}
    return sum(groups[owner].prompt for owner in prompts) + sum(lengths[run[0] : run[1]])


@given(GROUPS, st.integers(1, 200), st.integers(1, 5))
def test_every_sequence_once_and_all_ranks_alike(
    groups: list[Group], limit: int, ranks: int
) -> None:
    found = shares(groups, limit, ranks)
    sequences = sum(len(group.responses) for group in groups)
    assert len(found) == ranks
    assert len({len(runs) for runs in found}) == 1
    runs = [run for own in found for run in own if run is not None]
    assert runs[0][0] == 0
    assert runs[-1][1] == sequences
    assert all(before[1] == after[0] for before, after in pairwise(runs))
    for run in runs:
        assert run[1] > run[0]
        assert tokens(groups, run) <= limit or run[1] - run[0] == 1
    idle = sum(run is None for own in found for run in own)
    assert idle == 0 or len(runs) == sequences, "idle though another one has two sequences"
    least = len(_fill(groups, limit))
    assert len(found[0]) <= -(-least // ranks)


@given(GROUPS, st.integers(1, 200), st.integers(1, 5))
def test_no_smaller_cap_would_do(groups: list[Group], limit: int, ranks: int) -> None:
    runs = [run for own in shares(groups, limit, ranks) for run in own if run is not None]
    largest = max((tokens(groups, run) for run in runs if run[1] - run[0] > 1), default=0)
    assert largest == 0 or len(_fill(groups, largest - 1)) > len(runs)


def test_equal_sequences_are_shared_equally() -> None:
    groups = [Group(100, (10,) * 8)] * 4
    assert shares(groups, 1000, 2) == [[(0, 16)], [(16, 32)]]
    assert shares(groups, 200, 2) == [[(0, 8), (8, 16)], [(16, 24), (24, 32)]]
    # One process fills no micro-batch to the brim only to leave a small one at the end.
    assert shares([Group(1, (9,))] * 10, 90) == [[(0, 5), (5, 10)]]


@pytest.mark.parametrize(("ranks", "idle"), [(2, 0), (3, 0), (4, 1), (7, 4)])
def test_ranks_without_a_sequence_join_in(ranks: int, idle: int) -> None:
    found = shares([Group(2, (3, 3, 3))], 1000, ranks)
    assert [own for own in found if own != [None]] == [[(0, 1)], [(1, 2)], [(2, 3)]] or ranks == 2
    assert sum(own == [None] for own in found) == idle
