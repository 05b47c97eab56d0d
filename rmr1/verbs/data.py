"""The verbs about data: data build, data tasks, data check."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.data import read_pairs, write_pairs
from rmr1.datasets.build_config import BuildConfig
from rmr1.tasks.catalog import draw_pairs
from rmr1.verbs.arguments import SETTINGS, Verb


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the work at once, as Ctrl-C does: a build has nothing to save half-way."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class DataBuild(BuildConfig, Verb):
    """Build a distillation set and an RL set from public preference sets or your own files.

    Reads, filters, removes repeated, near-duplicate and contaminated pairs, places the better
    answer on side A for half of each source, splits, and says what was dropped and why.

    rmr1 data build recipes/data-laptop.toml
    rmr1 data build recipes/data-rm-r1.toml --sources.skywork.path skywork/ --seed 1
    """

    model_config = SETTINGS
    config_file: CliPositionalArg[str] = Field("", description="TOML file; options win over it")
    json_output: bool = Field(False, alias="json", description="print the counts as JSON")

    def run(self) -> int:
        """Build, and print what came of every row."""
        from rmr1.datasets.build import build
        from rmr1.datasets.build_report import print_build

        config = BuildConfig.model_validate(self.model_dump(include=set(BuildConfig.model_fields)))
        with _sigterm_as_ctrl_c():  # what is provisional goes before the process does
            report = build(config)
        if self.json_output:
            print(json.dumps(asdict(report)))
        else:
            print_build(report)
        for sentence in report.mismatches:
            print(f"rmr1: not as expected: {sentence}", file=sys.stderr)
        return 0


class Data(Verb):
    """Build training sets, write embedded tasks as pairs, or check a file of pairs.

    rmr1 data build recipes/data-rm-r1.toml (its own options: rmr1 data build --help)
    rmr1 data tasks --output pairs.jsonl --count 2000 --seed 1
    rmr1 data check --input pairs.jsonl
    """

    what: CliPositionalArg[Literal["build", "tasks", "check"]]
    output: str = Field("pairs.jsonl", description="tasks: the file to write, JSONL or Parquet")
    input: str = Field("", description="check: the file to read, JSONL or Parquet")
    count: int = Field(1000, ge=1, description="tasks: how many pairs")
    seed: int = Field(0, ge=0, description="tasks: the same seed gives the same pairs")
    split: Literal["train", "heldout"] = Field("train", description="tasks: which parameters")

    def run(self) -> int:
        """Write or check."""
        if self.what == "build":  # as a verb of its own it comes here only behind an option
            raise ValueError("write `rmr1 data build CONFIG.toml` first and the options after it")
        if self.what == "tasks":
            pairs = draw_pairs(self.count, seed=self.seed, split=self.split)
            write_pairs(self.output, pairs)
            print(f"{len(pairs)} pairs written to {self.output}")
            return 0
        if not self.input:
            raise ValueError("data check needs --input, a file of pairs")
        pairs = read_pairs(self.input)
        table = Table(title=f"{self.input}: {len(pairs)} pairs, all readable")
        for name in ("Source", "Pairs", "Label A", "With a trace"):
            table.add_column(name, justify="left" if name == "Source" else "right")
        for source, count in sorted(Counter(pair.source for pair in pairs).items()):
            own = [pair for pair in pairs if pair.source == source]
            share = sum(pair.label == "A" for pair in own) / count
            traces = sum(bool(pair.trace) for pair in own)
            table.add_row(Text(source), str(count), f"{share:.1%}", str(traces))
        Console().print(table)
        return 0
