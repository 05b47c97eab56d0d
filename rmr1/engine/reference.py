"""The frozen model that the KL is measured to, beside the policy or out of its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rmr1.engine.model import CausalLM


class Reference:
    """A model that is read and never trained; `load` makes it on the device that it is given.

    With `offload` it takes no memory of the device between uses: beside a GPU it waits in host
    memory, and on a CPU it is loaded anew for each use.
    """

    def __init__(
        self,
        load: Callable[[torch.device], CausalLM],
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        self._load, self._device, self._offload = load, device, offload
        self._on_host = offload and device.type == "cuda"
        self._model: CausalLM | None = None
        if not offload or self._on_host:
            self._model = self._fresh(torch.device("cpu") if offload else device)

    @contextmanager
    def ready(self) -> Iterator[CausalLM]:
        """The model, on the device."""
        if self._model is None:
            yield self._fresh(self._device)
            return
        try:
            yield self._model.to(self._device)
        finally:
            if self._on_host:
                self._model.to("cpu")

    def _fresh(self, device: torch.device) -> CausalLM:
        return self._load(device).requires_grad_(False)
