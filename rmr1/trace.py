"""`rmr1 trace`: judgments to distil from, written by large models behind endpoints.

As in RM-R1 (arXiv 2505.02387, section 3.1): a teacher judges each pair; what it gets wrong a second
model writes anew, knowing the right verdict and the flawed judgment. Every judgment is checked by
the parser that training and evaluation use.

Each answer is one line of a log, from which the same command goes on: nothing that was paid for is
asked for twice. The traces are written when the work ends, also by Ctrl-C or the spending cap.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import Field, model_validator

from rmr1.data import Message, Pair, read_pairs, read_rows, write_pairs
from rmr1.endpoint import Answer, Budget, Endpoint, EndpointConfig, OverBudget, RequestFailed
from rmr1.engine.sampling import SamplingParams
from rmr1.judgment_log import append, repair_tail
from rmr1.prompts import Part, Prompt, PromptStyle, load_prompt
from rmr1.section import Section
from rmr1.stop_request import StopRequest
from rmr1.verdict import FormatError, parse_verdict

Pass = Literal["teacher", "corrector"]
OnAnswer = Callable[[int, int, dict[str, float]], None]  # (pairs done, pairs in all, figures)

_CORRECTION = """\
{problem}: answer {label} is the better one. Judge the two answers anew, in the format that was \
asked for, so that what you write leads to the verdict <answer>[[{label}]]</answer>. Find out what \
this judgment overlooked and argue from the answers themselves. Whoever reads yours knows neither \
this judgment nor this message: mention neither of them."""
_WRONG = "wrong verdict"
# A trace that speaks of what its writer was told teaches a judge to claim the same.
_TOLD = re.compile(
    r"(first|previous|earlier|initial|flawed|original) (judge?ment|verdict|evaluation)"
    r"|(correct|right|given|true|provided) (label|verdict)"
    r"|I (was|am|have been) (told|asked|instructed|informed)",
    re.IGNORECASE,
)


class TraceConfig(Section):
    """What is judged, by whom, and what it may cost."""

    pairs: str = Field(description="JSONL file of pairs, as `rmr1 data build` writes it")
    output: str = Field("traces.jsonl", description="the pairs with their traces: for `rmr1 sft`")
    prompt_style: PromptStyle = Field("rubric", description="the prompt that the judge will have")
    prompt_without: list[Part] = Field([], description="parts that the prompt leaves out")
    strict_format: bool = Field(
        True, description="take only judgments that keep the chain of rubrics; else any verdict"
    )
    max_new_tokens: int = Field(4096, ge=1, description="cap of a judgment")
    temperature: float = Field(1.0, ge=0, description="of the judgments")
    max_cost: float | None = Field(
        None, gt=0, description="dollars; no request is sent that could go beyond it"
    )
    limit: int | None = Field(None, ge=1, description="only the first so many pairs")
    teacher: EndpointConfig = EndpointConfig()
    corrector: EndpointConfig = EndpointConfig()

    @model_validator(mode="after")
    def _who_and_what_it_costs(self) -> TraceConfig:
        if not self.teacher.model:
            raise ValueError("key 'teacher.model' is missing; name the model that judges first")
        load_prompt(self.prompt_style, tuple(self.prompt_without))
        used = [self.teacher, *([self.corrector] if self.corrector.model else [])]
        if self.max_cost and not all(one.input_price and one.output_price for one in used):
            raise ValueError(
                "max_cost needs input_price and output_price of teacher and corrector, in dollars"
                " for a million tokens"
            )
        return self

    @property
    def log(self) -> Path:
        """Where every answer is kept."""
        return Path(self.output).with_suffix(".log.jsonl")

    @property
    def prompt(self) -> Prompt:
        """What the models are asked."""
        return load_prompt(self.prompt_style, tuple(self.prompt_without))


@dataclass(slots=True)
class Traced:
    """What there is of the work: traces by the pair's id, and why others have none."""

    traces: dict[str, str] = field(default_factory=dict)
    faults: dict[str, dict[Pass, str]] = field(default_factory=dict)  # id -> what was wrong
    texts: dict[str, str] = field(default_factory=dict)  # id -> the teacher's flawed judgment
    corrected: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    cost: float = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """One line of the log."""
        name, step, fault = row["id"], row["pass"], row["fault"]
        self.tokens["prompt"] += row["prompt_tokens"]
        self.tokens["new"] += row["new_tokens"]
        self.cost += row["cost"]
        if not fault:
            self.traces[name] = row["text"]
            self.corrected += step == "corrector"
            self.texts.pop(name, None)
            return
        self.faults.setdefault(name, {})[step] = fault
        if step == "teacher":
            self.texts[name] = row["text"]

    def left(self, pair: Pair, config: TraceConfig) -> Pass | None:
        """Whom to ask about a pair next; None: nobody."""
        if pair.id in self.traces:
            return None
        asked = self.faults.get(pair.id, {})
        if "teacher" not in asked:
            return "teacher"
        return "corrector" if config.corrector.model and "corrector" not in asked else None


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What a run did; `stopped` says why before the end, else it is empty."""

    pairs: int
    traced: Traced
    new: int
    failed: int
    stopped: str

    def to_json(self) -> dict[str, Any]:
        """The figures of all work on these pairs, that of earlier runs included."""
        traced = self.traced
        last = [list(faults.values())[-1] for name, faults in traced.faults.items()
                if name not in traced.traces]  # fmt: skip
        return {
            "pairs": self.pairs,
            "traces": len(traced.traces),
            "right_at_once": len(traced.traces) - traced.corrected,
            "corrected": traced.corrected,
            "rejected": dict(Counter(last).most_common()),
            "failed_requests": self.failed,
            "new_answers": self.new,
            "prompt_tokens": traced.tokens["prompt"],
            "new_tokens": traced.tokens["new"],
            "cost": round(traced.cost, 6),
            "stopped": self.stopped,
        }


def fault_of(text: str, pair: Pair, step: Pass, *, cut: bool, strict: bool) -> str:
    """Why a judgment is no trace for a pair; empty where it is one."""
    if cut:
        return "cut by max_new_tokens"
    verdict = parse_verdict(text)
    if verdict.answer is None:
        return f"no verdict ({verdict.error.name})"
    if verdict.answer != pair.label:
        return _WRONG
    if strict and verdict.error != FormatError.OK:
        return f"format ({verdict.error.name})"
    if step == "corrector" and _TOLD.search(text):
        return "speaks of what it was told"
    return ""


def correction(chat: Sequence[Message], flawed: str, fault: str, pair: Pair) -> list[Message]:
    """What the second model is asked: the pair, the flawed judgment, and the right verdict."""
    problem = "That verdict is wrong" if fault == _WRONG else f"That is no judgment ({fault})"
    return [
        *chat,
        {"role": "assistant", "content": flawed},
        {"role": "user", "content": _CORRECTION.format(problem=problem, label=pair.label)},
    ]


def trace(config: TraceConfig, *, on_answer: OnAnswer | None = None) -> TraceReport:
    """Ask for what is missing and write the traces that there are; see `TraceConfig`."""
    pairs = read_pairs(config.pairs)[: config.limit]
    settings = _settings(config)
    traced = _resumed(config, settings)
    work = _Work(config, pairs, traced, settings, on_answer)
    config.log.parent.mkdir(parents=True, exist_ok=True)
    words = "Stopping when the answers that are asked for have come"
    try:
        with config.log.open("a", encoding="utf-8") as stream, StopRequest(words) as stop:
            work.stop = stop
            asyncio.run(work.all(stream))
    finally:
        found = [replace(p, trace=traced.traces[p.id]) for p in pairs if p.id in traced.traces]
        write_pairs(config.output, found)
    return TraceReport(len(pairs), traced, work.new, work.failed, work.stopped)


class _Work:
    """The pairs that are left, and the two endpoints that are asked about them."""

    def __init__(
        self,
        config: TraceConfig,
        pairs: Sequence[Pair],
        traced: Traced,
        settings: dict[str, Any],
        on_answer: OnAnswer | None,
    ) -> None:
        self.config, self.traced, self.settings = config, traced, settings
        self.todo = [pair for pair in pairs if traced.left(pair, config)]
        self.total, self.done = len(pairs), len(pairs) - len(self.todo)
        self.new = self.failed = 0
        self.stopped, self.stop = "", StopRequest()
        self.on_answer = on_answer
        self.sampling = SamplingParams(
            temperature=config.temperature, max_new_tokens=config.max_new_tokens
        )

    async def all(self, stream: TextIO) -> None:
        """As many pairs at a time as both endpoints take requests."""
        config = self.config
        self._tell()
        budget = Budget(config.max_cost)
        budget.spent = self.traced.cost
        used: dict[Pass, EndpointConfig] = {"teacher": config.teacher}
        if config.corrector.model:
            used["corrector"] = config.corrector
        async with AsyncExitStack() as stack:
            asked = {
                step: await stack.enter_async_context(Endpoint(one, budget))
                for step, one in used.items()
            }
            queue = iter(self.todo)
            workers = sum(one.concurrency for one in used.values())
            tasks = [
                asyncio.ensure_future(self._some(queue, asked, stream)) for _ in range(workers)
            ]
            try:
                await asyncio.gather(*tasks)
            except OverBudget:
                self.stopped = f"max_cost ({config.max_cost:g} dollars) leaves no further request"
                await asyncio.gather(*tasks, return_exceptions=True)  # what is out is paid for
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _some(
        self, queue: Iterator[Pair], asked: dict[Pass, Endpoint], stream: TextIO
    ) -> None:
        for pair in queue:
            if self.stop.requested:
                self.stopped = "interrupted"
                return
            try:
                while step := self.traced.left(pair, self.config):
                    await self._ask(pair, step, asked[step], stream)
            except RequestFailed:  # the next run asks again
                self.failed += 1
            self.done += 1
            self._tell()

    async def _ask(self, pair: Pair, step: Pass, endpoint: Endpoint, stream: TextIO) -> None:
        chat = self.config.prompt.render(pair)
        if step == "corrector":
            fault = self.traced.faults[pair.id]["teacher"]
            chat = correction(chat, self.traced.texts[pair.id], fault, pair)
        answer: Answer = await endpoint.chat(chat, self.sampling)
        reply = answer.reply
        fault = fault_of(
            reply.text,
            pair,
            step,
            cut=reply.finish_reason == "length",
            strict=self.config.strict_format,
        )
        row = {
            "id": pair.id,
            "pass": step,
            "fault": fault,
            **{name: value for name, value in asdict(reply).items() if name != "skipped"},
            "cost": answer.cost,
            "model": endpoint.config.model,
            **self.settings,
        }
        append(stream, [row])
        self.traced.add(row)
        self.new += 1

    def _tell(self) -> None:
        if self.on_answer is not None:
            figures = {"traces": float(len(self.traced.traces)), "dollars": self.traced.cost}
            self.on_answer(self.done, self.total, figures)


def _settings(config: TraceConfig) -> dict[str, Any]:
    """What must not change between two runs that share a log."""
    return {
        "prompt_hash": config.prompt.hash,
        "strict_format": config.strict_format,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
    }


def _resumed(config: TraceConfig, settings: dict[str, Any]) -> Traced:
    """What earlier runs have got. ValueError when they asked for something else."""
    traced, log = Traced(), config.log
    if not log.exists():
        return traced
    repair_tail(log)
    for number, row in read_rows(log):
        try:
            asked = {"teacher": config.teacher, "corrector": config.corrector}[row["pass"]]
            for name, value in {**settings, "model": asked.model}.items():
                if row[name] != value:
                    raise ValueError(
                        f"{log}, line {number}: {name} is {row[name]!r}, but this run has"
                        f" {value!r}; give another output, or remove the log to start over"
                    )
            traced.add(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{log}, line {number}: no answer of a trace run ({error})") from None
    return traced
