"""A judgment in the terminal: verdict and votes, rubric with weights, solution, quotes, text."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_judgment(told: dict[str, Any], *, whole: bool = False) -> None:
    """Print what `judgment_view.to_json` tells; `whole`: every judgment's text as well."""
    console = Console()
    verdict = told["verdict"] or "none could be read"
    console.print(Text(f"Verdict: {verdict}", style="bold"))
    judged = len(told["judgments"])
    if judged > 1:
        votes = ", ".join(f"{name} {count}" for name, count in told["votes"].items() if count)
        console.print(Text(f"Votes of {judged}: {votes}"))
    if told["rubric"]:
        console.print(_rubric(told["rubric"]))
    for name, title in (("justification", "Why these"), ("solution", "Own solution")):
        if told[name]:
            console.print(Text(f"{title}: {told[name]}"))
    for quote in told["quotes"]:
        found = "in the answer" if quote["found"] else "NOT in the answer"
        style = "" if quote["found"] else "yellow"
        console.print(Text(f"Quote of {quote['answer']} ({found}): {quote['text']}", style=style))
    for number, one in enumerate(told["judgments"], start=1):
        if whole or not (told["rubric"] or told["solution"]):
            order = "exchanged" if one["placement"] == "ba" else "as given"
            console.print(Text(f"--- judgment {number}, answers {order} ---", style="dim"))
            console.print(Text(one["text"]))


def _rubric(items: list[dict[str, Any]]) -> Table:
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("Criterion")
    table.add_column("Weight", justify="right")
    for item in items:
        weight = item["weight"]
        table.add_row(Text(item["text"]), "" if weight is None else f"{weight:.0%}")
    return table


def print_ranking(told: dict[str, Any]) -> None:
    """Print what `Ranking.to_json` tells."""
    table = Table(box=None, pad_edge=False)
    for name in ("Place", "Wins", "Answer"):
        table.add_column(name, justify="left" if name == "Answer" else "right")
    for one in told["ranking"]:
        first_line = one["answer"].strip().split("\n")[0]
        shown = first_line if len(first_line) <= 100 else first_line[:99] + "…"
        table.add_row(str(one["place"]), f"{one['wins']:g}", Text(f"{one['index']}: {shown}"))
    console = Console()
    console.print(table)
    if told["undecided"]:
        console.print(f"{told['undecided']} of {told['comparisons']} comparisons had no winner")
