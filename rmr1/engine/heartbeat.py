"""Ends a rank when another one has failed: nobody waits for who will never come.

A launcher that ends a job at its first failure (torchrun, deepspeed, srun --kill-on-bad-exit) is
faster; but not every launcher does, and a rank that waits on a GPU collective learns of nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import torch.distributed as dist

BEAT = 2.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one after which a rank counts as dead
_FAILED, _BEAT, _LEFT = "rmr1/failed", "rmr1/beat/{}", "left"
_GRACE = 5.0  # that a failing rank gives the others to read why


class Heartbeat:
    """A thread that shows that this rank lives and watches the next one and the job."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._next = (rank + 1) % size
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rmr1-heartbeat", daemon=True)
        self._thread.start()

    def fail(self, reason: str) -> None:
        """Tell the other ranks why this one ends, and give them the time to read it."""
        self._stopped.set()
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(_FAILED, f"rank {self._rank} failed: {reason}")
            if self._rank == 0:  # the store may be in this process
                time.sleep(_GRACE)

    def stop(self) -> None:
        """Leave the job in peace. Rank 0 goes last: the store may be in its process."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(_BEAT.format(self._rank), _LEFT)
            until = time.monotonic() + _GRACE
            while self._rank == 0 and time.monotonic() < until and not self._alone():
                time.sleep(0.02)

    def _alone(self) -> bool:
        """Whether all other ranks have left, or one has said why nobody should wait."""
        if self._store.check([_FAILED]):
            return True
        beats = [_BEAT.format(rank) for rank in range(1, self._size)]
        return self._store.check(beats) and all(
            self._store.get(beat) == _LEFT.encode() for beat in beats
        )

    def _run(self) -> None:
        number, seen, since = 0, "", time.monotonic()
        while not self._stopped.wait(BEAT if number else 0.0):
            number += 1
            try:
                self._store.set(_BEAT.format(self._rank), str(number))
                if self._store.check([_FAILED]):
                    self._end(self._store.get(_FAILED).decode())
                now = self._last_beat()
                if now != seen:
                    seen, since = now, time.monotonic()
                elif now != _LEFT and time.monotonic() - since > SILENCE:
                    self._store.set(
                        _FAILED,
                        f"rank {self._next} has shown no sign of life for {SILENCE:.0f} s: it was"
                        " killed, or its machine is gone",
                    )
            except (dist.DistError, RuntimeError) as error:  # the store went with its process
                self._end(f"rank 0, or what started the job, is gone ({str(error).split(',')[0]})")

    def _last_beat(self) -> str:
        key = _BEAT.format(self._next)
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _end(self, reason: str) -> None:
        """End the process: its main thread may be waiting inside a collective for ever."""
        if self._stopped.is_set():
            return
        print(
            f"rank {self._rank} ends because {reason}; start the same command again to go on from"
            " the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
