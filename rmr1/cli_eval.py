"""The verbs that measure a judge: eval, score.

What needs torch is imported where a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmr1.cli_arguments import Verb
from rmr1.cli_model import ModelVerb
from rmr1.data import Pair, read_pairs, write_whole
from rmr1.score import score_file
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import interval, percent, phase

if TYPE_CHECKING:
    from rmr1.judge import Judgment


class Eval(ModelVerb):
    """Measure a judge.

    rmr1 eval tasks --model pocket --prompt_style compact       held-out embedded tasks
    rmr1 eval pairs --data pairs.jsonl --model DIR              your own pairs
    rmr1 eval rm-bench --data DIR --model DIR --limit 20        the files of RM-Bench
    """

    benchmark: CliPositionalArg[Literal["tasks", "pairs", "rm-bench"]]
    data: str = Field("", description="JSONL file of pairs, or the folder of RM-Bench's files")
    limit: int | None = Field(None, ge=1, description="pairs, or items of each RM-Bench file")
    temperature: float = Field(
        0.0, ge=0, description="of the judgments, 0: greedy (RM-Bench: always greedy)"
    )
    output: str = Field("", description="JSONL of every judgment (RM-Bench: resumed if it exists)")
    both_orders: bool = Field(False, description="RM-Bench: judge each pair in both placements")

    def run(self) -> int:
        """Evaluate and print the figures."""
        if self.data and self.benchmark == "tasks":
            raise ValueError("eval tasks draws its own pairs; for those of --data: eval pairs")
        if self.both_orders and self.benchmark != "rm-bench":
            raise ValueError(f"eval {self.benchmark} always judges both orders; drop --both_orders")
        if self.temperature and self.benchmark == "rm-bench":
            raise ValueError("eval rm-bench is always greedy; drop --temperature")
        if self.output:  # found out now, not when there are hours of judgments to write
            if Path(self.output).is_dir():
                raise ValueError(f"{self.output}: a folder; --output names the file to write")
            Path(self.output).parent.mkdir(parents=True, exist_ok=True)
        return self._rm_bench() if self.benchmark == "rm-bench" else self._pairs()

    def _rm_bench(self) -> int:
        from rmr1.models import resolve_model
        from rmr1.rm_bench import model_id, run_rm_bench

        if not self.data:
            raise ValueError("eval rm-bench needs --data, the folder of RM-Bench's JSON files")
        model, room, longest = self.load()
        with phase("RM-Bench", 1, "judgments") as bar:
            done = run_rm_bench(
                model,
                data=self.data,
                output=self.output or "results/rm-bench.jsonl",
                model=model_id(resolve_model(self.model)),
                prompt=self.template,
                seed=self.seed,
                limit=self.limit,
                both_orders=self.both_orders,
                max_new_tokens=longest,
                max_prompt_tokens=room,
                progress=bar.count,
            )
        if self.json_output:
            print(json.dumps(done.to_json()))
        else:
            print_scores(done.to_json())
        return 0

    def _pairs(self) -> int:
        from rmr1.engine.generator import SamplingParams
        from rmr1.evaluate import evaluate_pairs

        pairs: list[Pair]
        if self.benchmark == "tasks":
            pairs = draw_pairs(self.limit or 510, seed=self.seed, split="heldout")
        elif self.data:
            pairs = read_pairs(self.data)[: self.limit]
        else:
            raise ValueError("eval pairs needs --data, a JSONL file of pairs")
        model, _, longest = self.load()
        sampling = SamplingParams(
            temperature=self.temperature, max_new_tokens=longest, seed=self.seed
        )
        with phase("Evaluate", 2 * len(pairs), "judgments") as bar:
            found = evaluate_pairs(
                model,
                pairs,
                prompt=self.template,
                sampling=sampling,
                progress=bar.count,
            )
        # Both took hours: neither must be lost because the other has nowhere to go.
        try:
            if self.json_output:
                print(json.dumps(found.to_json()), flush=True)
            else:
                _print_families(found.to_json())
        finally:
            if self.output:
                _write_judgments(Path(self.output), found.judgments)
        return 0


class Score(Verb):
    """Aggregate judgments by the official rule of a benchmark.

    A row: {"benchmark", "id", "label": "A|B", "verdict": "A|B|tie|null"} and the fields that the
    benchmark's rule groups by (see docs/recipes.md).
    """

    benchmark: Literal["rewardbench", "rm-bench", "rmb"] = Field(description="whose rule")
    judgments: str = Field(description="JSONL file of judgments")
    unparsed: float | None = Field(
        None, description="what no verdict earns; unset: the benchmark's rule (RM-R1: always 0)"
    )
    json_output: bool = Field(False, alias="json", description="print figures as JSON")

    def run(self) -> int:
        """Score the file and print the figures."""
        figures = score_file(self.judgments, self.benchmark, unparsed=self.unparsed)
        if self.json_output:
            print(json.dumps(figures))
        else:
            print_scores(figures)
        return 0


def _write_judgments(path: Path, judgments: Sequence[Judgment]) -> None:
    """Write the judgments as JSONL. A file that is there is replaced at the end or not at all."""
    text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in judgments)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ValueError(
            f"{path}: the judgments could not be written ({error.strerror}); free some space there"
            " or give another --output (the figures are printed and complete)"
        ) from error


def print_scores(figures: dict[str, Any], prefix: str = "") -> None:
    """Every figure of a benchmark on a line of its own, shares as percentages."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _lines(figures, prefix):
        table.add_row(Text(name), Text(value))
    Console().print(table)


def _lines(figures: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{name} / ")
        elif isinstance(value, float):
            lines.append((prefix + name, percent(value)))
        elif value is not None and value != []:
            lines.append((prefix + name, str(value)))
    return lines


def _print_families(figures: dict[str, Any]) -> None:
    table = Table(caption="Accuracy counts unparsed judgments as wrong; intervals are 95%.")
    table.add_column("")
    for name in ("Accuracy", "interval", "Of parsed", "Parsed", "Pairs"):
        table.add_column(name, justify="right")
    rows = [*figures["families"].items(), ("all", figures)]
    for name, row in rows:
        table.add_row(
            Text(name),
            percent(row["accuracy"]),
            interval(row["ci"]),
            percent(row["accuracy_parsed"]),
            percent(row["parse_rate"]),
            str(row["n"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"Swap consistency {percent(figures['swap_consistency'])}, share of A"
        f" {percent(figures['position_bias'])}, prompt {figures['prompt_hash']}, seed"
        f" {figures['seed']}",
        highlight=False,
    )
    if figures["skipped_prompt_too_long"]:
        console.print(
            f"{figures['skipped_prompt_too_long']} of {figures['judgments']} prompts were too long"
            " for the model; they count as wrong",
            highlight=False,
        )
