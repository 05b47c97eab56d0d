"""OpenAI's chat completions: their bodies, in and out, and how they become a request of ours."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from rmr1.data import Message, refuse_half_characters
from rmr1.engine.generator import Rollout, SamplingParams
from rmr1.engine.rollout_stream import Piece
from rmr1.serving.bodies import MOST_TURNS, Body, few_fields


def _whole(text: str) -> str:
    refuse_half_characters(text, "the text")
    return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
# Each step looks for them in each sample, and everybody waits for the step.
Stops = Annotated[list[Stop], Field(max_length=16, fail_fast=True), BeforeValidator(_as_list)]


class ChatMessage(Body):
    """A turn; its content is a text or a list of texts."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    @field_validator("content", mode="before")
    @classmethod
    def _texts_only(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) > MOST_TURNS:
            raise ValueError(f"there may be at most {MOST_TURNS} parts, not {len(value):,}")
        texts = [part.get("text") for part in value if isinstance(part, dict)]
        if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
            raise ValueError("only parts of type text can be read")
        return "".join(map(str, texts))


class StreamOptions(Body):
    """Of which one matters here."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool | None = None


class ResponseFormat(Body):
    """Plain text is all there is."""

    type: Literal["text"]


class ChatRequest(Body):
    """What a client may ask. What would change the answer and is not known here is refused."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_TURNS, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=64)
    seed: int | None = Field(None, ge=0)
    stop: Stops = Field([])
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    # Taken note of by nobody, and harmless.
    user: str | None = None
    metadata: Annotated[dict[str, Any], BeforeValidator(few_fields)] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        """As OpenAI has it, in all fields, those that are not known here too."""
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if given is not None}

    def chat(self) -> list[Message]:
        """The turns as a chat template takes them."""
        turns: list[Message] = []
        for turn in self.messages:
            role = "system" if turn.role == "developer" else turn.role
            turns.append({"role": role, "content": turn.content})
        return turns

    def sampling(self, longest: int, seed: int) -> SamplingParams:
        """How to draw; at most `longest` tokens, `seed` for who gives none."""
        asked = self.max_completion_tokens or self.max_tokens or longest
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=min(asked, longest),
            stop=tuple(self.stop),
            seed=seed if self.seed is None else self.seed,
        )


def completion(model: str, rollouts: Sequence[Rollout], prompt_tokens: int) -> dict[str, Any]:
    """The whole answer."""
    return {
        **_head(model, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text},
                "logprobs": None,
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate(rollouts)
        ],
        "usage": usage(prompt_tokens, sum(len(one.token_ids) for one in rollouts)),
    }


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Tokens as OpenAI names them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


async def events(
    model: str, pieces: AsyncGenerator[Piece], prompt_tokens: int, *, with_usage: bool
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events, a piece each."""
    head = _head(model, "chat.completion.chunk")
    begun: set[int] = set()
    new_tokens = 0
    try:
        async for piece in pieces:
            delta: dict[str, Any] = {"content": piece.text}
            if piece.sample not in begun:
                begun.add(piece.sample)
                delta["role"] = "assistant"
            rollout = piece.rollout
            if rollout is not None:
                new_tokens += len(rollout.token_ids)
            reason = None if rollout is None else rollout.finish_reason
            choice = {"index": piece.sample, "delta": delta, "finish_reason": reason}
            yield event({**head, "choices": [choice]})
        if with_usage:
            yield event({**head, "choices": [], "usage": usage(prompt_tokens, new_tokens)})
        yield b"data: [DONE]\n\n"
    finally:
        await pieces.aclose()  # a client that has gone takes its samples out of the batch


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _head(model: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }
