"""The frozen model: when it is loaded, and that nobody holds it in between."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from rmr1.engine.model import CausalLM
from rmr1.engine.packing import pack
from rmr1.engine.reference import Reference
from rmr1.engine.trainer import score
from rmr1.engine.weights import load_model

CPU = torch.device("cpu")
BATCH = pack([[3, 7, 8], [3, 9]], [[5, 1], [6, 7, 8, 1]])


class Loader:
    """Counts how often it loads, and knows which of its models still live."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.loads = directory, 0
        self.made: list[weakref.ref[CausalLM]] = []

    def __call__(self, device: torch.device) -> CausalLM:
        model = load_model(self.directory, device=device)
        self.loads += 1
        self.made.append(weakref.ref(model))
        return model

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(one() is not None for one in self.made)


def scored(reference: Reference) -> torch.Tensor:
    with reference.ready() as model:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.lm_head_weight.requires_grad
        return score(model, BATCH)


def test_one_that_stays_is_loaded_once(tiny_model: Path) -> None:
    loader = Loader(tiny_model)
    reference = Reference(loader, CPU)
    assert (loader.loads, loader.alive) == (1, 1)
    first, second = scored(reference), scored(reference)
    assert torch.equal(first, second)
    assert (loader.loads, loader.alive) == (1, 1)


def test_one_that_is_offloaded_is_there_only_in_use(tiny_model: Path) -> None:
    loader = Loader(tiny_model)
    reference = Reference(loader, CPU, offload=True)
    assert loader.loads == 0
    expected = scored(Reference(Loader(tiny_model), CPU))
    for use in (1, 2, 3):
        assert torch.equal(scored(reference), expected)
        assert (loader.loads, loader.alive) == (use, 0)


@pytest.mark.parametrize("offload", [False, True])
def test_an_error_in_use_passes_and_the_next_use_works(tiny_model: Path, offload: bool) -> None:
    loader = Loader(tiny_model)
    reference = Reference(loader, CPU, offload=offload)

    def fail() -> None:
        with reference.ready():
            raise ValueError("in use")

    with pytest.raises(ValueError, match="in use"):
        fail()
    assert loader.alive == (0 if offload else 1)
    assert scored(reference).shape == (6,)


def test_a_gradient_does_not_reach_it(tiny_model: Path) -> None:
    from rmr1.engine.scorer import Scorer

    for offload in (False, True):
        with Reference(Loader(tiny_model), CPU, offload=offload).ready() as model:
            logprobs, _ = Scorer(model)(BATCH)
        assert not logprobs.requires_grad
