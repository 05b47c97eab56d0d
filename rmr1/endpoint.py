"""Models behind an OpenAI-compatible endpoint: requests with limits on their rate, number and cost.

The `openai` package (extra `teacher`) sends them, tries again after errors that pass (connection,
time-out, 408, 409, 429, 5xx; with growing pauses, or those that the server asks for) and keeps the
key out of what it logs. The key comes from an environment variable and goes nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from rmr1.answers import CutShort, Progress, Reply
from rmr1.data import Message
from rmr1.engine.sampling import SamplingParams
from rmr1.section import Section

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

Result = TypeVar("Result")

# So many requests in a row that came to nothing mean that the endpoint is down.
FAILURES_IN_A_ROW = 10


class EndpointConfig(Section):
    """Where a model is served, and how much may be asked of it."""

    model: str = Field("", description="the model's name there")
    base_url: str = Field(
        "https://api.openai.com/v1", description="what the API's paths begin with"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; empty: no key"
    )
    concurrency: int = Field(8, ge=1, description="requests at the same time")
    requests_per_minute: int = Field(0, ge=0, description="0: no limit")
    timeout: float = Field(600.0, gt=0, description="seconds that one answer may take")
    retries: int = Field(6, ge=0, description="of a request, after an error that may pass")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="how the endpoint calls the cap of an answer"
    )
    send_sampling: bool = Field(
        True, description="send temperature and top_p; false for models that refuse them"
    )
    input_price: float = Field(0.0, ge=0, description="dollars for a million tokens of prompts")
    output_price: float = Field(0.0, ge=0, description="dollars for a million tokens of answers")


class RequestFailed(Exception):
    """One request came to nothing; others may not."""


class OverBudget(Exception):
    """The next request could cost more than is left."""


class Budget:
    """What may be spent, in dollars; None: anything. Each request holds its worst case back."""

    def __init__(self, limit: float | None = None) -> None:
        self.limit, self.spent = limit, 0.0
        self._held, self._changed = 0.0, asyncio.Condition()

    async def hold(self, worst: float) -> None:
        """Wait until that much is free. OverBudget when it never will be."""
        async with self._changed:
            while self.limit is not None and self.spent + self._held + worst > self.limit:
                if not self._held:
                    raise OverBudget
                await self._changed.wait()
            self._held += worst

    async def settle(self, worst: float, cost: float) -> None:
        """What was held back for a request is free again, but for what it cost."""
        async with self._changed:
            self.spent += cost
            # Sums of floats: what is left when nothing is out is not quite nothing.
            self._held = self._held - worst if self._held - worst > 1e-9 else 0.0
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply with its cost in dollars."""

    reply: Reply
    cost: float


class Endpoint:
    """A connection to an endpoint; an async context manager.

    Raises:
        ValueError: there is no model, no key, or no `openai` package.
    """

    def __init__(self, config: EndpointConfig, budget: Budget | None = None) -> None:
        if not config.model:
            raise ValueError("the endpoint's model is missing; name the one that it serves")
        self.config, self.budget = config, budget or Budget()
        self._key = _key(config.key_variable)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._next, self._failures = 0.0, 0
        self._client = _client(config, self._key)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def chat(self, chat: Sequence[Message], sampling: SamplingParams) -> Answer:
        """One answer.

        Raises:
            RequestFailed: this request came to nothing, also when tried again.
            OverBudget: it was not sent.
            ValueError: no request can succeed: a wrong key, an unknown model, nobody there.
        """
        config = self.config
        # A token has at least one byte, and a template adds a few around each turn.
        size = sum(len(turn["content"].encode()) + 16 for turn in chat)
        worst = self._cost(size, sampling.max_new_tokens)
        async with self._slots:
            await self.budget.hold(worst)
            cost = 0.0
            try:
                await self._pace()
                made = await self._send(chat, sampling)
                reply, counted = _read(made)
                cost = self._cost(reply.prompt_tokens, reply.new_tokens) if counted else worst
                self._failures = 0
                return Answer(reply, cost)
            except RequestFailed as error:
                self._failures += 1
                if self._failures >= FAILURES_IN_A_ROW:
                    raise ValueError(
                        f"{config.base_url}: {self._failures} requests in a row failed, the last"
                        f" with {error}; see whether the server is well, then run the same again"
                    ) from None
                raise
            finally:
                await self.budget.settle(worst, cost)

    def _cost(self, prompt_tokens: int, new_tokens: int) -> float:
        config = self.config
        return (prompt_tokens * config.input_price + new_tokens * config.output_price) / 1e6

    async def _pace(self) -> None:
        if not self.config.requests_per_minute:
            return
        now = time.monotonic()
        slot = max(now, self._next)
        self._next = slot + 60 / self.config.requests_per_minute
        await asyncio.sleep(slot - now)

    async def _send(self, chat: Sequence[Message], sampling: SamplingParams) -> Any:
        import openai

        messages: Any = list(chat)
        options: dict[str, Any] = {self.config.limit_name: sampling.max_new_tokens}
        if self.config.send_sampling:  # servers have defaults of their own
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        try:
            return await self._client.chat.completions.create(
                model=self.config.model, messages=messages, **options
            )
        except openai.APITimeoutError:
            seconds = self.config.timeout
            raise RequestFailed(f"no answer within {seconds:g} s") from None
        except openai.APIConnectionError as error:
            reason = self._hidden(str(error.__cause__ or error))
            raise RequestFailed(f"no connection ({reason})") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON, among others
            raise RequestFailed(f"an unreadable answer ({self._hidden(str(error))})") from None

    def _refusal(self, error: APIStatusError) -> Exception:
        config, status = self.config, error.status_code
        if status in (401, 403):
            key = f"the key in {config.key_variable}" if config.key_variable else "a missing key"
            return ValueError(f"{config.base_url} refuses {key} (HTTP {status}); give one it takes")
        told = self._hidden(str(error.message))
        if status == 404:
            return ValueError(
                f"{config.base_url} knows no model {config.model!r} or no chat completions"
                f" ({told}); see the endpoint's base_url and model"
            )
        return RequestFailed(f"HTTP {status} ({told})")

    def _hidden(self, told: str) -> str:
        """Words of a server on one line, without the key, which some of them repeat."""
        line = " ".join(told.split())[:300]
        return line.replace(self._key, "[key]") if self._key else line


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model behind an endpoint as a judge (see `answers.Answers`).

    A prompt that the server refuses, as it is too long for one, is skipped. `CutShort` when a
    request fails for any other reason: an endpoint that is down says nothing about a judge. No
    request is begun after that; those under way are waited for, as they are paid for.
    """

    config: EndpointConfig

    def answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """See `Answers`."""
        return asyncio.run(self._answer(chats, sampling, progress))

    async def _answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        progress: Progress | None,
    ) -> list[list[Reply]]:
        replies: list[Reply | None] = [None] * (len(chats) * sampling.n)
        done, total, failure = 0, len(replies), ""

        async def one(endpoint: Endpoint, row: int) -> None:
            nonlocal done, failure
            if failure:
                return
            try:
                replies[row] = (await endpoint.chat(chats[row // sampling.n], sampling)).reply
            except RequestFailed as error:
                if not str(error).startswith("HTTP 400"):
                    failure = f"{self.config.base_url}: {error}; run the same again to go on"
                    return
                replies[row] = Reply(skipped=f"refused: {error}")
            except ValueError as error:  # no request can succeed
                failure = str(error)
                return
            done += 1
            if progress is not None:
                progress(done, total)

        if progress is not None:
            progress(0, total)
        async with Endpoint(self.config) as endpoint:
            slots = asyncio.Semaphore(self.config.concurrency)

            async def in_turn(row: int) -> None:
                async with slots:
                    await one(endpoint, row)

            await together(in_turn(row) for row in range(total))
        whole = [
            [reply for reply in replies[row : row + sampling.n] if reply is not None]
            for row in range(0, total, sampling.n)
        ]
        if failure:
            kept = [samples if len(samples) == sampling.n else None for samples in whole]
            raise CutShort(failure, kept)
        return whole


async def together(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results in order; the first error cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"the environment variable {variable} is not set; put the endpoint's key there, or set"
            " key_variable to an empty text where none is needed"
        )
    return key


def _client(config: EndpointConfig, key: str) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise ValueError(
            "endpoints need the openai package; run `pip install 'rmr1[teacher]'`"
        ) from None
    return AsyncOpenAI(
        api_key=key or "none",
        base_url=config.base_url,
        timeout=config.timeout,
        max_retries=config.retries,
    )


def _read(made: Any) -> tuple[Reply, bool]:
    """The reply in a completion, and whether the server counted its tokens."""
    try:
        choice, usage = made.choices[0], made.usage
        text = choice.message.content
        # A judgment that was filtered away or a call of a tool is no text.
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        cut: Literal["stop", "length"] = "length" if choice.finish_reason == "length" else "stop"
    except (AttributeError, IndexError, TypeError) as error:
        raise RequestFailed(f"an answer that is no chat completion ({error})") from None
    prompt_tokens = getattr(usage, "prompt_tokens", None)
    new_tokens = getattr(usage, "completion_tokens", None)
    if not isinstance(prompt_tokens, int) or not isinstance(new_tokens, int):
        return Reply(text, 0, 0, cut), False
    return Reply(text, prompt_tokens, new_tokens, cut), True
