"""The verbs that use a judge: judge, logprobs.

What needs torch is imported where a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from rich.console import Console

from rmr1.judgment_print import print_judgment, print_ranking
from rmr1.terminal import phase
from rmr1.verbs.arguments import Verb
from rmr1.verbs.model import ModelVerb


class JudgeOne(ModelVerb):
    """Compare two answers, rank several, or judge a file of comparisons.

    rmr1 judge --model DIR --prompt "2 + 2?" --answer_a 4 --answer_b 5 --swap
    rmr1 judge --model DIR --prompt "2 + 2?" --answers answers.json
    rmr1 judge --model DIR --input comparisons.jsonl --output judgments.jsonl

    A line of --input is {"prompt": "...", "answer_a": "...", "answer_b": "..."}; what was judged
    is not judged again when the same command runs anew. --answers is a JSON list of texts.
    """

    prompt: str = Field("", description="what was asked")
    answer_a: str = Field("", description="the first answer")
    answer_b: str = Field("", description="the second answer")
    answers: str = Field("", description="JSON file with a list of answers, to be ranked")
    method: Literal["round_robin", "knockout"] = Field(
        "round_robin", description="ranking: each against each, or a knockout, which is shorter"
    )
    input: str = Field("", description="JSONL file of comparisons")
    output: str = Field("", description="JSONL file of their judgments")
    votes: int = Field(1, ge=1, description="samples whose majority wins")
    swap: bool = Field(False, description="judge with the answers exchanged as well")
    whole: bool = Field(False, description="print every judgment's text")
    json_output: bool = Field(False, alias="json", description="print the judgment as JSON")

    @field_validator("prompt", "answer_a", "answer_b", mode="before")
    @classmethod
    def _a_text_is_always_set(cls, value: Any) -> Any:
        # The parser makes None of `unset` (rmr1/verbs/arguments.py), a text like any other here.
        return "unset" if value is None else value

    def run(self) -> int:
        """Judge and print."""
        self._refuse_what_makes_no_sense()
        if self.input:
            return self._file()
        return self._rank() if self.answers else self._compare()

    def _refuse_what_makes_no_sense(self) -> None:
        one = bool(self.prompt or self.answer_a or self.answer_b)
        if self.input:
            if not self.output or one or self.answers:
                raise ValueError("judge --input needs --output, and no prompt or answers beside it")
            if self.json_output or self.whole:
                raise ValueError("judge --input writes JSONL and prints none; drop --json, --whole")
            return
        if self.output:
            raise ValueError("judge writes --output for --input only; use --json > FILE")
        if not self.prompt:
            raise ValueError("judge needs --prompt, or --input and --output")
        if self.answers:
            if self.answer_a or self.answer_b:
                raise ValueError("judge takes --answers, or --answer_a and --answer_b, not both")
        elif not (self.answer_a and self.answer_b):
            raise ValueError("judge needs --answer_a and --answer_b, neither of them empty")

    def _compare(self) -> int:
        from rmr1.judge import pair_of
        from rmr1.judgment_view import to_json

        pair = pair_of(self.prompt, self.answer_a, self.answer_b)
        judge = self.judge()
        (found,) = judge.compare_all([pair], votes=self.votes, swap=self.swap)
        told = to_json(found, pair) | judge.making(votes=self.votes, swap=self.swap)
        if self.json_output:
            print(json.dumps(told, ensure_ascii=False))
        else:
            print_judgment(told, whole=self.whole)
        return 0

    def _rank(self) -> int:
        from rmr1.best_of_n import rank

        answers = _texts(self.answers)
        judge = self.judge()
        found = rank(
            judge, self.prompt, answers, method=self.method, votes=self.votes,
            swap=self.swap, seed=self.seed,
        )  # fmt: skip
        told = found.to_json(answers) | judge.making(votes=self.votes, swap=self.swap)
        if self.json_output:
            print(json.dumps(told, ensure_ascii=False))
        else:
            print_ranking(told)
        return 0

    def _file(self) -> int:
        from rmr1.judge_file import judge_file

        judge = self.judge()
        try:
            with phase("Judge", 1, "comparisons") as bar:
                new, skipped = judge_file(
                    judge, self.input, self.output, votes=self.votes, swap=self.swap,
                    progress=bar.count,
                )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on") from None
        words = f", {skipped} of them too long for the model and skipped" if skipped else ""
        Console(stderr=True).print(f"{new} judged{words}, {self.output}", highlight=False)
        return 0


def _texts(path: str) -> list[str]:
    """The list of texts in a JSON file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a JSON file") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f'{path}: wanted a JSON list of texts, as ["4", "5"]')
    empty = [number for number, one in enumerate(found) if not one.strip()]
    if empty:
        raise ValueError(f"{path}: answer {empty[0]} (counted from 0) is empty")
    return found


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
