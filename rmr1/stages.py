"""What both stages of training have in common: the ranks they run on, and the loop over steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from rmr1.config import RunConfig
from rmr1.engine.checkpoint import Progress
from rmr1.engine.launch import launched
from rmr1.engine.ranks import Ranks, Stopped, joined
from rmr1.engine.trainer import Trainer
from rmr1.models import resolve_device
from rmr1.profiling import Profile
from rmr1.run import Run
from rmr1.stop_request import StopRequest

_log = logging.getLogger(__name__)

# (steps done by an earlier start, steps in all), once before the first step
OnStart = Callable[[int, int], None]
# (steps done, steps in all, the step's row of metrics), after each step
OnStep = Callable[[int, int, dict[str, float]], None]


class Stage(Protocol):
    """Something that is trained step by step."""

    trainer: Trainer
    progress: Progress
    steps: int

    def resume(self) -> Progress:
        """Go back to the newest checkpoint, if there is one."""

    def step(self, step: int) -> dict[str, Any]:
        """Make step number `step`, counted from 1; its row of metrics."""


@contextmanager
def trained(config: RunConfig) -> Iterator[tuple[Run, Ranks, torch.device]]:
    """The folder of a run, the ranks it runs on, and this one's device.

    A launcher's environment (see rmr1/engine/launch.py) makes this process a rank of a job.
    """
    place = launched()
    device = torch.device(resolve_device(config.device, place))
    with joined(place, device) as ranks, Run(config, ranks) as run:
        if ranks.size == 1 and config.zero.offload_optimizer:
            _log.warning(
                "zero.offload_optimizer does nothing on one process; start two ranks or more, as"
                " recipes/torchrun.sh does"
            )
        yield run, ranks, device


def run_steps(
    run: Run, stage: Stage, start: Path, *, on_start: OnStart | None, on_step: OnStep | None
) -> Path:
    """Make the steps that are left, saved as configured; returns the last checkpoint.

    `start` is the directory that the run's model and tokenizer came from.

    Raises:
        Stopped: Ctrl-C or SIGTERM asked for it; the step in progress was finished and saved.
    """
    config, ranks = run.config, run.ranks
    done = stage.resume().step
    if on_start is not None:
        on_start(done, stage.steps)
    traced = config.profile if ranks.first else 0
    with StopRequest() as stop, Profile(run.directory, traced) as profile:
        for step in range(done + 1, stage.steps + 1):
            profile.step_begins(step)
            row = stage.step(step)
            profile.step_ended(step)
            if on_step is not None:
                on_step(step, stage.steps, row)
            due = step % config.checkpoint_every == 0 or step == stage.steps
            if ranks.any(stop.requested) or due:
                saved = run.save(stage.trainer, stage.progress, tokenizer_from=start)
                # Only here: what asks to stop from now on finds the next step's save.
                if ranks.any(stop.requested):
                    raise Stopped(f"saved {saved}; run the same command again to go on")
    return run.checkpoints / f"step-{stage.steps:06d}"
