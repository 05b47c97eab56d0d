"""An OpenAI-compatible server on loopback that answers, fails or talks nonsense as a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


@dataclass
class Reply:
    """What the server sends: a completion's text, or anything else."""

    text: str | None = None
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    usage: bool = True
    finish_reason: str = "stop"
    before: Callable[[], None] = lambda: None
    drips: int = 0  # so many spaces before the body, 0.1 s apart


@dataclass
class Server:
    """Where it listens, and every request that came, with its Authorization header."""

    url: str
    requests: list[Request] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[Request, int], Reply]) -> Iterator[Server]:
    """`answer(request, number)` decides what the request with that number gets."""
    server = Server("")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(request)
                server.keys.append(self.headers.get("Authorization", ""))
            reply = answer(request, number)
            reply.before()
            body = reply.body
            if body is None:
                body = completion(reply)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) + reply.drips))
            self.end_headers()
            for _ in range(reply.drips):
                time.sleep(0.1)
                self.wfile.write(b" ")
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up, as some tests want
                super().handle()

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def completion(reply: Reply) -> dict[str, Any]:
    """A chat completion that says the text."""
    made: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": reply.finish_reason,
                "message": {"role": "assistant", "content": reply.text},
            }
        ],
    }
    if reply.usage:
        made["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return made
