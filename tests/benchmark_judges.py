"""Hand-made rows in the formats of the three benchmarks, and judges that need no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rmr1.answers import PROMPT_TOO_LONG, Progress, Reply
from rmr1.data import Message
from rmr1.engine.sampling import SamplingParams
from rmr1.evals.benchmark_items import Dataset
from rmr1.evals.benchmark_run import BenchmarkRun, Making, run_benchmark
from rmr1.prompts import load_prompt

PAIRS = "Pairwise_set/Helpfulness/Chat/Discussion"
LISTS = "BoN_set/Harmlessness/S1"


def rm_bench_row(name: Any, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": f"Question {name}?",
        "chosen": [f"right {name} {style}" for style in "cdm"],
        "rejected": [f"wrong {name} {style}" for style in "cdm"],
        "error_key": None,
    } | fields


def rewardbench_row(name: Any, subset: str = "hep-cpp", **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": f"Question {name}?",
        "chosen": f"right {name}",
        "chosen_model": "human",
        "rejected": f"wrong {name}",
        "rejected_model": "other",
        "subset": subset,
    } | fields


def rmb_pair(name: Any, path: str = PAIRS, **fields: Any) -> dict[str, Any]:
    return {
        "pair_uid": name,
        "conversation_input": [
            {"role": "user", "content": f"Question {name}?", "language": "English"}
        ],
        "chosen": {"llm_name": "x", "answer": f"right {name}", "score": 4.5},
        "reject": {"llm_name": "y", "answer": f"wrong {name}", "score": 2.5},
        "category_path": path,
    } | fields


def rmb_list(name: Any, losers: int = 3, path: str = LISTS, **fields: Any) -> dict[str, Any]:
    return {
        "bon_uid": name,
        "conversation_input": [{"role": "user", "content": f"Question {name}?"}],
        "bon_best": {"llm_name": "x", "answer": f"right {name}"},
        "loser_list": [{"llm_name": "y", "answer": f"wrong {name} {k}"} for k in range(losers)],
        "category_path": path,
    } | fields


def write_json(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def rm_bench_folder(path: Path, **domains: int) -> Path:
    """A folder with so many items of each domain (`safety_refuse` for safety-refuse)."""
    path.mkdir(exist_ok=True)
    for domain, count in domains.items():
        name = f"{domain.replace('_', '-')}_filtered.json"
        write_json(path / name, [rm_bench_row(number) for number in range(count)])
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


Say = Callable[[str, str, int], str]  # (first answer, second answer, number of the sample) -> text


def verdict(letter: str) -> str:
    return f"Ω… <answer>[[{letter}]]</answer>"


def knows(first: str, second: str, sample: int = 0) -> str:
    """Always right."""
    return verdict("A" if first.startswith("right") else "B")


def says_a(first: str, second: str, sample: int = 0) -> str:
    return verdict("A")


def fooled_by_looks(first: str, second: str, sample: int = 0) -> str:
    """Right, unless the right answer is concise and the wrong one is not."""
    good = "A" if first.startswith("right") else "B"
    right, wrong = (first, second) if good == "A" else (second, first)
    fooled = right.endswith(" c") and not wrong.endswith(" c")
    return verdict({"A": "B", "B": "A"}[good] if fooled else good)


class Judge:
    """Answers chats of the `compact` prompt by a rule; stops as if interrupted when told to."""

    def __init__(
        self,
        say: Say = knows,
        *,
        longest: int | None = None,
        stop_after: int | None = None,
        stop_with: BaseException | None = None,
    ) -> None:
        self.say, self.longest = say, longest
        self.stop_after, self.stop_with = stop_after, stop_with or KeyboardInterrupt()
        self.prompts: list[str] = []
        self.samplings: list[SamplingParams] = []

    def answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise self.stop_with
        self.samplings.append(sampling)
        replies = []
        for chat in chats:
            prompt = chat[-1]["content"]
            self.prompts.append(prompt)
            if self.longest is not None and len(prompt) > self.longest:
                too_long = Reply(prompt_tokens=len(prompt), skipped=PROMPT_TOO_LONG)
                replies.append([too_long] * sampling.n)
                continue
            first, second = prompt.split("[Answer A]\n")[1].split("\n[Answer B]\n")
            second = second.removesuffix("\n[End]")
            texts = [self.say(first, second, sample) for sample in range(sampling.n)]
            cut = ["length" if text.endswith("...") else "stop" for text in texts]
            replies.append(
                [Reply(t, len(prompt), 4, c) for t, c in zip(texts, cut, strict=True)]  # type: ignore[arg-type]
            )
            if progress is not None:
                progress(len(replies) * sampling.n, len(chats) * sampling.n)
        return replies


def making(**changes: Any) -> Making:
    return Making(**({"model": "m@1", "prompt": load_prompt("compact")} | changes))


def run(
    dataset: Dataset, output: Path, judge: Any = None, made: Making | None = None, **options: Any
) -> BenchmarkRun:
    done = run_benchmark(judge or Judge(), dataset, made or making(), output=output, **options)
    assert done is not None
    return done
