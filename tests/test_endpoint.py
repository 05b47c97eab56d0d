"""Requests to an endpoint: what fails and what is said of it, retries, pace, secrets."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from endpoint_server import Reply, serving

from rmr1.answers import CutShort
from rmr1.endpoints.endpoint import Answer, Endpoint, EndpointConfig, NotSent, RequestFailed
from rmr1.endpoints.remote_model import RemoteModel
from rmr1.engine.sampling import SamplingParams

KEY = "sk-secret-0123456789abcdef"


def config(url: str, **more: Any) -> EndpointConfig:
    return EndpointConfig.model_validate(
        {"model": "m", "base_url": url, "key_variable": "", "retries": 0, "timeout": 5.0, **more}
    )


def ask(settings: EndpointConfig) -> Answer:
    async def once() -> Answer:
        async with Endpoint(settings) as endpoint:
            return await endpoint.chat(
                [{"role": "user", "content": "?"}], SamplingParams(max_new_tokens=10)
            )

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Reply(body=b"not json"), "unreadable|no chat completion"),
        (Reply(body={}), "no chat completion"),
        (Reply(body={"choices": []}), "no chat completion"),
        (Reply(body={"choices": {"a": 1}}), "no chat completion"),
        (Reply(body={"choices": [{"message": {"content": 3}}]}), "no chat completion"),
        (Reply(body=[1, 2]), "unreadable|no chat completion"),
        (Reply(status=500, body={"error": {"message": "oh"}}), "HTTP 500 .*oh"),
        (Reply(status=400, body={"error": {"message": "too long"}}), "HTTP 400 .*too long"),
        (Reply(status=413, body={}), "HTTP 413"),
        (Reply(status=402, body={}), "HTTP 402"),
        (Reply("x", before=lambda: time.sleep(1.0)), "no answer within 0.5 s"),
    ],
)
def test_what_is_said_of_a_request_that_failed(bad: Reply, said: str) -> None:
    timeout = 0.5 if "within" in said else 30.0
    with serving(lambda *_: bad) as server, pytest.raises(RequestFailed, match=said):
        ask(config(server.url, timeout=timeout))


def test_an_answer_that_drips_is_not_waited_for_longer() -> None:
    """Each piece comes soon enough for a limit on reads; the answer as a whole does not."""

    def answer(*_: Any) -> Reply:
        return Reply("x", drips=40)

    began = time.monotonic()
    with serving(answer) as server, pytest.raises(RequestFailed, match=r"no answer within 0\.4 s"):
        ask(config(server.url, timeout=0.4))
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -5, "completion_tokens": 10},
        {"prompt_tokens": 10**400, "completion_tokens": 10},
        {"prompt_tokens": "7", "completion_tokens": 10},
        {},
    ],
)
def test_counts_that_are_none_cost_the_worst_case(usage: dict[str, Any]) -> None:
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
    with serving(lambda *_: Reply(body=body)) as server:
        answer = ask(config(server.url, output_price=100.0))
    assert answer.cost == pytest.approx(10 * 100e-6)
    assert (answer.reply.text, answer.reply.new_tokens) == ("x", 0)


def test_half_a_surrogate_pair_can_be_written_to_a_file() -> None:
    body = b'{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}'
    with serving(lambda *_: Reply(body=body)) as server:
        assert ask(config(server.url)).reply.text.encode("utf-8") == b"a?b"


def test_repeated_requests_keep_the_pace_and_the_pauses_that_are_asked_for() -> None:
    moments: list[float] = []

    def answer(*_: Any) -> Reply:
        moments.append(time.monotonic())
        if len(moments) < 4:
            return Reply(status=429, body={}, headers={"Retry-After": "0.01"})
        return Reply("x")

    with serving(answer) as server:
        ask(config(server.url, retries=5, requests_per_minute=300))
    assert len(moments) == 4
    assert moments[-1] - moments[0] > 0.45  # 0.2 s each, though the server asks for less


def test_the_pace_is_kept_from_batch_to_batch() -> None:
    moments: list[float] = []

    def answer(*_: Any) -> Reply:
        moments.append(time.monotonic())
        return Reply("x")

    with serving(answer) as server:
        judge = RemoteModel(config(server.url, requests_per_minute=300))
        for _ in range(3):
            judge.answer([[{"role": "user", "content": "?"}]] * 2, SamplingParams())
    assert moments[-1] - moments[0] > 0.95  # five pauses of 0.2 s


def test_an_end_does_not_wait_for_the_pace_of_what_is_not_sent() -> None:
    with serving(lambda *_: Reply("x")) as server:
        endpoint = Endpoint(
            config(server.url, requests_per_minute=2, concurrency=8),
            ending=lambda: len(server.requests) > 0,
        )

        async def all_of_them() -> list[Any]:
            async with endpoint:
                chat: Any = [{"role": "user", "content": "?"}]
                asked = [endpoint.chat(chat, SamplingParams()) for _ in range(6)]
                return await asyncio.gather(*asked, return_exceptions=True)

        began = time.monotonic()
        found = asyncio.run(all_of_them())
    assert time.monotonic() - began < 10  # their turns would come within 150 s
    assert sum(isinstance(one, NotSent) for one in found) == 5
    assert len(server.requests) == 1


def test_an_end_does_not_wait_for_the_pauses_that_a_server_asks_for() -> None:
    limited = Reply(status=429, body={}, headers={"Retry-After": "40"})
    with serving(lambda *_: limited) as server:
        endpoint = Endpoint(
            config(server.url, retries=3, concurrency=40), ending=lambda: len(server.requests) >= 40
        )

        async def all_of_them() -> list[Any]:
            async with endpoint:
                chat: Any = [{"role": "user", "content": "?"}]
                asked = [endpoint.chat(chat, SamplingParams()) for _ in range(40)]
                return await asyncio.gather(*asked, return_exceptions=True)

        began = time.monotonic()
        found = asyncio.run(all_of_them())
    assert time.monotonic() - began < 20
    # Given up, each of them, which says nothing about the server.
    assert all(isinstance(one, RequestFailed) for one in found)
    assert endpoint.past.failed == 0


def test_one_prompt_that_always_fails_holds_up_no_other() -> None:
    def answer(request: Any, _: int) -> Reply:
        if request["messages"][0]["content"] == "poison":
            return Reply(status=500, body={"error": {"message": "crash"}})
        return Reply("x")

    with serving(answer) as server:
        judge = RemoteModel(config(server.url, retries=0, concurrency=2, output_price=1.0))
        said = ["a", "poison", *"bcdefghijk"]
        chats: Any = [[{"role": "user", "content": one}] for one in said]
        with pytest.raises(CutShort, match=r": requests failed, the last with HTTP 500") as cut:
            judge.answer(chats, SamplingParams(n=2))
    assert cut.value.passing
    assert [one is None for one in cut.value.replies] == [one == "poison" for one in said]
    assert judge.cost > 0


def test_no_key_gets_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    # openai says "Error code: 400 - " before it; the key lies across the 300th letter.
    told = "x" * 270 + KEY
    with (
        serving(lambda *_: Reply(status=400, body={"error": {"message": told}})) as server,
        pytest.raises(RequestFailed) as error,
    ):
        ask(config(server.url, key_variable="A_KEY"))
    assert "xxx[key]" in str(error.value)
    assert KEY[:6] not in str(error.value)
    monkeypatch.setenv("A_KEY", f"{KEY}\nsk-other")
    with pytest.raises(ValueError, match="A_KEY holds no key") as refused:
        ask(config("http://127.0.0.1:9/v1", key_variable="A_KEY"))
    assert KEY[:6] not in str(refused.value)
    with pytest.raises(ValueError, match="base_url must hold no password"):
        config("http://user:password@localhost/v1")


def test_after_an_answer_a_403_is_about_the_prompt() -> None:
    def answer(_: Any, number: int) -> Reply:
        return Reply(status=403, body={"error": {"message": "moderated"}}) if number else Reply("x")

    with serving(answer) as server:
        judge = RemoteModel(config(server.url, concurrency=1))
        found = judge.answer([[{"role": "user", "content": "?"}]] * 3, SamplingParams())
    assert [one[0].skipped[:17] for one in found] == ["", "refused: HTTP 403", "refused: HTTP 403"]


def test_a_judge_passes_over_any_number_of_refused_prompts() -> None:
    """RM-Bench asks 18 times about one prompt, which may be too long."""

    def answer(request: Any, _: int) -> Reply:
        if request["messages"][0]["content"] == "long " * 9:
            return Reply(status=400, body={"error": {"message": "too long"}})
        return Reply("x")

    with serving(answer) as server:
        judge = RemoteModel(config(server.url))
        said = ["short", *["long " * 9] * 40, "short"]
        chats: Any = [[{"role": "user", "content": one}] for one in said]
        found = judge.answer(chats, SamplingParams())
        assert sum(bool(one[0].skipped) for one in found) == 40
        again = judge.answer(chats[1:40], SamplingParams())  # it has answered before
        assert all(one[0].skipped for one in again)
        with pytest.raises(CutShort, match="refused all 5 prompts") as cut:
            RemoteModel(config(server.url)).answer(chats[1:6], SamplingParams())
    assert cut.value.replies == [None] * 5


def test_refusals_that_length_does_not_explain_end_it() -> None:
    """A quota that is exhausted comes as HTTP 400 from some proxies: no reason to skip the rest."""

    def answer(_: Any, number: int) -> Reply:
        if number < 20:
            return Reply("x")
        return Reply(status=400, body={"error": {"message": "quota of project exhausted"}})

    with serving(answer) as server:
        judge = RemoteModel(config(server.url, concurrency=4))
        chats: Any = [[{"role": "user", "content": f"{number:03}"}] for number in range(80)]
        with pytest.raises(CutShort, match=r"30 requests in a row failed, .*quota") as cut:
            judge.answer(chats, SamplingParams())
    kept = [one for one in cut.value.replies if one is not None]
    assert len(kept) == 20
    assert not any(one[0].skipped for one in kept)
    assert len(server.requests) < 60
