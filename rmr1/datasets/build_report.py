"""What came of every row of a build: counts, comparison with what was expected, the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.data import Label
from rmr1.datasets.build_config import BuildConfig
from rmr1.terminal import percent


@dataclass
class SourceCounts:
    """The rows of one source. Read = left out + dropped + not drawn + kept."""

    read: int = 0
    left_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    not_drawn: int = 0
    kept: int = 0
    label_a: int = 0
    renamed: int = 0
    expected: int | None = None

    @property
    def taken(self) -> int:
        """Rows that went into the filters: what `expect` is compared with."""
        return self.read - self.left_out

    @property
    def all_dropped(self) -> int:
        """Rows that a filter has dropped."""
        return sum(self.dropped.values())

    def drop(self, reason: str, count: int = 1) -> None:
        """Count dropped rows."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


@dataclass
class BuildReport:
    """Counts by source, set and benchmark. `mismatches` are sentences; `config` is as resolved."""

    name: str
    sources: dict[str, SourceCounts]
    sets: dict[str, dict[str, int]]
    labels: dict[str, dict[Label, int]]
    files: dict[str, str]
    benchmark_prompts: dict[str, int]
    mismatches: list[str]
    config: dict[str, Any]


class Tally:
    """Counts while sources are read, by the value of a row's `source`."""

    def __init__(self) -> None:
        self.sources: dict[str, SourceCounts] = {}
        self.groups: dict[str, set[str]] = {}  # source of the config -> values of `source` in it

    def of(self, origin: str, group: str) -> SourceCounts:
        """The counts of a group of rows, which a source of the config has brought."""
        self.groups.setdefault(origin, set()).add(group)
        return self.sources.setdefault(group, SourceCounts())

    @property
    def kept_share(self) -> float:
        """The share of taken rows that have passed the filters so far."""
        taken = sum(counts.taken for counts in self.sources.values())
        dropped = sum(counts.all_dropped for counts in self.sources.values())
        return 1 - dropped / max(1, taken)

    def report(
        self,
        config: BuildConfig,
        *,
        kept: Mapping[str, Mapping[Label, int]],
        not_drawn: Mapping[str, int],
        sets: Mapping[str, Mapping[str, Mapping[Label, int]]],
        benchmarks: Mapping[str, int],
    ) -> BuildReport:
        """Everything counted, with what the store has in the end."""
        for source in config.sources.values():
            # A source that is read in part has other counts.
            for group, count in source.expect.items() if source.limit is None else ():
                self.sources.setdefault(group, SourceCounts()).expected = count
        for group, counts in self.sources.items():
            sides = kept.get(group, {"A": 0, "B": 0})
            counts.kept, counts.label_a = sides["A"] + sides["B"], sides["A"]
            counts.not_drawn = not_drawn.get(group, 0)
        labels: dict[str, dict[Label, int]] = {
            part: {
                "A": sum(sides["A"] for sides in groups.values()),
                "B": sum(sides["B"] for sides in groups.values()),
            }
            for part, groups in sets.items()
        }
        return BuildReport(
            name=config.name,
            sources=self.sources,
            sets={
                part: {group: sides["A"] + sides["B"] for group, sides in groups.items()}
                for part, groups in sets.items()
            },
            labels=labels,
            files={"distill": config.output.distill, "rl": config.output.rl},
            benchmark_prompts=dict(benchmarks),
            mismatches=[],
            config=config.model_dump(),
        )


def expectations(
    config: BuildConfig, report: BuildReport, tally: Tally, by_origin: Mapping[str, int]
) -> list[str]:
    """A sentence for every count that is not as expected.

    `by_origin` says how many pairs are left of each source of the config.
    """
    wrong = [
        f"source {group} has {counts.taken:,} rows, expected {counts.expected:,}"
        for group, counts in report.sources.items()
        if counts.expected is not None and counts.taken != counts.expected
    ]
    for name, source in config.sources.items():
        for key, values in (("keep", source.keep), ("drop", source.drop)):
            wrong += [
                f"sources.{name}.{key} names {value!r}, which no row has"
                for value in values
                if source.limit is None and value not in tally.groups.get(name, ())
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
        total.drop("any", counts.all_dropped)
    # Columns of a step that the build does not have are left away.
    shown = [name for name, cell in _cells(total).items() if cell.plain != "0"]
    if any(counts.expected is not None for counts in report.sources.values()):
        shown.insert(shown.index("Read") + 1, "Expected")
    table = _table(f"{report.name}: rows by source", "Source", *shown, left=1)
    for group, counts in report.sources.items():
        cells = _cells(counts)
        table.add_row(Text(group), *(cells.get(name, Text("-")) for name in shown))
    table.add_section()
    cells = _cells(total)
    table.add_row("all", *(cells.get(name, Text("")) for name in shown), style="bold")
    return table


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
        right = counts.expected == counts.taken
        cells["Expected"] = Text(f"{counts.expected:,}", style="" if right else "bold red")
    return cells


def _reason_table(report: BuildReport) -> Table:
    table = _table("Dropped, and why", "Source", "Reason", "Pairs", left=2)
    for group, counts in report.sources.items():
        reasons = sorted(counts.dropped.items(), key=lambda item: -item[1])
        for at, (reason, count) in enumerate(reasons):
            table.add_row(Text("" if at else group), Text(reason), f"{count:,}")
    return table


def _set_table(report: BuildReport) -> Table:
    table = _table("Written", "Set", "File", "Pairs", "A", "B", left=2)
    for part, groups in report.sets.items():
        count = sum(groups.values())
        if count or report.files[part]:
            sides = report.labels[part]
            file = report.files[part] if count else "(empty, not written)"
            table.add_row(part, Text(file), f"{count:,}", f"{sides['A']:,}", f"{sides['B']:,}")
    return table
