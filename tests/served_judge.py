"""A judge that is served on a thread, and a client: what the tests of `rmr1 serve` share."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rmr1.judge import Judge
from rmr1.serving.app import ServerLimits, create_app
from rmr1.serving.lifetime import HttpServer
from rmr1.tasks.catalog import draw_pairs

TOKEN = "a-secret-token"
PAIR = draw_pairs(2, seed=0, split="train")[0]
BODY = {
    "prompt": PAIR.conversation[0]["content"],
    "answer_a": PAIR.answer_a,
    "answer_b": PAIR.answer_b,
}


@contextmanager
def running(
    judge: Judge, shutdown_seconds: float = 30.0, **limits: Any
) -> Iterator[tuple[str, HttpServer]]:
    """A server on a thread: its address, and itself."""
    app = create_app(judge, "pocket", ServerLimits(**limits))
    server = HttpServer(app, "127.0.0.1", 0, shutdown_seconds, log_level="warning")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@contextmanager
def served(judge: Judge, **limits: Any) -> Iterator[str]:
    """Its address alone."""
    with running(judge, **limits) as (url, _):
        yield url


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


def metric(url: str, name: str, *, token: str | None = None) -> float:
    """A counter or gauge by its name with its labels; 0 where it is not there yet."""
    text = ask(f"{url}/metrics", token=token)[1]
    found = [one for one in text.splitlines() if one.startswith(f"{name} ")]
    return float(found[0].split()[-1]) if found else 0.0


def open_requests(url: str) -> float:
    return metric(url, "rmr1_open_requests")


def wait_for_open(url: str, count: int) -> None:
    until = time.monotonic() + 30
    while open_requests(url) < count:
        assert time.monotonic() < until


def wait_until_idle(url: str) -> None:
    until = time.monotonic() + 30
    while open_requests(url):
        assert time.monotonic() < until
        time.sleep(0.05)


def slow_steps(judge: Judge, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each step of the generator takes so long, as on a model of another size."""
    step = judge.generator._step

    def slow() -> int:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(judge.generator, "_step", slow)
