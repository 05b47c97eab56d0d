"""What came of every row of a build: counts, comparison with what was expected, the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.data import Label
from rmr1.datasets.build_config import BuildConfig
from rmr1.datasets.store import PairStore, Part
from rmr1.datasets.tally import OTHERS, SourceCounts, Tally
from rmr1.terminal import percent


@dataclass
class BuildReport:
    """Counts by source, set and benchmark. `mismatches` are sentences; `config` is as resolved.

    `files` are those that were written. Of sources beyond the first fifty `others` is the number.
    """

    name: str
    sources: dict[str, SourceCounts]
    others: int
    sets: dict[str, dict[str, int]]
    labels: dict[str, dict[Label, int]]
    files: dict[str, str]
    benchmark_prompts: dict[str, int]
    mismatches: list[str]
    config: dict[str, Any]


def report_of(
    config: BuildConfig, store: PairStore, tally: Tally, benchmarks: Mapping[str, int]
) -> BuildReport:
    """Everything counted: rows as they were read, and what the store has in the end."""
    named = [
        value
        for source in config.sources.values()
        for value in (*source.keep, *source.drop, *source.expect)
    ]
    shown = tally.shown(named)
    sources = tally.counts(shown, store.counts("drawn", shown), store.not_drawn(shown))
    for name, value, count in _expected(config):
        counts = sources.setdefault(value, SourceCounts())
        counts.expected = (counts.expected or 0) + count
        counts.as_expected &= tally.taken(name, value) == count
    paths: dict[Part, str] = {"distill": config.output.distill, "rl": config.output.rl}
    sets = {part: store.counts(part, shown) for part in paths}
    labels: dict[str, dict[Label, int]] = {
        part: {
            "A": sum(sides["A"] for sides in groups.values()),
            "B": sum(sides["B"] for sides in groups.values()),
        }
        for part, groups in sets.items()
    }
    return BuildReport(
        name=config.name,
        sources=sources,
        others=tally.others(shown),
        sets={
            part: {name: sides["A"] + sides["B"] for name, sides in groups.items()}
            for part, groups in sets.items()
        },
        labels=labels,
        files={part: path for part, path in paths.items() if sets[part]},
        benchmark_prompts=dict(benchmarks),
        mismatches=[],
        config=config.model_dump(),
    )


def _expected(config: BuildConfig) -> list[tuple[str, str, int]]:
    """(Source of the config, value, rows) of each count that can be compared.

    A source that is read in part has other counts.
    """
    return [
        (name, value, count)
        for name, source in config.sources.items()
        if source.limit is None
        for value, count in source.expect.items()
    ]


def unmatched(config: BuildConfig, tally: Tally) -> list[str]:
    """A sentence for every source of the config with `keep` of which no row is one of these."""
    return [
        f"sources.{name}.keep has {', '.join(map(repr, source.keep))}, and no row of that source is"
        " of any"
        for name, source in config.sources.items()
        if source.keep and not any(tally.has(name, value) for value in source.keep)
    ]


def expectations(
    config: BuildConfig, report: BuildReport, tally: Tally, by_origin: Mapping[str, int]
) -> list[str]:
    """A sentence for every count that is not as expected.

    `by_origin` says how many pairs are left of each source of the config.
    """
    wrong = [
        f"source {value} has {taken:,} rows, expected {count:,} (sources.{name})"
        for name, value, count in _expected(config)
        if (taken := tally.taken(name, value)) != count
    ]
    for name, source in config.sources.items():
        for key, values in (("keep", source.keep), ("drop", source.drop)):
            wrong += [
                f"sources.{name}.{key} names {value!r}, which no row has"
                for value in values
                if source.limit is None and not tally.has(name, value)
            ]
        if source.sample is not None and by_origin.get(name, 0) < source.sample:
            wrong.append(
                f"sources.{name} has {by_origin.get(name, 0):,} pairs left, too few for a sample of"
                f" {source.sample:,}"
            )
    found = {part: sum(groups.values()) for part, groups in report.sets.items()}
    if found["distill"] < config.split.distill:
        wrong.append(
            f"the distillation set has {found['distill']:,} pairs, expected"
            f" {config.split.distill:,}"
        )
    if config.split.expect_rl is not None and found["rl"] != config.split.expect_rl:
        wrong.append(f"the RL set has {found['rl']:,} pairs, expected {config.split.expect_rl:,}")
    return wrong


def print_build(report: BuildReport, *, console: Console | None = None) -> None:
    """The tables: every source, every reason, every file."""
    console = console or Console()
    console.print(_source_table(report))
    if any(counts.dropped for counts in report.sources.values()):
        console.print(_reason_table(report))
    console.print(_set_table(report))


def _table(title: str, *names: str, left: int) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
                  pad_edge=False)  # fmt: skip
    for at, name in enumerate(names):
        table.add_column(name, justify="left" if at < left else "right", no_wrap=at >= left)
    return table


def _source_table(report: BuildReport) -> Table:
    total = SourceCounts()
    for counts in report.sources.values():
        for name in ("read", "left_out", "not_drawn", "kept", "label_a"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        total.add("dropped", "any", counts.all_dropped)
    # Columns of a step that the build does not have are left away.
    shown = [name for name, cell in _cells(total).items() if cell.plain != "0"]
    if any(counts.expected is not None for counts in report.sources.values()):
        shown.insert(shown.index("Read") + 1, "Expected")
    table = _table(f"{report.name}: rows by source", "Source", *shown, left=1)
    for group, counts in report.sources.items():
        cells = _cells(counts)
        table.add_row(_title(report, group), *(cells.get(name, Text("-")) for name in shown))
    table.add_section()
    cells = _cells(total)
    table.add_row("all", *(cells.get(name, Text("")) for name in shown), style="bold")
    return table


def _title(report: BuildReport, group: str) -> Text:
    """What a source is called in a table."""
    return Text(f"{report.others:,} others" if group == OTHERS else group)


def _cells(counts: SourceCounts) -> dict[str, Text]:
    """Column -> what stands in it; no "Expected" where nothing is expected."""
    numbers = {
        "Read": counts.read,
        "Left out": counts.left_out,
        "Dropped": counts.all_dropped,
        "Not drawn": counts.not_drawn,
        "Kept": counts.kept,
    }
    cells = {name: Text(f"{number:,}") for name, number in numbers.items()}
    cells["A"] = Text(percent(counts.label_a / counts.kept if counts.kept else None))
    if counts.expected is not None:
        style = "" if counts.as_expected else "bold red"
        cells["Expected"] = Text(f"{counts.expected:,}", style=style)
    return cells


def _reason_table(report: BuildReport) -> Table:
    table = _table("Dropped, and why", "Source", "Reason", "Pairs", left=2)
    for group, counts in report.sources.items():
        reasons = sorted(counts.dropped.items(), key=lambda item: -item[1])
        for at, (reason, count) in enumerate(reasons):
            title = Text("") if at else _title(report, group)
            table.add_row(title, Text(reason), f"{count:,}")
    return table


def _set_table(report: BuildReport) -> Table:
    table = _table("Written", "Set", "File", "Pairs", "A", "B", left=2)
    for part, groups in report.sets.items():
        count = sum(groups.values())
        if count or report.config["output"][part]:
            sides = report.labels[part]
            file = report.files.get(part, "(empty, no file)")
            table.add_row(part, Text(file), f"{count:,}", f"{sides['A']:,}", f"{sides['B']:,}")
    return table
