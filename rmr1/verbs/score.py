"""The verb that sums up judgments which are there: score."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rmr1.evals.benchmark_table import show_score
from rmr1.evals.score import score_file
from rmr1.verbs.arguments import Verb


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
        show_score(figures, as_json=self.json_output)
        return 0
