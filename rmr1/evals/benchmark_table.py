"""A benchmark's score in the terminal: its figures with intervals, beside the published ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.evals.judgment_rows import Benchmark
from rmr1.evals.paper_results import COLUMNS, TITLES, TOTAL, differences, published
from rmr1.terminal import interval, percent

_AT_THE_END = ("parse_failure_rate", "swap_consistency", "position_bias")
_NAMES = {
    "section_mean": "mean of sections",
    "prompt_mean": "mean of prompts",
    "parse_failure_rate": "unparsed",
    "swap_consistency": "same answer in both orders",
    "position_bias": "share of A among verdicts",
}


def show_score(figures: dict[str, Any], *, as_json: bool) -> None:
    """Print a benchmark's score beside the published ones, as JSON on request."""
    if not as_json:
        print_score(figures)
        return
    beside = {"paper": published(figures["benchmark"]), "differences": differences(figures)}
    print(json.dumps(figures | beside))


def print_score(report: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Two tables, and what differs between them. `report` is what rmr1/evals/score.py makes."""
    console = console or Console()
    console.print(_own(report))
    console.print(_beside(report))
    for line in _remarks(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print("What differs:", highlight=False)
    for line in differences(report):
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)


def print_best_of_n(found: Mapping[str, Any], *, console: Console | None = None) -> None:
    """How often a tournament found the best answer. `found` is `best_of_n_run.pick_best`'s."""
    console = console or Console()
    title = f"RMB, the best of a list by {found['best_of_n'].replace('_', ' ')}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("picked right", justify="right", no_wrap=True)
    table.add_column("95%", justify="right", no_wrap=True)
    for name, value in found["categories"].items():
        table.add_row(Text(name), percent(value), "")
    table.add_row("all lists", percent(found["picked_right"]), interval(found["interval"]))
    table.add_row("by chance", percent(found["by_chance"]), "")
    console.print(table)
    console.print(
        f"{found['lists']:,} lists, {found['comparisons']:,} comparisons, {found['undecided']:,}"
        f" without a winner{_unread(found)}. RMB has no such figure: its own asks whether the best"
        " answer beats every other one.",
        highlight=False,
        soft_wrap=True,
    )


def _own(report: Mapping[str, Any]) -> Table:
    table = Table(title=TITLES[report["benchmark"]], title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("this judge", justify="right", no_wrap=True)
    table.add_column("95%", justify="right", no_wrap=True)
    for name, value, bounds in _figures(report):
        table.add_row(Text(name), percent(value), interval(bounds))
    return table


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, float | None, Any]]:
    """(name, share, interval) of a report's figures, those of parts before those of the whole."""
    bounds = report["intervals"]
    if report["benchmark"] == "rewardbench":
        for group in ("subsets", "sections"):
            yield from _group(report[group], bounds[group])
        own = ["section_mean", "prompt_mean"]
    elif report["benchmark"] == "rm-bench":
        for domain, levels in report["domain_levels"].items():
            named = {f"{domain}, {level}": value for level, value in levels.items()}
            of_levels = bounds["domain_levels"][domain].values()
            yield from _group(named, dict(zip(named, of_levels, strict=True)))
        yield from _group(report["domains"], bounds["domains"])
        own = ["hard", "normal", "easy", "overall"]
    else:
        own = [name for name in report if name.startswith(("pairwise_", "bon_h"))] + ["overall"]
    for name in (*own, *_AT_THE_END):
        if report[name] is not None:
            yield _NAMES.get(name, name.replace("_", " ")), report[name], bounds[name]


def _group(
    values: Mapping[str, Any], bounds: Mapping[str, Any]
) -> Iterator[tuple[str, float | None, Any]]:
    yield from ((name, value, bounds[name]) for name, value in values.items() if value is not None)


def _beside(report: Mapping[str, Any]) -> Table:
    """This judge's total among the published ones."""
    benchmark: Benchmark = report["benchmark"]
    table = Table(title="Beside the paper's", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in COLUMNS[benchmark]:
        table.add_column(name, justify="right", no_wrap=True)
    own = {**report.get("sections", {}), "total": report[TOTAL[benchmark]]}
    judge = str(report["made_by"].get("model", "this judge"))
    for title, figures in [(judge, own), *published(benchmark).items()]:
        cells = [percent(figures.get(name)) for name in COLUMNS[benchmark]]
        table.add_row(Text(title), *cells, style="bold" if figures is own else "")
    return table


def _remarks(report: Mapping[str, Any]) -> Iterator[str]:
    made = report["made_by"]
    yield (
        f"{report['n']:,} judgments of {report['pairs']:,} pairs, {report['ties']:,} ties; prompt"
        f" {made.get('prompt_hash', 'unknown')}, seed {made.get('seed', 'unknown')}; intervals:"
        f" {report['interval_method']}"
    )
    if report["parse_failures"]:
        yield f"Without a verdict: {_kinds(report)}"
    if report["missing"]:
        yield f"No judgments of: {', '.join(report['missing'])}"
    if report["duplicates"]:
        yield f"{report['duplicates']:,} judgments stand in the file twice and count twice"


def _kinds(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in report["parse_failures"].items())


def _unread(found: Mapping[str, Any]) -> str:
    return f" (no verdict: {_kinds(found)})" if found["parse_failures"] else ""
