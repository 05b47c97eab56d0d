"""Traces of a run's steps, for chrome://tracing and ui.perfetto.dev: `profile = N`.

A trace holds every operation on the host and on the GPU, under the phases of
`rmr1/engine/phases.py`. A traced step is slower than others, and its file large: some 250 bytes for
each operation of each decoding step.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_log = logging.getLogger(__name__)

LARGE = 32e6  # bytes; a larger trace is compressed, which both viewers read


class Profile:
    """Traces the `steps` steps after the first that this process makes, which warms up.

    Each is a file of its own: <directory>/trace-step-000002.json, or .json.gz. Use it as a context
    manager: a step that is broken off leaves no file, and no profiler running. One that cannot be
    written is warned of, and training goes on without traces.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        self._directory, self._left = directory, steps
        self._warm = False
        self._running: tuple[profile, record_function] | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def step_begins(self, step: int) -> None:
        """Trace from here, if it is this step's turn."""
        if self._left == 0 or not self._warm:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)
        # The name that tools look for to tell steps apart.
        self._running = profiler, record_function(f"ProfilerStep#{step}")
        profiler.start()
        self._running[1].__enter__()

    def step_ended(self, step: int) -> None:
        """Write the trace of this step, if there is one."""
        self._warm = True
        profiler = self._stop()
        if profiler is None:
            return
        self._left -= 1
        path = self._directory / f"trace-step-{step:06d}.json"
        try:
            written = _write(profiler, path)
        except OSError as error:
            self._left = 0
            _log.warning("%s could not be written (%s); no more steps are traced", path, error)
            return
        _log.info("trace of step %d: %s (open it in ui.perfetto.dev)", step, written)

    def _stop(self) -> profile | None:
        """End the trace that is running."""
        if self._running is None:
            return None
        profiler, whole = self._running
        self._running = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels that are under way belong to this step
        whole.__exit__(None, None, None)
        profiler.stop()
        return profiler


def _write(profiler: profile, path: Path) -> Path:
    """Whole or not at all, and compressed if it is large; where it is."""
    partial = path.with_name(f".{path.name}.partial")
    packed = path.with_name(f"{path.name}.gz")
    try:
        profiler.export_chrome_trace(str(partial))
        if partial.stat().st_size <= LARGE:
            os.replace(partial, path)
            packed.unlink(missing_ok=True)  # of an earlier start of the run
            return path
        squeezed = packed.with_name(f".{packed.name}.partial")
        try:
            with partial.open("rb") as source, gzip.open(squeezed, "wb", compresslevel=3) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.replace(squeezed, packed)
        finally:
            squeezed.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return packed
    finally:
        partial.unlink(missing_ok=True)
