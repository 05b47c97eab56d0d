"""What a person sees at the terminal: phases with a bar, rate and time left, and the table.

Bars and plain progress lines go to stderr and the table to stdout, so `--json` output stays clean
in a pipe. Where stderr is no terminal, a phase writes one plain line every few seconds. Texts are
never read as rich markup: model names and families may hold brackets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

# The stages of a run in their order, with the names that people read.
STAGES = {"base": "Base", "distilled": "Distilled", "rl": "RL"}
PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal, "-" where it is unknown."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def interval(bounds: object) -> str:
    """An interval [low, high] of shares as percentages, "-" where it is unknown."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2 or None in bounds:
        return "-"
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f}"


def duration(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Phase:
    """The state of one phase: how far, how fast, how long still, and live figures.

    A total of 0 is one that is not known (yet): the phase then shows how many are done.
    Work with something done already (a resumed run) says so by `begin`.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._done_before = 0
        self.figures: dict[str, float] = {}
        self._clock = clock
        self._opened = self._began = self._last = clock()
        self._counting = False
        # The view: called after every change.
        self.on_change: Callable[[], None] = lambda: None

    def begin(self, done: int, total: int) -> None:
        """The work begins now, with `done` of it done before.

        That counts for the bar, but neither it nor the time until now (loading a model) for the
        rate. Fits `distill(on_start=)`.
        """
        self._counting, self._done_before, self._began = True, done, self._clock()
        self.reach(done, total)

    def reach(self, done: int, total: int) -> None:
        """Set how many of how many are done."""
        self.done, self.total, self._last = done, total, self._clock()
        self.on_change()

    def count(self, done: int, total: int) -> None:
        """`begin` at the first call, `reach` at the others.

        For a `progress=` that is called once before any work, as `judge_pairs`, `run_benchmark`
        and `write_logprobs` do.
        """
        (self.reach if self._counting else self.begin)(done, total)

    def show(self, figures: Mapping[str, float]) -> None:
        """Show live figures, such as {"reward": 0.42, "kl": 0.003}."""
        self.figures = dict(figures)
        self.on_change()

    @property
    def counted(self) -> str:
        """How many are done, of how many if that is known."""
        return f"{self.done}/{self.total}" if self.total else f"{self.done}"

    @property
    def elapsed(self) -> float:
        """Seconds since the phase was opened."""
        return self._clock() - self._opened

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the phase's mean rate, counting down between items; None if unknown."""
        new = self.done - self._done_before
        if new <= 0:
            return None
        each = (self._last - self._began) / new
        return max(0.0, each * (self.total - self.done) - (self._clock() - self._last))

    def status(self) -> str:
        """Time left, rate and live figures in one line, the most wanted first."""
        parts = []
        left = self.seconds_left
        if self.done < self.total:
            parts.append("time left unknown" if left is None else f"{duration(left)} left")
        worked = self._last - self._began
        new = self.done - self._done_before
        if worked > 0 and new > 0:
            rate = new / worked
            # Long items read better as a time for each.
            slow = f"{1 / rate:.3g} s/{self.unit.removesuffix('s')}"
            parts.append(slow if rate < 1 else f"{rate:.3g} {self.unit}/s")
        parts += [f"{name}={value:.3g}" for name, value in self.figures.items()]
        return ", ".join(parts)


class _Status(ProgressColumn):
    """Elapsed time, time left, rate and live figures of the phase."""

    max_refresh = 0.5

    def __init__(self, phase: Phase) -> None:
        # A narrow terminal cuts the end of the line rather than making two of it.
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self.phase = phase

    def render(self, task: Task) -> Text:
        return Text(f"{duration(self.phase.elapsed)}  {self.phase.status()}", style="dim")


@contextmanager
def _bar(phase: Phase, console: Console) -> Iterator[None]:
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20 if console.width >= 100 else 8),
        TextColumn("{task.fields[counted]}", markup=False, style="bold"),
        _Status(phase),
        console=console,
    )
    with progress:
        # Without a total the bar pulses.
        task = progress.add_task(
            phase.title, total=phase.total or None, completed=phase.done, counted=phase.counted
        )
        phase.on_change = lambda: progress.update(
            task,
            description=phase.title,
            completed=phase.done,
            total=phase.total or None,
            counted=phase.counted,
        )
        yield


@contextmanager
def _lines(phase: Phase, console: Console, every: float) -> Iterator[None]:
    written = -math.inf

    def write(note: str = "") -> None:
        share = f" ({phase.done / phase.total:.0%})" if phase.total else ""
        text = f"{phase.title}: {phase.counted} {phase.unit}{share}, "
        text += f"{duration(phase.elapsed)}, {phase.status()}".rstrip(", ") + note
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def change() -> None:
        nonlocal written
        if phase.elapsed - written >= every:
            written = phase.elapsed
            write()

    phase.on_change = change
    try:
        yield
    except BaseException:
        if written > -math.inf:  # an error before any progress needs no line of its own
            write(", stopped")
        raise
    write(", done" if phase.done >= phase.total else "")


@contextmanager
def phase(
    title: str,
    total: int,
    unit: str,
    *,
    console: Console | None = None,
    every: float = PLAIN_EVERY,
) -> Iterator[Phase]:
    """Show a phase while the block runs: a bar on a terminal, plain lines elsewhere.

    `unit` is a plural ("pairs", "steps"). The bar closes cleanly when the block raises, Ctrl-C
    included. `console` is stderr unless given; `every` is in seconds.
    """
    console = console or Console(stderr=True)
    state = Phase(title, total, unit)
    fancy = console.is_terminal and not console.is_dumb_terminal
    with _bar(state, console) if fancy else _lines(state, console, every):
        yield state


def print_table(
    evaluations: Mapping[str, Mapping[str, Any]], *, console: Console | None = None
) -> None:
    """Print the accuracy table base -> distilled -> RL on stdout.

    `evaluations` is what evaluations.json holds: stage -> figures. "Accuracy" counts unparsed
    judgments as wrong; "of parsed" leaves them out. Intervals are 95%.
    """
    note = "Accuracy counts unparsed judgments as wrong; intervals are 95%."
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption=note, caption_justify="left"
    )
    table.add_column("Model", no_wrap=True)
    for name in ("Accuracy", "interval", "Of parsed", "interval", "Parsed", "Pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, row in in_order(evaluations):
        table.add_row(
            Text(STAGES.get(stage, stage)),
            Text(percent(row.get("accuracy")), style="bold"),
            interval(row.get("ci")),
            Text(percent(row.get("accuracy_parsed")), style="bold"),
            interval(row.get("ci_parsed")),
            percent(row.get("parse_rate")),
            f"{row['n']:,}" if isinstance(row.get("n"), int) else "-",
        )
    (console or Console()).print(table)


def in_order(evaluations: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(stage, value) in the order of the stages; others keep their own order, after them."""
    known = [(stage, evaluations[stage]) for stage in STAGES if stage in evaluations]
    return known + [(name, value) for name, value in evaluations.items() if name not in STAGES]
