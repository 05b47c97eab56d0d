"""A server's start and end: what it does not begin with, and how it ends while others wait."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from served_judge import BODY, ask, running

from rmr1.judge import Judge
from rmr1.models import POCKET
from rmr1.serving.app import ServerLimits, create_app
from rmr1.serving.judging import room_for_prompts
from rmr1.verbs.arguments import parse
from rmr1.verbs.serve import Serve


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(POCKET, style="compact", max_new_tokens=160)


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """What the server logs as an error."""
    told: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(handler)
    yield told
    logging.getLogger("uvicorn.error").removeHandler(handler)


def test_a_half_sent_body_does_not_hold_up_the_end(judge: Judge) -> None:
    """One of a hundred bytes has come: its sender is told, and nobody waits for the others."""
    head = b"POST /v1/judge HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with running(judge, shutdown_seconds=0.5) as (url, server):
        port = int(url.rsplit(":", 1)[1])
        with errors_logged() as told, socket.create_connection(("127.0.0.1", port), 10) as line:
            line.sendall(head)
            time.sleep(0.3)
            began = time.monotonic()
            server.should_exit = True
            line.settimeout(20)
            answer = b"".join(iter(lambda: line.recv(4096), b""))
            took = time.monotonic() - began
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in answer
    assert "shutting down" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert took < 5.0  # 0.7 s; it was 14 s
    assert told == []


def test_a_body_that_does_not_come(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmr1.serving.limits.BODY_SECONDS", 0.2)
    with running(judge) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), 10) as line:
            line.sendall(b"POST /v1/judge HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert line.recv(100).startswith(b"HTTP/1.1 408")
        assert ask(f"{url}/v1/judge", BODY)[0] == 200


def test_a_second_ctrl_c_ends_in_good_order() -> None:
    """Who waits is told, the generator's thread ends, and nothing is printed that looks broken."""
    args = [sys.executable, "-m", "rmr1.cli", "serve", "--model", "pocket", "--port", "0"]
    args += ["--prompt_style", "compact", "--max_new_tokens", "160"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RMR1_TOKEN", None)
    process = subprocess.Popen(args, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    found = None
    try:
        while found is None:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
            found = re.search(r"http://127\.0\.0\.1:(\d+)", lines[-1])
        port = int(found[1])
        line = socket.create_connection(("127.0.0.1", port), 10)
        answers = [f"It is {number}." for number in range(32)]  # 496 pairs: it would take minutes
        data = json.dumps({"prompt": "?", "answers": answers, "votes": 64}).encode()
        head = "POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        half = socket.create_connection(("127.0.0.1", port), 10)
        half.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        for one in (line, half):
            one.settimeout(20)
            assert one.recv(4096).startswith(b"HTTP/1.1 503")
            one.close()
        assert process.wait(timeout=30) == 0
        reader.join(timeout=30)
    finally:
        process.kill()
        process.stderr.close()
    told = "".join(lines)
    for broken in ("Traceback", "Error", "ERROR", "nanobind", "leaked"):
        assert broken not in told, told
    assert "shutdown complete" in told


def test_a_server_that_can_judge_nothing_does_not_begin() -> None:
    """The instructions alone are longer than what the pocket model has for prompt and texts."""
    threads = threading.active_count()
    for made, told in (
        (Judge(POCKET), "the prompt rubric has 5[0-9]{2} tokens.* room for 512 beside"),
        (
            Judge(POCKET, style="compact", max_new_tokens=1010),
            "the prompt compact has 22 .* for 14 ",
        ),
    ):
        with pytest.raises(ValueError, match=told) as error:
            create_app(made, "pocket", ServerLimits())
        for argument in ("--prompt_style compact", "--max_new_tokens"):
            assert argument in str(error.value)
        assert "\n" not in str(error.value)
    assert threading.active_count() == threads
    assert room_for_prompts(Judge(POCKET, max_new_tokens=300)) == 724


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
@pytest.mark.parametrize("argument", ["timeout", "shutdown_seconds"])
def test_seconds_are_finite(argument: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"key '{argument}': Input should be"):
        parse(Serve, ["--model", "pocket", f"--{argument}={value}"], prog="rmr1 serve")
