"""The verb that asks large models for judgments to distil from: trace."""

from __future__ import annotations

import json

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table

from rmr1.terminal import phase
from rmr1.traces.trace import TraceConfig, trace
from rmr1.verbs.arguments import SETTINGS, Verb


class Trace(TraceConfig, Verb):
    """Have a model behind an endpoint write judgments to distil from; a second one mends them.

    Each judgment is checked: its verdict must be the pair's label. Interrupted, the same command
    goes on where it stopped; what was answered is never asked for again.

    rmr1 trace recipes/trace-rm-r1.toml --pairs pairs.jsonl --output traces.jsonl --max_cost 20
    rmr1 trace --pairs p.jsonl --teacher.model m --teacher.base_url http://localhost:8000/v1
    """

    model_config = SETTINGS
    config_file: CliPositionalArg[str] = Field(
        "", description="TOML file; options given beside it win over the file"
    )
    json_output: bool = Field(False, alias="json", description="print the figures as JSON")

    def run(self) -> int:
        """Ask, write the traces, and print what came of it. 1: it ended before the last pair."""
        config = TraceConfig.model_validate(self.model_dump(include=set(TraceConfig.model_fields)))
        with phase("Trace", 1, "pairs") as bar:

            def follow(done: int, total: int, figures: dict[str, float]) -> None:
                bar.count(done, total)
                bar.show(figures)

            figures = trace(config, on_answer=follow).to_json()
        if self.json_output:
            print(json.dumps(figures))
        else:
            _print(figures, config)
        return 1 if figures["stopped"] or figures["failed_requests"] else 0


def _print(figures: dict[str, object], config: TraceConfig) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    rejected = figures.pop("rejected")
    assert isinstance(rejected, dict)
    for name, value in figures.items():
        if value != "":
            told = f"{value:,}" if isinstance(value, int | float) else str(value)
            table.add_row(name.replace("_", " "), told)
    for reason, count in rejected.items():
        table.add_row(f"no trace: {reason}", f"{count:,}")
    console = Console()
    console.print(table)
    console.print(f"{config.output}; every answer: {config.log}", highlight=False, soft_wrap=True)
