"""OpenAI's API on a judge's model, as the official client and the specification have it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from served_judge import PAIR, TOKEN, ask, served  # noqa: E402

from rmr1.judge import Judge  # noqa: E402
from rmr1.models import POCKET  # noqa: E402
from rmr1.prompts import encode  # noqa: E402

HELLO = {"model": "pocket", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 3}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=160)


@pytest.fixture(scope="module")
def url(judge: Judge) -> Iterator[str]:
    with served(judge, token=TOKEN) as found:
        yield found


def test_the_official_client(url: str, judge: Judge) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    assert [one.id for one in client.models.list()] == ["pocket"]
    chat: Any = judge.prompt.render(PAIR)
    given: Any = {"model": "pocket", "messages": chat, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**given)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 40
    events = list(
        client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(one.choices[0].delta.content or "" for one in events if one.choices) == text
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage == whole.usage
    two = client.chat.completions.create(**{**given, "temperature": 1.0}, n=2, seed=7)
    again = client.chat.completions.create(**{**given, "temperature": 1.0}, n=2, seed=7)
    assert [one.message.content for one in two.choices] == [
        one.message.content for one in again.choices
    ]
    assert [one.index for one in two.choices] == [0, 1]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(**{**given, "model": "gpt"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**{**given, "temperature": 3})
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**given, tools=[{"type": "function"}])
    with pytest.raises(openai.AuthenticationError, match="bearer token"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


def test_parts_of_a_message_and_stop(url: str, judge: Judge) -> None:
    text = judge.prompt.render(PAIR)[0]["content"]
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
    body: dict[str, Any] = {"model": "pocket", "temperature": 0, "max_tokens": 60}
    path = f"{url}/v1/chat/completions"
    whole = ask(path, {**body, "messages": [{"role": "user", "content": text}]})
    body["messages"] = [{"role": "user", "content": parts}]
    split = ask(path, {**body, "stop": "</eval>"})
    first, second = (one[1]["choices"][0]["message"]["content"] for one in (whole, split))
    assert first.split("</eval>")[0] == second


@pytest.mark.parametrize(
    "more",
    [
        dict.fromkeys(["temperature", "top_p", "n", "stream", "stop", "seed", "top_k", "user"]),
        {"tools": None, "tool_choice": None, "logit_bias": None, "max_completion_tokens": None},
        {"response_format": {"type": "text"}},
        {"stop": ["x" * 256] * 16},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_openai_takes(url: str, more: dict[str, Any]) -> None:
    status, told, _ = ask(f"{url}/v1/chat/completions", {**HELLO, **more})
    assert status == 200, told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"messages": None}, "messages: Field required"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate"),
        ({"stop": "\ud800"}, "valid string"),
        ({"stop": ["a"] * 17}, "stop.*at most 16 items"),
        ({"stop": ["a", "x" * 257]}, "stop.*at most 256 characters"),
        ({"stop": "x" * 257}, "stop.*at most 256 characters"),
        ({"stop": ""}, "stop.*at least 1 character"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be"),
        ({"tools": [{"type": "function"}]}, "tools: Extra inputs"),
        ({"messages": [{"role": "user", "content": "long " * 1100}]}, "room for 1023 beside"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_refused(url: str, more: dict[str, Any], told: str) -> None:
    status, answer, _ = ask(f"{url}/v1/chat/completions", {**HELLO, **more})
    assert status == 400, answer
    assert re.search(told, answer["error"]["message"]), answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_an_answer_has_the_positions_that_are_left(url: str, judge: Judge) -> None:
    """Of the model's 1,024; more than the server's cap is not given, and `length` says so."""
    messages = [{"role": "user", "content": "long " * 1000}]
    left = 1024 - len(encode(judge.tokenizer, messages))
    assert 0 < left < 160
    for given in ({}, {"max_tokens": 500}):
        body = {"model": "pocket", "messages": messages, "temperature": 0, **given}
        status, told, _ = ask(f"{url}/v1/chat/completions", body)
        assert status == 200, told
        [choice] = told["choices"]
        if choice["finish_reason"] == "length":
            assert told["usage"]["completion_tokens"] == left
        else:
            assert told["usage"]["completion_tokens"] < left
    # Whatever the model would say, one token is not the whole of it.
    told = ask(f"{url}/v1/chat/completions", {**HELLO, "max_tokens": 1})[1]
    assert told["choices"][0]["finish_reason"] == "length"


def test_one_model_by_its_name(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
    assert client.models.retrieve("pocket").id == "pocket"
    with pytest.raises(openai.NotFoundError, match="no model 'some/other'"):
        client.models.retrieve("some/other")
