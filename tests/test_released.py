"""Memory that the generator gives back while nothing is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rmr1.engine.generator import Generator, SamplingParams
from rmr1.engine.weights import load_model
from rmr1.models import load_tokenizer
from rmr1.rlvr import rlvr

PROMPTS = [[3, 4, 5], [6, 7]]
SAMPLING = SamplingParams(n=2, temperature=1.0, max_new_tokens=6, seed=1)


@pytest.fixture
def generator(tiny_model: Path) -> Generator:
    return Generator(load_model(tiny_model), load_tokenizer(tiny_model), kv_memory_gb=0.05)


def drawn(generator: Generator) -> list[list[int]]:
    return [one.token_ids for row in generator.generate(PROMPTS, SAMPLING) for one in row]


def test_the_cache_is_given_back_and_taken_again(generator: Generator) -> None:
    before = drawn(generator)
    seconds = sum(generator.profile.values())
    generator.release()
    assert generator.plan is None
    assert drawn(generator) == before
    assert sum(generator.profile.values()) > seconds  # what was spent before still counts


def test_weights_are_gone_until_new_ones_come(generator: Generator, tiny_model: Path) -> None:
    before = drawn(generator)
    whole = load_model(tiny_model)
    shapes = [p.shape for p in generator.model.parameters()]
    generator.release(weights=True)
    assert not any(p.untyped_storage().size() for p in generator.model.parameters())
    assert [p.shape for p in generator.model.parameters()] == shapes
    for call in (lambda: drawn(generator), generator.release):
        with pytest.raises(ValueError, match="the weights were released; sync before"):
            call()
    with pytest.raises(ValueError, match="sync them from another model"):
        generator.sync(generator.model)
    generator.sync(((n, p.detach()) for n, p in whole.named_parameters()))
    assert drawn(generator) == before
    generator.release(weights=True)
    generator.sync(whole)
    assert drawn(generator) == before


def test_nothing_is_released_under_running_samples(generator: Generator) -> None:
    stream = generator.stream(PROMPTS, SAMPLING)
    next(stream)
    with pytest.raises(ValueError, match="samples are running"):
        generator.release()
    stream.close()
    generator.release()


def test_a_run_that_releases_is_as_one_that_does_not(rlvr_config: Any) -> None:
    def weights(release: bool) -> dict[str, torch.Tensor]:
        rollout = {"prompts": 4, "samples": 4, "max_new_tokens": 8, "release": release}
        final = rlvr(rlvr_config(name=f"release-{release}", steps=2, rollout=rollout))
        return load_model(final).state_dict()

    found, expected = weights(True), weights(False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
