"""Bodies that are wrong all over: they are refused at once, and hold up nobody."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from served_judge import BODY, ask, served

from rmr1.judge import Judge
from rmr1.models import POCKET
from rmr1.serving.bodies import MOST_TURNS

JUDGE, RANK, CHAT = "/v1/judge", "/v1/rank", "/v1/chat/completions"
TURN = {"role": "user", "content": ""}
HELLO = {"model": "pocket", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 3}
MANY_KEYS = {f"{number}": 1 for number in range(120_000)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Judge(POCKET, style="compact", max_new_tokens=160)) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "body", "told", "param"),
    [
        (CHAT, {**HELLO, "messages": [1] * 900_000}, "valid dictionary", "messages.0"),
        (JUDGE, {**BODY, "prompt": [1] * 900_000}, "valid dictionary", "prompt.0"),
        (JUDGE, {**BODY, "prompt": [{"r": 1}] * 200_000}, "Field required", "prompt.0.role"),
        (JUDGE, {**BODY, "prompt": [TURN] * 60_000}, "at most 1024 items", "prompt"),
        (RANK, {"prompt": [TURN] * 50_000, "answers": ["a"] * 32}, "at most 1024", "prompt"),
        (RANK, {"prompt": "?", "answers": [1] * 900_000}, "valid string", "answers.0"),
        (JUDGE, {**BODY, **MANY_KEYS}, "120,003 fields are too many", None),
        (JUDGE, {**BODY, "prompt": [{**TURN, **MANY_KEYS}]}, "too many", "prompt.0"),
        (CHAT, {**HELLO, **MANY_KEYS}, "too many", None),
        (CHAT, {**HELLO, "response_format": MANY_KEYS}, "too many", "response_format"),
        (CHAT, {**HELLO, "messages": [{**TURN, **MANY_KEYS}]}, "too many", "messages.0"),
        (
            CHAT,
            {**HELLO, "metadata": {f"\ud800{key}": 1 for key in MANY_KEYS}},
            "too many",
            "metadata",
        ),
        (
            CHAT,
            {**HELLO, "messages": [{"role": "user", "content": [1] * 900_000}]},
            "at most 1024 parts, not 900,000",
            "messages.0.content",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_wrong_all_over_holds_up_nobody(
    url: str, path: str, body: Any, told: str, param: str | None
) -> None:
    """The first fault is told, and meanwhile the server goes on (the worst of these took 19 s)."""
    data = json.dumps(body).encode()
    assert len(data) < 3_000_000
    data = data.replace(b", ", b",").replace(b": ", b":")
    longest = 0.0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, url + path, data)
        while not asked.done():
            began = time.monotonic()
            assert ask(f"{url}/healthz")[0] == 200
            longest = max(longest, time.monotonic() - began)
        status, answer, _ = asked.result()
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert told in answer["error"]["message"]
    assert answer["error"]["param"] == param
    assert longest < 2.0  # 0.05 s; the machine may be busy


def test_a_long_conversation_is_looked_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of the answers."""
    from rmr1.serving import app

    turns: list[int] = []
    pair_of = app.pair_of

    def counted(prompt: Any, *answers: str) -> Any:
        turns.append(1 if isinstance(prompt, str) else len(prompt))
        return pair_of(prompt, *answers)

    monkeypatch.setattr(app, "pair_of", counted)
    body = {"prompt": [TURN] * MOST_TURNS, "answers": ["a"] * 32}
    status, told, _ = ask(url + RANK, body)
    assert status == 400
    assert "room for 864" in told["error"]["message"]
    assert sum(turns) < MOST_TURNS + 32
    for answers in (["a", "a", " "], [" ", "a", "a"]):
        status, told, _ = ask(url + RANK, {"prompt": "?", "answers": answers})
        assert status == 400
        assert "must be a non-empty text" in told["error"]["message"]


def test_as_many_turns_as_there_may_be(url: str) -> None:
    short = {"role": "user", "content": [{"type": "text", "text": ""}] * MOST_TURNS}
    body = {**HELLO, "messages": [short], "metadata": {"for": "a test"}}
    assert ask(url + CHAT, body)[0] == 200
    prompt = [{"role": "user", "content": "2 + 2?"}]
    assert ask(url + JUDGE, {**BODY, "prompt": prompt})[0] == 200
    status, told, _ = ask(url + CHAT, {**HELLO, "messages": [TURN] * MOST_TURNS})
    assert told["error"]["code"] == "context_length_exceeded", told
    assert status == 400


@pytest.mark.parametrize(
    ("prompt", "told", "param"),
    [
        (5, "Input should be a valid string", "prompt"),
        ({}, "Input should be a valid string", "prompt"),
        ("", "String should have at least 1 character", "prompt"),
        ([], "List should have at least 1 item", "prompt"),
        ([TURN, {"role": "judge", "content": "x"}], "Input should be 'system'", "prompt.1.role"),
    ],
)
def test_a_fault_of_the_prompt_is_told_by_its_field(
    url: str, prompt: Any, told: str, param: str
) -> None:
    """Not by the name that pydantic has for its kind."""
    status, answer, _ = ask(url + JUDGE, {**BODY, "prompt": prompt})
    assert status == 400
    assert answer["error"]["message"].startswith(f"{param}: {told}")
    assert answer["error"]["param"] == param


def test_every_private_character_and_a_special_token(url: str) -> None:
    """Such a body is answered, and not left until its time is over."""
    content = "<|pad|>" + "".join(map(chr, range(0xE000, 0xF900)))
    body = {**HELLO, "messages": [{"role": "user", "content": content}]}
    status, told, _ = ask(url + CHAT, body, timeout=20.0)
    assert status == 400
    assert "room for 1023" in told["error"]["message"]
