"""The verbs that use a judge: judge, logprobs.

What needs torch is imported where a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal

from pydantic import Field, field_validator
from rich.console import Console
from rich.text import Text

from rmr1.cli_arguments import Verb
from rmr1.cli_model import ModelVerb
from rmr1.terminal import phase


class JudgeOne(ModelVerb):
    """Compare two answers to a prompt and show the judgment."""

    prompt: str = Field(description="what was asked")
    answer_a: str = Field(description="the first answer")
    answer_b: str = Field(description="the second answer")
    votes: int = Field(1, ge=1, description="samples whose majority wins")
    swap: bool = Field(False, description="judge with the answers exchanged as well")

    @field_validator("prompt", "answer_a", "answer_b", mode="before")
    @classmethod
    def _a_text_is_always_set(cls, value: Any) -> Any:
        # The parser makes None of `unset` (rmr1/cli_arguments.py), which is a text like any other
        # here: what is required cannot be reset.
        return "unset" if value is None else value

    def run(self) -> int:
        """Judge once and print verdict and judgment."""
        from rmr1.judge import Judge

        judge = Judge(
            self.model,
            style=self.template,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        found = judge.compare(
            self.prompt, self.answer_a, self.answer_b, votes=self.votes, swap=self.swap
        )
        if self.json_output:
            print(json.dumps(asdict(found), ensure_ascii=False))
            return 0
        console = Console()
        for one in found.samples or (found,):
            console.print(Text(one.text))
        console.print(Text(f"Verdict: {found.verdict or 'none could be read'}", style="bold"))
        return 0


class Logprobs(Verb):
    """Log-probability of every token but the first, for lines of token ids.

    Input lines: {"token_ids": [1, 2, 3]}; output lines: {"logprobs": [-1.5, -0.2]}.
    """

    model: str = Field(description="Hugging Face directory, or `pocket`, `smollm2`")
    input: str = Field(description="JSONL file of token ids")
    output: str = Field(description="JSONL file to write")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights and compute")

    def run(self) -> int:
        """Write the log-probabilities."""
        from rmr1.engine.weights import load_model
        from rmr1.logprobs import write_logprobs
        from rmr1.models import resolve_model

        model = load_model(resolve_model(self.model), dtype=self.dtype)
        with phase("Log-probabilities", 1, "lines") as bar:
            lines = write_logprobs(model, self.input, self.output, progress=bar.count)
        Console(stderr=True).print(f"{lines} lines written to {self.output}", highlight=False)
        return 0
