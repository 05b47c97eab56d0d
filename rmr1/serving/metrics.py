"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Judgments take from tenths of a second to minutes.
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """The counters of one server; `open_requests` is asked when they are read."""

    def __init__(self, open_requests: Callable[[], int]) -> None:
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
            "rmr1_tokens", "Tokens by kind, prompt or completion.", ["kind"],
            registry=self._registry,
        )  # fmt: skip
        self._verdicts = Counter(
            "rmr1_verdicts", "Verdicts of judgments: A, B, tie, none.", ["verdict"],
            registry=self._registry,
        )  # fmt: skip
        open_now = Gauge(
            "rmr1_open_requests", "Prompts that are being answered.", registry=self._registry
        )
        open_now.set_function(lambda: float(open_requests()))

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
