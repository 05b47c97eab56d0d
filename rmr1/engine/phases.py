"""Where the time of a step goes, by named phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import _profiler_enabled
from torch.profiler import record_function


class Phases:
    """Seconds by phase. On a GPU each phase is an NVTX range too, and ends when its work is done.

    Under torch's profiler each is a range of its trace (rmr1/profiling.py). Phases may lie within
    others under names such as "update/forward".
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what is done inside to a phase."""
        with _traced(name):
            began = time.perf_counter()
            if self._cuda:
                torch.cuda.nvtx.range_push(name)
            try:
                yield
            finally:
                if self._cuda:
                    torch.cuda.synchronize(self._device)
                    torch.cuda.nvtx.range_pop()
                self.seconds[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def _traced(name: str) -> AbstractContextManager[object]:
    """A range in the trace of the profiler that is on; without one, nothing is spent on it."""
    return record_function(name) if _profiler_enabled() else nullcontext()
