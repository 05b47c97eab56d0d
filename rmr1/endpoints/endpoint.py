"""Models behind an OpenAI-compatible endpoint: requests with limits on their rate, number and cost.

The `openai` package (extra `teacher`) sends them. Errors that pass (connection, time-out, 408, 409,
429, 5xx) are tried again, with growing pauses or those that the server asks for. The key comes from
an environment variable, goes nowhere else and is kept out of what is said.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rmr1.answers import Reply
from rmr1.data import Message
from rmr1.endpoints.budget import Budget, OverBudget
from rmr1.endpoints.completion import read_completion, usage_of
from rmr1.engine.sampling import SamplingParams
from rmr1.section import Section

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

# So many requests in a row that came to nothing mean that the endpoint is down; so many that were
# refused, though longer ones were answered or though none was, that it is how they are asked, or
# who asks. (Benchmarks ask 18 times about one prompt.)
IN_A_ROW = 30
LONGEST_PAUSE = 60.0  # seconds


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
    requests_per_minute: int = Field(0, ge=0, description="repeated ones count; 0: no limit")
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

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        if "@" in urlsplit(value).netloc:
            raise ValueError("base_url must hold no password, as it is shown; use key_variable")
        return value


class RequestFailed(Exception):
    """One request came to nothing; others may not. `cost` is what was paid all the same."""

    def __init__(self, why: str, *, cost: float = 0.0) -> None:
        super().__init__(why)
        self.cost = cost


class Refused(RequestFailed):
    """The server will not answer this very prompt, however often it is asked."""


class NotSent(Exception):
    """The work is ending, so the request was not begun."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply with its cost in dollars, that of attempts which failed included."""

    reply: Reply
    cost: float


@dataclass(slots=True)
class Past:
    """What a server has shown of itself, and when it may be asked again.

    `failed` and `refused` count those in a row, `refused` only where length is no reason;
    `longest` is the size of the longest chat that it answered. `free` is the moment from which
    `requests_per_minute` allows a request.
    """

    answered: int = 0
    longest: int = 0
    failed: int = 0
    refused: int = 0
    free: float = 0.0


class Endpoint:
    """A connection to an endpoint; an async context manager.

    `ending` is asked before each request is sent; once it says so, none is begun. `past` is what
    the server has shown of itself; connections to one server may share it.

    Raises:
        ValueError: there is no model, no key, or no `openai` package.
    """

    def __init__(
        self,
        config: EndpointConfig,
        budget: Budget | None = None,
        ending: Callable[[], bool] = lambda: False,
        past: Past | None = None,
    ) -> None:
        if not config.model:
            raise ValueError("the endpoint's model is missing; name the one that it serves")
        self.config, self.budget, self.ending = config, budget or Budget(), ending
        self.past = past or Past()
        self._key = _key(config.key_variable)
        self._slots = asyncio.Semaphore(config.concurrency)
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
            Refused: nor would it if it were asked again.
            OverBudget: it was not sent, as it may cost more than is left.
            NotSent: it was not sent, as the work is ending.
            ValueError: no request can succeed: a wrong key, an unknown model, nobody there.
        """
        past, size = self.past, _size(chat)
        async with self._slots:
            try:
                answer = await self._insist(chat, sampling)
            except Refused as error:
                past.refused += size <= past.longest or not past.answered
                if past.refused >= IN_A_ROW:
                    raise self._hopeless(past.refused, error) from None
                raise
            except RequestFailed as error:
                past.failed += not self.ending()  # what is given up then says nothing
                if past.failed >= IN_A_ROW:
                    raise self._hopeless(past.failed, error) from None
                raise
            past.answered += 1
            past.longest = max(past.longest, size)
            past.failed = past.refused = 0
            return answer

    def _hopeless(self, count: int, error: RequestFailed) -> ValueError:
        return ValueError(
            f"{self.config.base_url}: {count} requests in a row failed, the last with {error}; see"
            " whether the server is well and takes these settings, then run the same again"
        )

    async def _insist(self, chat: Sequence[Message], sampling: SamplingParams) -> Answer:
        """Try until there is an answer, or no use in it."""
        worst = self._cost(_size(chat), sampling.max_new_tokens)
        paid = 0.0
        for attempt in itertools.count():
            try:
                reply, cost = await self._once(chat, sampling, worst)
                return Answer(reply, paid + cost)
            except _Passing as error:
                paid += error.cost
                failed: RequestFailed = error
                if attempt < self.config.retries:
                    pause = error.pause or min(0.5 * 2**attempt, 8) * _jitter()
                    await self._wait(time.monotonic() + pause)
                    continue
            except RequestFailed as error:
                paid += error.cost
                failed = error
            except (OverBudget, NotSent):
                if not attempt:
                    raise
                failed = RequestFailed(f"{failed}; not tried again, as the work is ending")
            failed.cost = paid
            raise failed from None
        raise AssertionError("not reached")

    async def _once(
        self, chat: Sequence[Message], sampling: SamplingParams, worst: float
    ) -> tuple[Reply, float]:
        """(reply, cost) of one attempt."""
        await self.budget.hold(worst)
        cost = 0.0
        try:
            await self._pace()
            try:
                made = await self._send(chat, sampling)
            except TimeoutError:
                cost = worst  # it may have written all that it was asked for
                raise _Passing(f"no answer within {self.config.timeout:g} s", cost=cost) from None
            counted = usage_of(made)
            cost = worst if counted is None else self._cost(*counted)
            try:
                return read_completion(made), cost
            except ValueError as error:
                why = f"an answer that is no chat completion ({error})"
                raise RequestFailed(why, cost=cost) from None
        finally:
            await self.budget.settle(worst, cost)

    def _cost(self, prompt_tokens: int, new_tokens: int) -> float:
        config = self.config
        return (prompt_tokens * config.input_price + new_tokens * config.output_price) / 1e6

    async def _pace(self) -> None:
        """Wait for this request's turn. NotSent: the work is ending."""
        slot = time.monotonic()
        if self.config.requests_per_minute:
            slot = max(slot, self.past.free)
            self.past.free = slot + 60 / self.config.requests_per_minute
        await self._wait(slot)
        if self.ending():
            raise NotSent

    async def _wait(self, until: float) -> None:
        """Until a moment, or the end of the work."""
        while not self.ending() and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.2))

    async def _send(self, chat: Sequence[Message], sampling: SamplingParams) -> Any:
        """What the server sends back. TimeoutError; RequestFailed; ValueError: no hope."""
        import openai

        messages: Any = list(chat)
        options: dict[str, Any] = {self.config.limit_name: sampling.max_new_tokens}
        if self.config.send_sampling:  # servers have defaults of their own
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        try:
            async with asyncio.timeout(self.config.timeout):
                return await self._client.chat.completions.create(
                    model=self.config.model, messages=messages, **options
                )
        except openai.APITimeoutError:
            raise TimeoutError from None
        except openai.APIConnectionError as error:
            reason = self._hidden(str(error.__cause__ or error))
            raise _Passing(f"no connection ({reason})") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON, among others
            raise RequestFailed(f"an unreadable answer ({self._hidden(str(error))})") from None

    def _refusal(self, error: APIStatusError) -> Exception:
        config, status = self.config, error.status_code
        told = self._hidden(str(error.message))
        # Once the key has opened, a 403 is about the prompt: some moderate with it.
        if status == 401 or (status == 403 and not self.past.answered):
            key = f"the key in {config.key_variable}" if config.key_variable else "a missing key"
            return ValueError(
                f"{config.base_url} refuses {key} (HTTP {status}, {told}); give one it takes"
            )
        if status == 404:
            return ValueError(
                f"{config.base_url} knows no model {config.model!r} or no chat completions"
                f" ({told}); see the endpoint's base_url and model"
            )
        if status in (400, 403, 413, 422):
            return Refused(f"HTTP {status} ({told})")
        if status in (408, 409, 429) or status >= 500:
            return _Passing(f"HTTP {status} ({told})", pause=_asked_pause(error))
        return RequestFailed(f"HTTP {status} ({told})")

    def _hidden(self, told: str) -> str:
        """Words of a server on one line, without the key, which some of them repeat."""
        line = " ".join(told.split())
        return (line.replace(self._key, "[key]") if self._key else line)[:300]


class _Passing(RequestFailed):
    """An attempt that failed for a reason that may pass; `pause` in seconds, 0: as we like."""

    def __init__(self, why: str, *, pause: float = 0.0, cost: float = 0.0) -> None:
        super().__init__(why, cost=cost)
        self.pause = pause


def _size(chat: Sequence[Message]) -> int:
    """The most tokens that a chat can have: each has a byte, and a template adds a few a turn."""
    return sum(len(turn["content"].encode()) + 16 for turn in chat)


def _jitter() -> float:
    """Clients that were turned away together shall not come back together."""
    return random.uniform(0.75, 1.25)


def _asked_pause(error: APIStatusError) -> float:
    """Seconds that the server asks for; 0: none, or a date."""
    try:
        asked = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return min(asked, LONGEST_PAUSE) if asked > 0 else 0.0


def _key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"the environment variable {variable} is not set; put the endpoint's key there, or set"
            " key_variable to an empty text where none is needed"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"the environment variable {variable} holds no key: one line of plain letters, digits"
            " and signs is expected"
        )
    return key


def _client(config: EndpointConfig, key: str) -> AsyncOpenAI:
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise ValueError(
            "endpoints need the openai package; run `pip install 'rmr1[teacher]'`"
        ) from None
    # Repeated here and not there: what is repeated keeps the pace and the budget too.
    return AsyncOpenAI(
        api_key=key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
    )
