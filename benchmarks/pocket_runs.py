"""Runs of the pocket model that several processes share, each kept in a folder of its own.

A run is not repeated once it is complete; remove its folder to run it anew. One that another
process has in hand is left to it, so the same command, started twice, shares the work.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import harness

from rmr1.config import to_toml
from rmr1.data import Pair, write_whole
from rmr1.demo import evaluate_stage
from rmr1.demo_config import DemoConfig, rlvr_config
from rmr1.evaluate import Evaluation
from rmr1.rlvr import rlvr
from rmr1.run import refuse_changes
from rmr1.statistics import Difference, Ratio, paired_difference
from rmr1.terminal import phase


def begin(config: DemoConfig) -> None:
    """Make the folder of a run, or refuse one that was begun with other settings."""
    path = config.directory / "config.toml"
    if path.is_file():
        refuse_changes(config.directory, config)
    config.directory.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_toml(config))


@contextmanager
def held(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Keep other processes of this benchmark out of a folder; False where one is at work in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True  # closing the file, or the end of the process, gives it back


def after_rl(config: DemoConfig, start: Path, pairs: list[Pair]) -> Evaluation:
    """Train and judge, or read what an earlier call did."""
    begin(config)
    trained = start  # not looked at where the judgments are there
    if not complete(config):
        with phase(f"RL {config.name}", config.rl.steps, "steps") as bar:

            def on_step(step: int, total: int, row: dict[str, float]) -> None:
                bar.reach(step, total)
                bar.show({"reward": row["reward"]})

            trained = rlvr(rlvr_config(config, start), on_start=bar.begin, on_step=on_step)
    return evaluate_stage(config, "rl", trained, pairs, phase)


def complete(config: DemoConfig) -> bool:
    """Whether there is nothing left to do for a run."""
    return (config.directory / "judgments-rl.jsonl").is_file()


def pooled_gain(before: Sequence[Evaluation], after: Sequence[Evaluation]) -> Difference:
    """The gain over all seeds: a cluster is one pair with the judgments of every seed."""

    def ratios(evaluations: Sequence[Evaluation]) -> list[Ratio]:
        hits: dict[str, list[bool]] = {}
        for evaluation in evaluations:
            for one in evaluation.judgments:
                hits.setdefault(one.id, []).append(one.correct)
        return [Ratio(sum(own), len(own)) for _, own in sorted(hits.items())]

    found = paired_difference(ratios(before), ratios(after))
    assert found is not None  # every pair was judged
    return found


def told(one: Difference) -> list[float]:
    return [one.value, one.interval.low, one.interval.high]


def conduct(
    options: argparse.Namespace,
    folder: str,
    measure: Callable[[argparse.Namespace], list[harness.Row]],
    show: Callable[[Sequence[harness.Row]], None],
    plot: Callable[[Sequence[harness.Row]], str],
) -> int:
    """Measure, print the table, keep rows and plot; the exit status of the benchmark.

    Runs lie in `folder` beside `options.output`; without a name they are not kept. `measure` finds
    their place in `options.runs`.
    """
    prog = Path(sys.argv[0]).name
    try:
        with tempfile.TemporaryDirectory() as scratch:
            kept = options.output.parent / folder if folder else Path(scratch)
            options.runs = kept.resolve()
            rows = measure(options)
    except ValueError as error:  # another configuration than that of the runs that are there
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"{prog}: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    if not rows:
        print(f"{prog}: nothing is complete yet", file=sys.stderr)
        return 1
    show(rows)
    harness.save(rows, options.output)
    drawing = options.output.with_suffix(".svg")
    drawing.write_text(plot(rows), encoding="utf-8")
    print(f"rows: {options.output}, plot: {drawing}", file=sys.stderr)
    return 0
