"""`rmr1 trace`: judgments to distil from, written by large models behind endpoints.

As in RM-R1 (arXiv 2505.02387, section 3.1): a teacher judges each pair; what it gets wrong a second
model writes anew, knowing the right verdict and the flawed judgment. Every judgment is checked by
the parser that training and evaluation use (check.py).

Each answer is one line of a log (log.py), from which the same command goes on: nothing that
was paid for is asked for twice. The traces are written when the work ends, also by Ctrl-C, the
spending cap or an endpoint that dies; what is out at that moment is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from pydantic import Field, model_validator

from rmr1.answers import Reply
from rmr1.data import Pair, read_pairs, write_pairs
from rmr1.endpoints.budget import Budget, OverBudget
from rmr1.endpoints.endpoint import Endpoint, EndpointConfig, NotSent, Refused, RequestFailed
from rmr1.engine.sampling import SamplingParams
from rmr1.judgment_log import append, appending, content_of
from rmr1.prompts import Part, Prompt, PromptStyle, load_prompt
from rmr1.section import Section
from rmr1.stop_request import StopRequest
from rmr1.traces.check import Pass, correction, fault_of
from rmr1.traces.log import REFUSED, Traced, resumed

OnAnswer = Callable[[int, int, dict[str, float]], None]  # (pairs done, pairs in all, figures)

# The prompts that ask for the whole chain of rubrics.
_WHOLE = ("rubric", "compact")


class TraceConfig(Section):
    """What is judged, by whom, and what it may cost."""

    pairs: str = Field(description="JSONL file of pairs, as `rmr1 data build` writes it")
    output: str = Field("traces.jsonl", description="the pairs with their traces: for `rmr1 sft`")
    prompt_style: PromptStyle = Field("rubric", description="the prompt that the judge will have")
    prompt_without: list[Part] = Field([], description="parts that the prompt leaves out")
    strict_format: bool | None = Field(
        None,
        description="take only judgments that keep the whole chain of rubrics, else any verdict;"
        " unset: where the prompt asks for all of it",
    )
    max_new_tokens: int = Field(4096, ge=1, description="cap of a judgment")
    corrector_max_new_tokens: int | None = Field(
        None, ge=1, description="the corrector's, hidden reasoning included; unset: the same"
    )
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
        if self.strict_format and not self._asks_for_all:
            raise ValueError(
                "strict_format takes only the whole chain of rubrics, for which this prompt does"
                " not ask; drop strict_format"
            )
        used = self.used.values()
        if self.max_cost and not all(one.input_price and one.output_price for one in used):
            raise ValueError(
                "max_cost needs input_price and output_price of teacher and corrector, in dollars"
                " for a million tokens"
            )
        return self

    @property
    def used(self) -> dict[Pass, EndpointConfig]:
        """The endpoints that are asked."""
        found: dict[Pass, EndpointConfig] = {"teacher": self.teacher}
        return found | ({"corrector": self.corrector} if self.corrector.model else {})

    @property
    def _asks_for_all(self) -> bool:
        # What a file asks for nobody knows: its author may say so.
        shipped = self.prompt_style in _WHOLE and not self.prompt_without
        return shipped or self.prompt_style.endswith(".jinja")

    @property
    def strict(self) -> bool:
        """Whether a trace has to keep the whole chain of rubrics."""
        if self.strict_format is None:
            return self.prompt_style in _WHOLE and not self.prompt_without
        return self.strict_format

    @property
    def log(self) -> Path:
        """Where every answer is kept."""
        return Path(self.output).with_suffix(".log.jsonl")

    @property
    def prompt(self) -> Prompt:
        """What the models are asked."""
        return load_prompt(self.prompt_style, tuple(self.prompt_without))

    def sampling(self, step: Pass) -> SamplingParams:
        """How the judgments of a pass are drawn."""
        cap = self.max_new_tokens
        if step == "corrector":
            cap = self.corrector_max_new_tokens or cap
        return SamplingParams(temperature=self.temperature, max_new_tokens=cap)


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
        return {
            "pairs": self.pairs,
            "traces": len(traced.traces),
            "right_at_once": len(traced.traces) - traced.corrected,
            "corrected": traced.corrected,
            "rejected": traced.rejected(),
            "failed_requests": self.failed,
            "new_answers": self.new,
            "prompt_tokens": traced.tokens["prompt"],
            "new_tokens": traced.tokens["new"],
            "cost": round(traced.cost, 6),
            "stopped": self.stopped,
        }


def trace(config: TraceConfig, *, on_answer: OnAnswer | None = None) -> TraceReport:
    """Ask for what is missing and write the traces that there are; see `TraceConfig`.

    Raises:
        ValueError: a file cannot be used, another process is at work on it, or no request can
            succeed; what was answered is kept.
    """
    _refuse_files(config)
    pairs = read_pairs(config.pairs)[: config.limit]
    work = _Work(config, pairs, on_answer)
    words = "Stopping when the answers that are asked for have come"
    finished = False
    with appending(config.log) as stream, StopRequest(words) as stop:
        work.begin(stop)
        try:
            asyncio.run(work.all(stream))
            finished = True
        finally:
            if finished or work.new:  # what is there is not replaced by nothing
                texts = work.traced.traces
                write_pairs(
                    config.output,
                    [replace(pair, trace=texts[pair.id]) for pair in pairs if pair.id in texts],
                )
    return TraceReport(len(pairs), work.traced, work.new, work.failed, work.stopped)


def _refuse_files(config: TraceConfig) -> None:
    """What would be found out when everything is paid for, or would be overwritten."""
    output = Path(config.output)
    if output.is_dir():
        raise ValueError(f"{output}: a folder; output names the file to write")
    if output.suffix != ".jsonl":
        raise ValueError(f"{output}: traces are JSONL; name a file that ends in .jsonl")
    if Path(config.pairs).exists() and output.exists() and output.samefile(config.pairs):
        raise ValueError(f"{output}: pairs and output are one file; give another output")


class _Work:
    """The pairs that are left, and the endpoints that are asked about them."""

    def __init__(
        self, config: TraceConfig, pairs: Sequence[Pair], on_answer: OnAnswer | None
    ) -> None:
        self.config, self.pairs, self.on_answer = config, pairs, on_answer
        self.traced = Traced()
        self.new = self.failed = self.done = 0
        self.stopped, self.error = "", ""
        self.stop = StopRequest()
        self.budget = Budget(config.max_cost)
        # A key or a package that is missing is told before any file is made.
        self.asked = {
            step: Endpoint(one, self.budget, self._ending) for step, one in config.used.items()
        }
        # An endpoint that is asked no more may have lines in the log.
        asked: dict[Pass, EndpointConfig] = {
            "teacher": config.teacher,
            "corrector": config.corrector,
        }
        self.settings: dict[Pass, dict[str, Any]] = {
            step: {
                "prompt_hash": config.prompt.hash,
                "strict_format": config.strict,
                "max_new_tokens": config.sampling(step).max_new_tokens,
                "temperature": config.temperature if one.send_sampling else None,
                "model": one.model,
            }
            for step, one in asked.items()
        }

    def begin(self, stop: StopRequest) -> None:
        """Read what earlier runs have got; `stop` is asked before each request."""
        self.stop = stop
        contents = {pair.id: content_of(pair) for pair in self.pairs}
        self.traced = resumed(self.config.log, contents, self.settings)
        self.budget.spent = self.traced.cost

    def _ending(self) -> bool:
        return self.stop.requested or bool(self.error)

    def _next(self, pair: Pair) -> Pass | None:
        return self.traced.left(pair, two_passes="corrector" in self.asked)

    async def all(self, stream: TextIO) -> None:
        """As many pairs at a time as both endpoints take requests."""
        todo = [pair for pair in self.pairs if self._next(pair)]
        self.done = len(self.pairs) - len(todo)
        self._tell()
        async with AsyncExitStack() as stack:
            for endpoint in self.asked.values():
                await stack.enter_async_context(endpoint)
            queue = iter(todo)
            workers = sum(one.concurrency for one in self.config.used.values())
            await asyncio.gather(*(self._some(queue, stream) for _ in range(workers)))
        if self.error:
            raise ValueError(self.error)

    async def _some(self, queue: Iterator[Pair], stream: TextIO) -> None:
        """Take pair after pair. An error ends all workers when what they asked for has come."""
        for pair in queue:
            try:
                while step := self._next(pair):
                    await self._ask(pair, step, stream)
            except NotSent:
                self.stopped = "" if self.error else "interrupted"
                return
            except OverBudget:  # another pair may be shorter
                cap = self.config.max_cost or 0.0
                self.stopped = f"max_cost ({cap:g} dollars) leaves no further request"
            except RequestFailed:  # the next run asks again
                self.failed += 1
            except ValueError as error:  # no request can succeed
                self.error = self.error or str(error)
                return
            self.done += 1
            self._tell()

    async def _ask(self, pair: Pair, step: Pass, stream: TextIO) -> None:
        config, endpoint = self.config, self.asked[step]
        chat = config.prompt.render(pair)
        if step == "corrector":
            fault = self.traced.faults[pair.id]["teacher"]
            chat = correction(chat, self.traced.texts[pair.id], fault, pair)
        try:
            answer = await endpoint.chat(chat, config.sampling(step))
        except Refused as error:
            if not endpoint.past.answered:  # it may be how all of them are asked
                raise
            self._keep(stream, pair, step, Reply(), error.cost, fault=f"{REFUSED}: {error}")
            return
        except RequestFailed as error:
            if error.cost:
                self._keep(stream, pair, step, Reply(), error.cost, failed=str(error))
            raise
        reply = answer.reply
        cut = reply.finish_reason == "length"
        fault = fault_of(reply.text, pair, step, cut=cut, strict=config.strict)
        self._keep(stream, pair, step, reply, answer.cost, fault=fault)

    def _keep(
        self,
        stream: TextIO,
        pair: Pair,
        step: Pass,
        reply: Reply,
        cost: float,
        *,
        fault: str = "",
        failed: str = "",
    ) -> None:
        """One line of the log; `failed` says why there is no answer, and it is asked again."""
        told = {name: value for name, value in asdict(reply).items() if name != "skipped"}
        row = {
            "id": pair.id,
            "pass": step,
            "fault": fault,
            "failed": failed,
            **told,
            "cost": cost,
            "content": content_of(pair),
            **self.settings[step],
        }
        append(stream, [row])
        self.traced.add(row)
        self.new += not failed

    def _tell(self) -> None:
        if self.on_answer is not None:
            figures = {"traces": float(len(self.traced.traces)), "dollars": self.traced.cost}
            self.on_answer(self.done, len(self.pairs), figures)
