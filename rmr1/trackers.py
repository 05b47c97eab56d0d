"""A run's figures in TensorBoard and Weights & Biases, besides its metrics.jsonl.

metrics.jsonl is the record. A tracker shows it, so one that fails (a network, a full disk) is left
out from then on and training goes on. Both packages are optional and imported where they are used.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from rmr1.data import write_whole

_log = logging.getLogger(__name__)

TrackerName = Literal["tensorboard", "wandb"]
# One step's figures, and "step" (an int) and "stage" (a text): a row of metrics.jsonl.
Row = dict[str, Any]

# W&B waits without end by default, for somebody who logs in, and for the last upload.
LOGIN_SECONDS, UPLOAD_SECONDS = 60, 120


class Tracker(Protocol):
    """Something that shows the rows of a run."""

    def log(self, row: Row) -> None:
        """Show one step."""

    def close(self, *, failed: bool = False) -> None:
        """Write what is left; `failed` says that the run did not end well."""


def require(names: Sequence[TrackerName]) -> None:
    """ValueError if the package of a tracker is missing, before anything expensive is done."""
    for name in names:
        try:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
            else:
                # W&B leaves folders of this name behind, which import like an empty package.
                from wandb import init  # noqa: F401
        except ImportError:
            raise ValueError(
                f"log = {json.dumps(list(names))} needs {name}, which is not installed; run"
                " `pip install 'rmr1[log]'`, or leave it out of `log`"
            ) from None


class TensorBoard:
    """Event files under <directory>/tensorboard, flushed at every step.

    See `Trackers` for the arguments.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], *, step: int, rows: Sequence[Row]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / "tensorboard"
        older = list(folder.glob("events.out.tfevents.*"))
        if step == 0:
            for path in older:
                path.unlink()
        new = step == 0 or not older
        # Readers drop what older files hold from this step on: steps that are made once more.
        self._writer = SummaryWriter(str(folder), purge_step=None if new else step + 1)
        if new:
            text = json.dumps(config, indent=2).replace("\n", "\n    ")
            self._writer.add_text("config", f"    {text}", 0)  # an indented block is code
            for row in rows:
                self.log(row)

    def log(self, row: Row) -> None:
        """Show the numbers of one step."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """Close the event file. TensorBoard knows no end of a run."""
        self._writer.close()


class WeightsAndBiases:
    """A run in W&B, with its local files under <directory>/wandb.

    Credentials, project and mode are W&B's own matter (`wandb login`, WANDB_API_KEY,
    WANDB_PROJECT, WANDB_MODE=offline). The run's id is kept in <directory>/wandb_id. See `Trackers`
    for the arguments.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], *, step: int, rows: Sequence[Row]
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rmr1"),
            name=directory.name,
            id=_wandb_id(directory, new=step == 0),
            resume="allow",
            reinit="create_new",  # a program around this one may have a run of its own
            dir=str(directory),
            config=config,
            allow_val_change=True,  # what a resumed run may change
            settings=wandb.Settings(
                console="off", login_timeout=LOGIN_SECONDS, finish_timeout=UPLOAD_SECONDS
            ),
        )
        # Offline, W&B begins at step 0 again, and of files with one id its server keeps the last.
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Show one step, unless W&B has it already."""
        if row["step"] >= self._run.step:
            # Without `commit` a step with a number waits for the next one.
            self._run.log(_numbers(row), step=row["step"], commit=True)

    def close(self, *, failed: bool = False) -> None:
        """Send what is left, for two minutes at most; the rest stays for `wandb sync`."""
        self._run.finish(exit_code=int(failed))


class Trackers:
    """The trackers of a run, as one. A context manager that closes them.

    Args:
        names: which ones.
        directory: the run's folder.
        config: the resolved settings, in JSON's types.
        step: the last step that is done: 0 for a new run, which then shows nothing of a run that
            was in the folder before.
        rows: the rows up to `step`. A tracker that lacks them is given them.

    Raises:
        ValueError: a package is missing. Nothing else that goes wrong in a tracker is raised.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        directory: Path,
        config: dict[str, Any],
        *,
        step: int,
        rows: Sequence[Row],
    ) -> None:
        require(names)
        self._record = directory / "metrics.jsonl"
        self._trackers: dict[TrackerName, Tracker] = {}
        for name in dict.fromkeys(names):
            self._attempt(name, partial(self._start, name, directory, config, step, rows))

    def log(self, row: Row) -> None:
        """Show one step everywhere."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, partial(tracker.log, row))

    def close(self, *, failed: bool = False) -> None:
        """Close all."""
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, partial(tracker.close, failed=failed))
        self._trackers.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ctrl-C ends a run in good order: it goes on from its checkpoint.
        self.close(failed=error is not None and not isinstance(error, KeyboardInterrupt))

    def _start(
        self,
        name: TrackerName,
        directory: Path,
        config: dict[str, Any],
        step: int,
        rows: Sequence[Row],
    ) -> None:
        kind = TensorBoard if name == "tensorboard" else WeightsAndBiases
        self._trackers[name] = kind(directory, config, step=step, rows=rows)

    def _attempt(self, name: TrackerName, action: Callable[[], None]) -> None:
        """Do it, or leave this tracker out from now on and say so once."""
        try:
            action()
        except Exception as error:  # whatever theirs is, the run is worth more
            self._trackers.pop(name, None)
            _log.warning(
                "%s failed (%s) and is left out from here on; the run's figures are in %s, and a"
                " resumed run shows them there again",
                name,
                " ".join(str(error).split()) or type(error).__name__,
                self._record,
            )


def _numbers(row: Row) -> dict[str, float]:
    """The figures of a row, NaN too."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def _wandb_id(directory: Path, *, new: bool) -> str:
    """The id of this run, one and the same however often it is resumed."""
    path = directory / "wandb_id"
    if new or not path.is_file():
        write_whole(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()
