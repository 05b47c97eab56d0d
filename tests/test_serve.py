"""The judge over HTTP: what it answers, what it refuses, many at a time, and how it ends."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from rmr1.best_of_n import rank  # noqa: E402
from rmr1.judge import Judge  # noqa: E402
from rmr1.models import POCKET  # noqa: E402
from rmr1.serving.app import ServerLimits, create_app  # noqa: E402
from rmr1.tasks.catalog import draw_pairs  # noqa: E402

TOKEN = "a-secret-token"
PAIR = draw_pairs(2, seed=0, split="train")[0]
BODY = {
    "prompt": PAIR.conversation[0]["content"],
    "answer_a": PAIR.answer_a,
    "answer_b": PAIR.answer_b,
}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=160)


@contextmanager
def served(judge: Judge, **limits: Any) -> Iterator[str]:
    """A server on a thread; its address."""
    app = create_app(judge, "pocket", ServerLimits(**limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(judge: Judge) -> Iterator[str]:
    with served(judge, token=TOKEN) as found:
        yield found


def ask(
    url: str, body: Any = None, *, token: str | None = TOKEN, timeout: float = 60.0
) -> tuple[int, Any, dict[str, str]]:
    """Status, decoded body and headers."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            status, raw, found = reply.status, reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        status, raw, found = error.code, error.read(), dict(error.headers)
    try:
        return status, json.loads(raw), found
    except ValueError:
        return status, raw.decode(), found


def test_a_comparison_says_what_led_to_it(url: str, judge: Judge) -> None:
    status, told, _ = ask(f"{url}/v1/judge", {**BODY, "votes": 3, "swap": True})
    assert status == 200, told
    found = judge.compare(BODY["prompt"], BODY["answer_a"], BODY["answer_b"], votes=3, swap=True)
    assert (told["verdict"], told["votes"]) == (found.verdict, found.votes)
    assert [one["text"] for one in told["judgments"]] == [one.text for one in found.samples]
    assert [one["placement"] for one in told["judgments"]] == ["ab"] * 3 + ["ba"] * 3
    assert told["usage"]["completion_tokens"] == sum(one.new_tokens for one in found.samples)
    assert (told["model"], told["prompt_hash"]) == ("pocket", judge.prompt.hash)
    assert {"rubric", "solution", "quotes", "justification", "task_type"} <= told.keys()
    assert all(isinstance(quote["found"], bool) for quote in told["quotes"])


@pytest.mark.parametrize("method", ["round_robin", "knockout"])
def test_answers_are_ranked(url: str, judge: Judge, method: Any) -> None:
    """As the judge ranks them in this process."""
    answers = [PAIR.answer_a, PAIR.answer_b, "I do not know."]
    body = {"prompt": BODY["prompt"], "answers": answers, "method": method, "swap": True}
    status, told, _ = ask(f"{url}/v1/rank", body)
    assert status == 200, told
    found = rank(judge, BODY["prompt"], answers, method=method, swap=True)
    assert {key: told[key] for key in found.to_json(answers)} == found.to_json(answers)
    assert ask(f"{url}/v1/rank", {**body, "answers": ["one"]})[0] == 400
    assert ask(f"{url}/v1/rank", {**body, "method": "elo"})[0] == 400
    status, told, _ = ask(f"{url}/v1/rank", {**body, "answers": ["a", "long " * 3000]})
    assert status == 400
    assert "positions" in told["error"]["message"]


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


@pytest.mark.skipif(not any(os.access(f"{p}/curl", os.X_OK) for p in os.environ["PATH"].split(":")),
                    reason="no curl")  # fmt: skip
def test_curl(url: str) -> None:
    args = ["curl", "-sS", "-H", f"Authorization: Bearer {TOKEN}", f"{url}/v1/judge"]
    args += ["-H", "Content-Type: application/json", "-d", json.dumps(BODY)]
    told = json.loads(subprocess.run(args, check=True, capture_output=True).stdout)
    assert told["verdict"] in ("A", "B", "tie", None)
    args = [*args[:5], "-d", json.dumps(BODY)]  # as a form, which is curl's way
    told = json.loads(subprocess.run(args, check=True, capture_output=True).stdout)
    assert "Content-Type: application/json" in told["error"]["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON|utf|decod"),
        (b"[]", "valid dictionary|object"),
        ({}, "prompt: Field required"),
        ({**BODY, "answer_b": ""}, "answer_b: String should have at least 1"),
        ({**BODY, "answer_b": " \n"}, '"answer_b" must be a non-empty text'),
        ({**BODY, "prompt": "  "}, "prompt must not be empty"),
        ({**BODY, "prompt": [{"role": "assistant", "content": "x"}]}, "must end with a user turn"),
        ({**BODY, "votes": 0}, "votes: Input should be greater"),
        ({**BODY, "votes": 1000}, "votes: Input should be less"),
        ({**BODY, "vote": 1}, "vote: Extra inputs"),
        ({**BODY, "answer_a": "\ud800"}, "half a surrogate|valid string"),
        ({**BODY, "answer_a": "long " * 3000}, "3042 tokens, which with max_new_tokens=160"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_malformed_body_is_told_what_is_wrong(url: str, body: Any, told: str) -> None:
    import re

    status, answer, _ = ask(f"{url}/v1/judge", body)
    assert status == 400, answer
    assert re.search(told, answer["error"]["message"]), answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_tokens(url: str) -> None:
    for token in (None, "", "wrong", TOKEN + "x"):
        status, answer, headers = ask(f"{url}/v1/judge", BODY, token=token)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert answer["error"]["type"] == "authentication_error"
    assert ask(f"{url}/metrics", token=None)[0] == 401
    assert ask(f"{url}/healthz", token=None)[:2] == (200, {"status": "ok"})


def test_other_paths_and_the_api_page(url: str) -> None:
    assert ask(f"{url}/v1/nothing")[0] == 404
    assert ask(f"{url}/v1/judge")[0] == 405
    paths = ask(f"{url}/openapi.json")[1]["paths"]
    assert {"/v1/judge", "/v1/chat/completions", "/healthz", "/metrics"} <= paths.keys()


def test_metrics(url: str) -> None:
    ask(f"{url}/v1/judge", BODY)
    ask(f"{url}/v1/judge", {})
    ask(f"{url}/some/path")
    status, text, _ = ask(f"{url}/metrics")
    assert status == 200
    assert 'rmr1_requests_total{route="/v1/judge",status="200"}' in text
    assert 'rmr1_requests_total{route="/v1/judge",status="400"}' in text
    assert 'route="other",status="404"' in text
    assert "rmr1_open_requests 0.0" in text
    assert 'rmr1_tokens_total{kind="completion"}' in text
    assert "/some/path" not in text


def test_many_at_a_time(url: str, judge: Judge) -> None:
    """32 clients: each gets its own answer, that of a judge who has nothing else to do."""
    pairs = draw_pairs(32, seed=3, split="train")
    bodies = [
        {"prompt": p.conversation[0]["content"], "answer_a": p.answer_a, "answer_b": p.answer_b}
        for p in pairs
    ]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: ask(f"{url}/v1/judge", body), bodies))
    assert {status for status, _, _ in answers} == {200}
    alone = [judge.compare(*body.values()) for body in bodies]
    same = [told["text"] == one.text for (_, told, _), one in zip(answers, alone, strict=True)]
    # Sums depend on the batch in their last bits, so a draw may fall otherwise now and then.
    assert sum(same) >= 30


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


def open_requests(url: str) -> float:
    text = ask(f"{url}/metrics", token=None)[1]
    line = next(one for one in text.splitlines() if one.startswith("rmr1_open_requests "))
    return float(line.split()[1])


def wait_for_open(url: str, count: int) -> None:
    until = time.monotonic() + 30
    while open_requests(url) < count:
        assert time.monotonic() < until


def wait_until_idle(url: str) -> None:
    until = time.monotonic() + 30
    while open_requests(url):
        assert time.monotonic() < until
        time.sleep(0.05)


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
        status, answer, _ = ask(f"{url}/v1/judge", BODY)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        failing = False
        assert ask(f"{url}/v1/judge", BODY)[0] == 200


def test_the_command_serves_and_ends_in_good_order() -> None:
    """SIGTERM while a request is open: it is answered, then the process ends with code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [sys.executable, "-m", "rmr1.cli", "serve", "--model", "pocket", "--port", str(port)]
    args += ["--prompt_style", "compact", "--max_new_tokens", "160"]
    environment = {**os.environ, "RMR1_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(args, env=environment, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                assert ask(f"{url}/healthz", token=None)[0] == 200
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            open_one = pool.submit(ask, f"{url}/v1/judge", {**BODY, "votes": 32, "swap": True})
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert open_one.result(timeout=60)[0] == 200
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert TOKEN not in told
