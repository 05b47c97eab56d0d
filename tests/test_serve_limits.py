"""The judge over HTTP under load: what it refuses, in what time, and what it tells at its end."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import socket
import threading
import time
import urllib.request
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from served_judge import (  # noqa: E402
    BODY,
    PAIR,
    TOKEN,
    ask,
    metric,
    running,
    served,
    slow_steps,
    wait_for_open,
    wait_until_idle,
)

from rmr1.judge import Judge  # noqa: E402
from rmr1.models import POCKET  # noqa: E402
from rmr1.verbs.serve import Serve, bearer_token  # noqa: E402

ANSWERS = [f"It is {number}." for number in range(24)]
RANK = {"prompt": BODY["prompt"], "answers": ANSWERS}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=160)


@pytest.fixture(scope="module")
def terse() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=2)


def chat(judge: Judge, **more: Any) -> dict[str, Any]:
    """A chat that goes on for a while."""
    return {"model": "pocket", "messages": judge.prompt.render(PAIR), "max_tokens": 160, **more}


def test_too_many_at_a_time_are_told_to_come_back(judge: Judge) -> None:
    with served(judge, max_open=2) as url:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: ask(f"{url}/v1/judge", BODY), range(12)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 503}
        refused = answers[statuses.index(503)]
        assert refused[2]["retry-after"] == "1"
        assert "busy" in refused[1]["error"]["message"]
        # Both orders need two places, which are free again.
        assert ask(f"{url}/v1/judge", {**BODY, "swap": True})[0] == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
        assert client.models.list().data[0].id == "pocket"


def test_an_oversized_body(judge: Judge) -> None:
    with served(judge, max_body_bytes=1000) as url:
        status, answer, _ = ask(f"{url}/v1/judge", {**BODY, "answer_a": "x" * 2000})
        assert status == 413
        assert "larger than 1,000 bytes" in answer["error"]["message"]
        # Without a length in front, in chunks.
        chunks = b"".join(b"190\r\n" + b"x" * 400 + b"\r\n" for _ in range(20)) + b"0\r\n\r\n"
        head = b"POST /v1/judge HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as line:
            line.sendall(head + chunks)
            assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_a_request_that_takes_too_long(judge: Judge) -> None:
    with served(judge, timeout=0.001) as url:
        status, answer, _ = ask(f"{url}/v1/judge", {**BODY, "votes": 16})
        assert status == 504
        assert "longer than this server allows" in answer["error"]["message"]
        wait_until_idle(url)


def test_a_client_that_goes_away_frees_its_place(judge: Judge) -> None:
    with served(judge) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as line:
            data = json.dumps({**BODY, "votes": 64, "swap": True}).encode()
            head = "POST /v1/judge HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(data)}\r\n\r\n"
            line.sendall(head.encode() + data)
            wait_for_open(url, 1)
        wait_until_idle(url)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chat: Any = judge.prompt.render(PAIR)
        stream = client.chat.completions.create(model="pocket", messages=chat, stream=True)
        next(iter(stream))
        stream.close()
        wait_until_idle(url)


def test_a_ranking_needs_no_more_places_than_there_are(terse: Judge) -> None:
    """276 comparisons, 8 places: they follow as places come free, and others get in meanwhile."""
    with served(terse, max_open=8) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        ranking = pool.submit(ask, f"{url}/v1/rank", RANK)
        wait_for_open(url, 1)
        assert ask(f"{url}/v1/judge", {**BODY, "swap": True})[0] == 200
        assert not ranking.done()
        status, told, _ = ranking.result()
        assert (status, told["comparisons"]) == (200, 276)
        assert metric(url, "rmr1_open_samples") == 0


def test_samples_count_and_not_prompts(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(judge, monkeypatch, 0.02)
    path = "/v1/chat/completions"
    with served(judge, max_open=8) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url + path, chat(judge, n=8, max_tokens=20))
        wait_for_open(url, 1)
        assert metric(url, "rmr1_open_samples") == 8
        assert ask(url + path, chat(judge))[0] == 503
        assert first.result()[0] == 200
        for body, where in ((chat(judge, n=9), path), ({**BODY, "votes": 9}, "/v1/judge")):
            status, told, _ = ask(url + where, body)
            assert status == 400  # it would never have its turn
            assert "at most 8 at a time" in told["error"]["message"]


def test_a_large_body_holds_up_nobody(judge: Judge) -> None:
    """Eight answers of 240 kB: while they are refused the server goes on (this took 17 s)."""
    body = {"prompt": "Which?", "answers": [f"{i} answers so " * 16_000 for i in range(8)]}
    with served(judge) as url, concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, f"{url}/v1/rank", body)
        longest = 0.0
        while not asked.done():
            began = time.monotonic()
            assert ask(f"{url}/healthz")[0] == 200
            longest = max(longest, time.monotonic() - began)
        status, told, _ = asked.result()
    assert status == 400
    assert "room for 864" in told["error"]["message"]
    assert longest < 2.0  # 0.05 s; the machine may be busy


def test_one_deadline_for_all_rounds(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round of this knockout takes less than a request may take, all five take more.

    Twelve of them at once: none has a thread to wait for.
    """
    slow_steps(judge, monkeypatch, 0.02)
    body = {**RANK, "method": "knockout"}
    with served(judge, timeout=1.0) as url, concurrent.futures.ThreadPoolExecutor(12) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda _: ask(f"{url}/v1/rank", body), range(12)))
        took = time.monotonic() - began
        waiting = [one.name for one in threading.enumerate() if one.name.startswith("asyncio_")]
        wait_until_idle(url)
    assert {status for status, _, _ in answers} == {504}
    assert took < 5.0
    assert not waiting


def test_a_late_stream_ends_with_an_error(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(judge, monkeypatch, 0.02)
    with served(judge, timeout=0.5) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(**chat(judge, n=4), stream=True)
        pieces = []
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            pieces.extend(stream)
        assert pieces
        wait_until_idle(url)


def test_who_waits_at_the_end_is_told(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graceful end that is too short for them; nothing of it is an error of the server."""
    slow_steps(judge, monkeypatch, 0.05)
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    begun = threading.Event()

    def stream(url: str) -> tuple[int, str]:
        data = json.dumps(chat(judge, n=4, stream=True)).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{url}/v1/chat/completions", data, headers)
        with urllib.request.urlopen(asked, timeout=60) as reply:
            first = reply.readline()
            begun.set()
            return reply.status, (first + reply.read()).decode()

    # The pool is the outer one: it waits for its threads, and these for the server's end.
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # noqa: SIM117
        with running(judge, shutdown_seconds=0.3) as (url, server):
            logging.getLogger("uvicorn.error").addHandler(handler)
            asked = [
                pool.submit(ask, f"{url}/v1/judge", {**BODY, "votes": 32}),
                pool.submit(ask, f"{url}/v1/rank", RANK),
                pool.submit(stream, url),
            ]
            wait_for_open(url, 3)
            assert begun.wait(60)
            server.should_exit = True
            judged, ranked, streamed = (one.result(timeout=60) for one in asked)
    logging.getLogger("uvicorn.error").removeHandler(handler)
    for status, told, headers in (judged, ranked):
        assert (status, headers["content-type"]) == (503, "application/json")
        assert "shutting down" in told["error"]["message"]
    assert streamed[0] == 200
    last = streamed[1].strip().rsplit("data: ", 1)[1]
    assert "shutting down" in json.loads(last)["error"]["message"]
    assert [one.getMessage() for one in records] == []


@pytest.mark.parametrize(("given", "seconds"), [(None, 7.0), (2.5, 2.5)])
def test_a_graceful_end_has_the_time_of_a_request(
    monkeypatch: pytest.MonkeyPatch, judge: Judge, given: float | None, seconds: float
) -> None:
    from rmr1.serving import lifetime

    ends: list[float] = []
    monkeypatch.setattr(lifetime.HttpServer, "run", lambda self: ends.append(self._seconds))
    monkeypatch.setattr(Serve, "judge", lambda self: judge)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("rmr1.serving.batching.Batching._run", lambda self: None)  # nobody ends it
    Serve(model="pocket", timeout=7, shutdown_seconds=given).run()
    assert ends == [seconds]


def test_a_failed_step_is_told_and_the_next_request_is_served(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(judge) as url:
        step, failing = judge.generator._step, True

        def fails() -> int:
            if failing:
                raise RuntimeError("out of luck")
            return step()

        monkeypatch.setattr(judge.generator, "_step", fails)
        for _ in range(3):
            assert ask(f"{url}/healthz")[0] == 200
            status, answer, _ = ask(f"{url}/v1/judge", BODY)
            assert (status, answer["error"]["type"]) == (500, "server_error")
            assert "luck" not in answer["error"]["message"]
        assert ask(f"{url}/healthz")[:2] == (503, {"status": "failing"})
        failing = False
        assert ask(f"{url}/v1/judge", BODY)[0] == 200
        assert ask(f"{url}/healthz")[:2] == (200, {"status": "ok"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_generator_is_told(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends() -> int:
        raise SystemExit

    with served(judge) as url:
        monkeypatch.setattr(judge.generator, "_step", ends)
        for _ in range(2):
            assert ask(f"{url}/v1/judge", BODY)[0] == 500
            assert ask(f"{url}/healthz")[0] == 503


def test_a_fault_of_the_server_tells_nothing_of_it(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("a secret of the house")

    monkeypatch.setattr("rmr1.serving.app.to_json", fails)
    with served(judge) as url:
        status, told, headers = ask(f"{url}/v1/judge", BODY)
        assert (status, headers["content-type"]) == (500, "application/json")
        assert told["error"]["type"] == "server_error"
        assert "secret" not in str(told)
        assert metric(url, 'rmr1_requests_total{route="/v1/judge",status="500"}') == 1


def test_tokens(judge: Judge) -> None:
    with served(judge, token=TOKEN) as url:
        for token in (None, "", "wrong", TOKEN + "x"):
            status, answer, headers = ask(f"{url}/v1/judge", BODY, token=token)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert answer["error"]["type"] == "authentication_error"
        assert ask(f"{url}/metrics", token=None)[0] == 401
        # What a load balancer and a browser open.
        assert ask(f"{url}/healthz", token=None)[:2] == (200, {"status": "ok"})
        assert ask(f"{url}/docs", token=None)[0] == 200
        told = ask(f"{url}/openapi.json", token=None)[1]
        assert "HTTPBearer" in told["components"]["securitySchemes"]


def test_a_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RMR1_TOKEN", raising=False)
    assert bearer_token("RMR1_TOKEN") == ""
    for given in (TOKEN, f"{TOKEN}\n", f" {TOKEN}\r\n"):
        monkeypatch.setenv("RMR1_TOKEN", given)
        assert bearer_token("RMR1_TOKEN") == TOKEN
    for given, told in (
        (" \n", "white space only"),
        ("a\x07b", "no printable ASCII"),
        ("a b", "a space"),
        ("schlüssel", "no printable ASCII"),
    ):
        monkeypatch.setenv("RMR1_TOKEN", given)
        with pytest.raises(ValueError, match=f"RMR1_TOKEN.*{told}"):
            bearer_token("RMR1_TOKEN")
