"""`rmr1 bench`: run the benchmarks of a checkout, compare with the last saved run, draw a page.

Each benchmark is a script, benchmarks/bench_x.py, that checks its op, times it, prints a table and
writes JSON rows. Here they run one after the other in processes of their own. A finished run's file
replaces the one before, which moves to previous/; a benchmark that fails leaves both as they were.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.reporting.charts import Scale, figure

Row = dict[str, Any]

# What harness.arguments() in benchmarks/ gives every benchmark that calls it.
COMMON = frozenset({"device", "dtype", "samples", "compile", "quick", "output"})
SLOWER = 1.1


# --- Running -------------------------------------------------------------------------------------


def accepted(script: Path) -> frozenset[str]:
    """The options a benchmark takes, from its text: to ask it would load torch once more."""
    text = script.read_text()
    own = frozenset(re.findall(r'add_argument\(\s*"--(\w+)"', text))
    shared = re.search(r"\barguments\(|^from model_op import", text, re.MULTILINE)
    return own | COMMON if shared else own


def command(script: Path, options: Mapping[str, object], output: Path) -> list[str] | None:
    """How to call a benchmark; None when it cannot run on the device that is asked for."""
    known = accepted(script)
    if options.get("device", "cpu") != "cpu" and "device" not in known:
        return None
    call = [sys.executable, str(script), "--output", str(output)]
    for name, value in options.items():
        if value and name in known:
            call += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return call


def run_all(
    scripts: Sequence[Path], options: Mapping[str, object], folder: Path
) -> tuple[list[Row], list[Row], list[str]]:
    """Run the benchmarks; returns their rows, the rows of the run before, and who failed.

    Every row gets `benchmark`, the stem of its script. What the scripts print goes to stderr.
    """
    rows: list[Row] = []
    before: list[Row] = []
    failed = []
    (folder / "previous").mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for script in scripts:
        console.rule(script.name)
        part = folder / f"{script.stem}.json.part"
        call = command(script, options, part)
        if call is None:
            console.print(f"{script.name} runs on the CPU only, so it is left out")
            continue
        try:
            code = subprocess.run(call, check=False, stdout=2).returncode
            if code or not part.exists():
                failed.append(script.name)
                continue
            last, old = folder / f"{script.stem}.json", folder / "previous" / f"{script.stem}.json"
            if last.exists():
                last.replace(old)
                before += read(old)
            part.replace(last)
        finally:
            part.unlink(missing_ok=True)
        rows += read(last)
    return rows, before, failed


def read(path: Path) -> list[Row]:
    """The rows of one JSON file, with the name of its benchmark; ValueError when it has none."""
    try:
        rows = json.loads(path.read_text())
        return [{"benchmark": path.stem.removeprefix("bench_"), **row} for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no rows of a benchmark ({error}); remove it") from None


# --- Comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """A provider's time on a workload in units of the yardstick of its own run, then and now."""

    benchmark: str
    workload: str
    provider: str
    before: float
    now: float

    @property
    def ratio(self) -> float:
        """Above 1: slower than before."""
        return self.now / self.before

    @property
    def slower(self) -> bool:
        """Slower by more than a tenth."""
        return self.ratio > SLOWER


def changes(rows: Iterable[Row], before: Iterable[Row]) -> list[Change]:
    """Rows that both runs have, on the same device with as many threads.

    Relative to the yardstick, a GEMM or a copy measured in turn with the rest: absolute times on a
    shared machine say more about the neighbours.
    """

    names = ("benchmark", "workload", "provider", "device", "threads")
    old = {tuple(row.get(name) for name in names): row.get("x_yardstick") for row in before}
    found = []
    for row in rows:
        then, now = old.get(tuple(row.get(name) for name in names)), row.get("x_yardstick")
        if then and now and row["provider"] != row.get("yardstick"):
            found.append(Change(row["benchmark"], row["workload"], row["provider"], then, now))
    return found


def changes_table(found: Sequence[Change]) -> Table:
    """The comparison for a terminal."""
    table = Table(title="Against the last saved run, in units of the yardstick of each run")
    for name in ("workload", "provider"):
        table.add_column(name, overflow="fold")
    for name in ("before", "now", "now / before"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in found:
        numbers = (figure(one.before), figure(one.now), f"{one.ratio:.2f}")
        mark = Text("slower", style="bold red") if one.slower else ""
        table.add_row(f"{one.benchmark}: {one.workload}", one.provider, *numbers, mark)
    return table


# --- Drawing -------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, LINE = 860.0, 300.0, 70.0, 20.0

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 900px;
  margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 0; }
p { color: #55606e; margin: .3em 0 .6em; } svg { width: 100%; height: auto; display: block; }
text { font: 12px system-ui, sans-serif; fill: #1c2430; paint-order: stroke; stroke: #fff;
  stroke-width: 3px; } .end { text-anchor: end; }
.mid { text-anchor: middle; } .tick { fill: #55606e; } .work { font-weight: 600; }
.grid { stroke: #e3e7ec; } .unit { stroke: #1c2430; stroke-dasharray: 4 3; }
.peer { fill: #8792a0; stroke: #8792a0; } .ours { fill: #0b62c4; stroke: #0b62c4; }
text.ours, text.peer { stroke: #fff; } text.peer { fill: #55606e; }
"""


def relative(group: Sequence[Row]) -> tuple[str, list[tuple[float, float, float]]]:
    """What 1 stands for, and (median, low, high) of each row of a workload in units of it.

    That is the time bound, or where a row has none the fastest of the workload.
    """

    def times(row: Row) -> tuple[float, float, float]:
        values = [max(float(row[name]), 1e-12) for name in ("median", "p20", "p80")]
        if row.get("unit") != "s":  # a rate, such as GB/s
            values = [1 / value for value in values]
        return values[0], min(values), max(values)

    found = [times(row) for row in group]
    if all(row.get("bound") for row in group):
        return "the bound", [
            (t / row["bound"], low / row["bound"], high / row["bound"])
            for row, (t, low, high) in zip(group, found, strict=True)
        ]
    best = min(t for t, _, _ in found)
    return "the fastest", [(t / best, low / best, high / best) for t, low, high in found]


def chart(title: str, rows: Sequence[Row]) -> Markup:
    """One benchmark: a dot a provider, with its p20 and p80, on a logarithmic scale."""
    workloads: dict[str, list[Row]] = {}
    for row in rows:
        workloads.setdefault(str(row["workload"]), []).append(row)
    groups = [(name, group, relative(group)) for name, group in workloads.items()]
    values = [x for _, _, (_, points) in groups for point in points for x in point]
    x = Scale(math.log10(min(0.9, *values)), math.log10(max(2.2, *values)), LEFT, WIDTH - RIGHT)
    height = LINE * sum(len(group) + 1.4 for _, group, _ in groups) + 34
    parts = [_ticks(x, height)]
    y = 26.0
    for name, group, (unit, points) in groups:
        heading = f"{name} (1 = {unit})"
        parts.append(Markup('<text class="work" x="0" y="{:.0f}">{}</text>').format(y, heading))
        for row, (t, low, high) in zip(group, points, strict=True):
            y += LINE
            style = "ours" if str(row["provider"]).startswith(("rmr1", "C++")) else "peer"
            parts.append(
                Markup(
                    '<text class="{0} end" x="{1:.0f}" y="{2:.0f}">{3}</text>'
                    '<line class="{0}" x1="{4:.1f}" x2="{5:.1f}" y1="{6:.0f}" y2="{6:.0f}"/>'
                    '<circle class="{0}" cx="{7:.1f}" cy="{6:.0f}" r="4"/>'
                    '<text class="{0}" x="{8:.1f}" y="{2:.0f}">{9}</text>'
                ).format(
                    style, LEFT - 12, y, row["provider"], x(math.log10(low)), x(math.log10(high)),
                    y - 4, x(math.log10(t)), max(x(math.log10(high)), x(math.log10(t))) + 9,
                    f"{figure(t)}×",
                )
            )  # fmt: skip
        y += 1.4 * LINE
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, f"{title}: time of every provider, relative", Markup("").join(parts)
    )


def _ticks(x: Scale, height: float) -> Markup:
    """Grid lines at 1, 2, 5 times powers of ten, or powers alone when there are many."""
    powers = range(math.floor(x.low), math.ceil(x.high) + 1)
    steps = (1,) if x.high - x.low > 3 else (1, 2, 5)
    ticks = [step * 10.0**power for power in powers for step in steps]
    parts = []
    for tick in ticks:
        if not x.low <= math.log10(tick) <= x.high:
            continue
        parts.append(
            Markup(
                '<line class="{0}" x1="{1:.1f}" x2="{1:.1f}" y1="14" y2="{2:.0f}"/>'
                '<text class="tick mid" x="{1:.1f}" y="10">{3:g}×</text>'
            ).format("unit" if tick == 1 else "grid", x(math.log10(tick)), height - 24, tick)
        )
    return Markup("").join(parts)


def page(rows: Sequence[Row]) -> str:
    """The page of all benchmarks: self-contained, no script, nothing loaded."""
    sections = []
    for name, group in groupby(rows, lambda row: row["benchmark"]):
        own = list(group)
        one = own[0]
        told = [str(one.get("device", "")), f"{one['threads']} threads" if "threads" in one else ""]
        if one.get("limit_flops"):
            told += [f"{one['limit_flops'] / 1e9:,.0f} GFLOP/s"]
            told += [f"{one['limit_bandwidth'] / 1e9:,.1f} GB/s"]
        text = ", ".join(part for part in told if part)
        section = Markup("<h2>{}</h2><p>{}</p>{}")
        sections.append(section.format(name, text, chart(name, own)))
    return Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        " style-src 'unsafe-inline'\"><title>rmr1 bench</title><style>{}</style></head><body>"
        "<h1>rmr1 bench</h1><p>Time of every provider, further right is slower; the line through a"
        " dot goes from the 20th to the 80th percentile. The bound is what the work must take at"
        " this machine's GEMM and copy rates, measured in the same run; work that fits a cache may"
        " pass it.</p>{}</body></html>\n"
    ).format(Markup(STYLE), Markup("").join(sections))
