"""Ctrl-C that loses nothing: the work in hand is finished first."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a request to stop, of which `told` is shown.

    A second one, after a second or more, interrupts at once; what was saved before stays. (The
    ranks of a job get one Ctrl-C twice: from the terminal and from their launcher.)
    """

    def __init__(
        self,
        told: str = "Stopping after this step and saving",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requested = False
        self._told = told
        self._clock, self._since = clock, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if self._clock() - self._since < 1:
                return
            raise KeyboardInterrupt
        self.requested, self._since = True, self._clock()
        print(f"\n{self._told}; press Ctrl-C again to leave at once.", file=sys.stderr)
