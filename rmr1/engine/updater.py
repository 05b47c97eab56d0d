"""Who holds the parameters that are trained: this process alone, or all ranks under DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from rmr1.engine.model import CausalLM
from rmr1.engine.optim_config import OptimConfig
from rmr1.engine.optimizer import Optimizer
from rmr1.engine.scorer import Scorer


class Updater(Protocol):
    """A model's parameters with their optimiser."""

    model: CausalLM  # of sharded weights its tensors are empty outside of a forward
    whole: bool  # whether `model` can be used as it is

    def score(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """`Scorer.forward`, on every rank at the same time."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` is the update's last micro-batch of this rank."""

    def step(self, rate: float) -> float:
        """Clip, step and forget the gradient: its norm over all ranks, before clipping.

        One that is not finite changes nothing.
        """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, one at a time; all ranks have to go through all of them."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's tensors, whole, as `Optimizer.state` names them; as `weights`."""

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put back what `state` gave, by any number of ranks."""


class Local:
    """One process, one device."""

    whole = True

    def __init__(self, model: CausalLM, config: OptimConfig) -> None:
        self.model = model
        self.scorer = Scorer(model)
        self.optimizer = Optimizer(model, config)

    def score(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """See `Updater`."""
        scored: tuple[Tensor, Tensor] = self.scorer(*arguments)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Updater`."""
        self.optimizer.backward(loss)

    def step(self, rate: float) -> float:
        """See `Updater`."""
        return self.optimizer.step(rate)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Updater`."""
        yield from self.model.state_dict().items()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Updater`."""
        yield from self.optimizer.state()

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `Updater`."""
        self.optimizer.restore(tensors)
