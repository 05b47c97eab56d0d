"""What to draw, and the keys of the noise: that they are what a hash must be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rmr1.engine.sampling import SamplingParams, sequence_key, token_keys


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def key_at(seed: int, prompt: int, sample: int, position: int) -> int:
    keys = np.array([sequence_key(seed, prompt, sample)], dtype=np.uint64)
    return int(token_keys(keys, np.array([position]))[0])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 17])
def test_keys_equal_integer_arithmetic(seed: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = splitmix((seed + golden) % 2**64)
    for part in (12, 3):
        key = splitmix(((key ^ part) + golden) % 2**64)
    assert key_at(seed, 12, 3, 8) % 2**64 == splitmix((key + 9 * golden) % 2**64)


def test_keys_depend_on_each_of_their_parts() -> None:
    base = key_at(5, 1, 1, 1)
    assert base == key_at(5, 1, 1, 1)
    others = {
        key_at(6, 1, 1, 1),
        key_at(5, 2, 1, 1),
        key_at(5, 1, 2, 1),
        key_at(5, 1, 1, 2),
        key_at(5 + (1 << 40), 1, 1, 1),
    }
    assert len(others) == 5
    assert base not in others
    assert key_at(2**64 + 5, 1, 1, 1) == base  # seeds count modulo 2**64


def test_keys_of_a_batch_never_collide_and_their_bits_are_even() -> None:
    keys = np.array([sequence_key(0, p, s) for p in range(100) for s in range(40)], dtype=np.uint64)
    table = np.stack([token_keys(keys, np.full(len(keys), at)) for at in range(50)])
    assert len(np.unique(table)) == table.size
    bits = np.unpackbits(table.view(np.uint8).reshape(-1, 8), axis=1).mean(0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / table.size**0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -0.5),
        ("min_p", 2),
        ("max_new_tokens", 0),
        ("stop", "</answer>"),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", 7),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("seed", 0.5),
    ],
)
def test_bad_parameter_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must .*got"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_parameters_are_frozen_and_known() -> None:
    params = SamplingParams(temperature=1, top_p=1, stop=["a", "b"])  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)  # type: ignore[call-arg]
