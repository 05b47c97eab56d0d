"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Judgments take from tenths of a second to minutes.
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The counters of one server; the two functions are asked when they are read."""

    def __init__(self, open_requests: Callable[[], int], open_samples: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "rmr1_requests", "Requests by route and status.", ["route", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "rmr1_request_seconds", "Time of a request.", ["route"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "rmr1_tokens", "Tokens by kind: of prompts taken, of samples finished.", ["kind"],
            registry=self._registry,
        )  # fmt: skip
        self._verdicts = Counter(
            "rmr1_verdicts", "Verdicts of judgments: A, B, tie, none.", ["verdict"],
            registry=self._registry,
        )  # fmt: skip
        for name, what, now in (
            ("rmr1_open_requests", "Requests that are being answered.", open_requests),
            ("rmr1_open_samples", "Samples they hold places for.", open_samples),
        ):
            Gauge(name, what, registry=self._registry).set_function(now)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request is done."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, prompt: int, completion: int) -> None:
        """Tokens that were read and written."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def verdict(self, verdict: str | None) -> None:
        """One comparison is done."""
        self._verdicts.labels(verdict or "none").inc()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class Counted:
    """ASGI middleware that counts requests, to the last byte of what they are answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI's specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500  # of what fails before it has one

        async def sent(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            # By its route: a path of a client's own making is no label.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.request(path, status, time.monotonic() - began)
