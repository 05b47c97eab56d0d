"""Group advantages against a plain loop over groups, and the cases with an exact answer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.group_advantage import EPS, group_advantages


@pytest.fixture(autouse=True, params=["reference", "native", "triton"])
def every_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests here, with every implementation."""
    with use(request.param):
        yield


def plain(rewards: list[list[float]], scale: str, baseline: str) -> list[float]:
    """The definition, one sample at a time, in Python floats."""
    result = []
    for group in rewards:
        for index, reward in enumerate(group):
            others = group[:index] + group[index + 1 :]
            if not others:
                result.append(0.0)
                continue
            base = statistics.fmean(group if baseline == "mean" else others)
            divisor = statistics.stdev(group) + EPS if scale == "std" else 1.0
            result.append((reward - base) / divisor)
    return result


def ids_of(rewards: list[list[float]]) -> Tensor:
    # Group numbers need not start at 0 nor be neighbours.
    return torch.tensor([3 + 5 * i for i, group in enumerate(rewards) for _ in group])


def flat(rewards: list[list[float]]) -> Tensor:
    return torch.tensor([reward for group in rewards for reward in group])


RAGGED = [[1.0, -1.0, -1.0], [1.0], [0.3, 0.9, -2.0, 4.0, 0.3], [-1.0, 1.0], [2.0, 2.5]]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equals_a_plain_loop_on_ragged_groups(scale: Any, baseline: Any) -> None:
    found = group_advantages(flat(RAGGED), ids_of(RAGGED), scale=scale, baseline=baseline)
    assert found.dtype == torch.float32
    assert found.abs().max() > 0.5
    torch.testing.assert_close(found, torch.tensor(plain(RAGGED, scale, baseline)))


@pytest.mark.parametrize("scale", ["std", "none"])
def test_tokens_get_the_advantage_of_their_sample(scale: Any) -> None:
    counts = torch.tensor([3, 0, 700, 1, 5, 512, 0, 2, 9, 1024, 1, 4, 6])
    ids = ids_of(RAGGED)
    samples = group_advantages(flat(RAGGED), ids, scale=scale)
    tokens = group_advantages(flat(RAGGED), ids, scale=scale, token_counts=counts)
    assert tokens.shape == (int(counts.sum()),)
    assert torch.equal(tokens, samples.repeat_interleave(counts))
    assert tokens.abs().max() > 0.5


def test_hand_worked_group() -> None:
    rewards, ids = torch.tensor([1.0, -1.0, -1.0, -1.0]), torch.zeros(4, dtype=torch.int64)
    # mean -0.5, unbiased variance (2.25 + 3 * 0.25) / 3 = 1
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5])
    torch.testing.assert_close(group_advantages(rewards, ids, scale="none"), expected)
    torch.testing.assert_close(group_advantages(rewards, ids), expected / (1 + EPS))
    others = torch.tensor([2.0, -1 + 1 / 3, -1 + 1 / 3, -1 + 1 / 3])
    found = group_advantages(rewards, ids, scale="none", baseline="loo")
    torch.testing.assert_close(found, others)


@pytest.mark.parametrize("value", [0.1, -1.0, 0.7, 1e-30, 123456.7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 49])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equal_rewards_and_groups_of_one_are_exactly_zero(
    value: float, size: int, baseline: Any
) -> None:
    # 0.1 seven times does not average to 0.1 in fp32: rounding must not become a direction.
    rewards = torch.cat([torch.full((size,), value), torch.tensor([1.0, 2.0])])
    ids = torch.tensor([0] * size + [1, 1])
    for scale in ("std", "none"):
        found = group_advantages(rewards, ids, scale=scale, baseline=baseline)
        assert torch.equal(found[:size], torch.zeros(size))
        assert found[size] < 0 < found[size + 1]


def test_neighbours_do_not_leak_into_a_group() -> None:
    alone = group_advantages(torch.tensor([1.0, 3.0]), torch.tensor([7, 7]))
    beside = group_advantages(torch.tensor([9.0, 1.0, 3.0, -50.0]), torch.tensor([1, 7, 7, 8]))
    assert torch.equal(beside[1:3], alone)


def test_whole_numbers_and_nothing_at_all() -> None:
    found = group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]), scale="none")
    assert found.tolist() == [0.5, -0.5]
    nothing = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert nothing.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": torch.zeros(3)}, r"one length, got shapes \(3,\) and \(2,\)"),
        ({"rewards": torch.zeros(2, 1)}, "one length"),
        ({"rewards": torch.tensor([1.0, torch.nan])}, "finite"),
        ({"rewards": torch.tensor([1.0, torch.inf])}, "finite"),
        ({"group_ids": torch.tensor([1, 0])}, "must not decrease"),
        ({"token_counts": torch.tensor([1, 2, 3])}, "token_counts must be 2 integers"),
        ({"token_counts": torch.tensor([1.0, 2.0])}, "got torch.float32"),
        ({"token_counts": torch.tensor([1, -2])}, "not be negative, got -2"),
        ({"scale": "max"}, 'scale must be "std" or "none", got \'max\''),
        ({"baseline": "median"}, "baseline must be"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "rewards": torch.zeros(2),
        "group_ids": torch.zeros(2, dtype=torch.int64),
        **changes,
    }
    with pytest.raises(ValueError, match=words):
        group_advantages(**arguments)
