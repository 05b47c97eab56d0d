"""The frozen model that the KL is measured to, beside the policy or out of its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rmr1.engine.model import CausalLM


class Reference:
    """A model that is read and never trained.

    With `offload` it takes no memory of the device between uses: beside a GPU it waits in host
    memory, and on a CPU it is loaded anew for each use.
    """

    def __init__(
        self, load: Callable[[], CausalLM], device: torch.device, *, offload: bool = False
    ) -> None:
        self._load, self._device, self._offload = load, device, offload
        self._on_host = offload and device.type == "cuda"
        self._model = None if offload and not self._on_host else self._fresh()
        if self._on_host and self._model is not None:
            self._model.to("cpu")

    @contextmanager
    def ready(self) -> Iterator[CausalLM]:
        """The model, on the device."""
        if self._model is None:
            yield self._fresh()
            return
        try:
            yield self._model.to(self._device)
        finally:
            if self._on_host:
                self._model.to("cpu")

    def _fresh(self) -> CausalLM:
        return self._load().requires_grad_(False)
