"""The judge over HTTP: /v1/judge, /v1/rank, OpenAI's chat completions, /healthz and /metrics.

Answers are computed together: whatever is asked at the same time shares the generator's batch. An
error is a JSON object as OpenAI's clients read it. /docs shows the API.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from rmr1.best_of_n import ranked
from rmr1.judge import Answer, Judge, pair_of
from rmr1.judgment_view import to_json
from rmr1.prompts import encode
from rmr1.serving import chat
from rmr1.serving.batching import Batching, Busy
from rmr1.serving.judging import ServedJudge
from rmr1.serving.limits import Limits, error_body
from rmr1.serving.metrics import Metrics
from rmr1.serving.schemas import JudgeReply, JudgeRequest, RankRequest

Result = TypeVar("Result")

_RETRY_SECONDS = "1"
_CLOSED_BY_CLIENT = 499  # nginx's number: nobody reads it, but /metrics counts it


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server lets its clients do."""

    token: str = ""  # empty: anybody may ask
    max_body_bytes: int = 2_000_000
    max_open: int = 256  # prompts that are answered at a time; more are told to come back
    timeout: float = 300.0  # seconds for one request


class _Gone(Exception):
    """The client has closed the connection."""


def create_app(judge: Judge, model: str, limits: ServerLimits) -> FastAPI:
    """The application around a judge, which clients know by the name `model`."""

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.server.batching.stop(timeout=10.0)

    app = FastAPI(title="rmr1", summary="A reasoning reward model as a judge", lifespan=living)
    server = app.state.server = _Server(judge, model, limits)
    app.add_middleware(Limits, token=limits.token, max_body_bytes=limits.max_body_bytes)
    _answer_errors(app)
    app.middleware("http")(server.counted)
    app.get("/healthz")(server.healthz)
    app.get("/metrics")(server.show_metrics)
    app.get("/v1/models")(server.models)
    app.post("/v1/judge", response_model=JudgeReply)(server.judge_pair)
    app.post("/v1/rank")(server.rank_answers)
    app.post("/v1/chat/completions")(server.chat_completions)
    return app


class _Server:
    """The routes, and what they share."""

    def __init__(self, judge: Judge, model: str, limits: ServerLimits) -> None:
        self.judge, self.model, self.limits = judge, model, limits
        self.batching = Batching(judge.generator, most=limits.max_open)
        self.served = ServedJudge(judge, self.batching)
        self.metrics = Metrics(lambda: self.batching.open)
        self._numbers = itertools.count(1)

    async def healthz(self) -> dict[str, str]:
        """Whether the server can answer."""
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        """Counters in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        one = {"id": self.model, "object": "model", "created": 0, "owned_by": "rmr1"}
        return {"object": "list", "data": [one]}

    async def judge_pair(self, body: JudgeRequest, request: Request) -> dict[str, Any]:
        """Compare two answers."""
        pair = pair_of(body.conversation(), body.answer_a, body.answer_b)
        work = self.served.compare([pair], votes=body.votes, swap=body.swap)
        found = (await self._while_wanted(request, work))[0]
        told = to_json(found, pair)
        self.metrics.tokens(told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"])
        self.metrics.verdict(found.verdict)
        return told | {"model": self.model, "prompt_hash": self.judge.prompt.hash}

    async def rank_answers(self, body: RankRequest, request: Request) -> dict[str, Any]:
        """Order several answers, the best first."""
        asked, seed = body.conversation(), self.judge.sampled.seed
        loop = asyncio.get_running_loop()

        def compare(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
            shown = [pair_of(asked, body.answers[i], body.answers[j]) for i, j in pairs]
            work = self.served.compare(shown, votes=body.votes, swap=body.swap)
            asking = asyncio.run_coroutine_threadsafe(self._while_wanted(request, work), loop)
            return [one.verdict for one in asking.result()]

        # A tournament is plain code that waits for its rounds: it has a thread to wait on.
        found = await asyncio.to_thread(ranked, body.method, len(body.answers), compare, seed=seed)
        told = found.to_json(body.answers)
        return told | {"model": self.model, "prompt_hash": self.judge.prompt.hash}

    async def chat_completions(self, body: chat.ChatRequest, request: Request) -> Response:
        """Continue a chat with the judge's model, as OpenAI's API does."""
        if body.model != self.model:
            told = f"no model {body.model!r} here; this server has {self.model!r}"
            return JSONResponse(error_body(told, "invalid_request_error", "model"), 404)
        prompt = encode(self.judge.tokenizer, body.chat())
        longest = self.judge.greedy.max_new_tokens
        sampling = body.sampling(longest, seed=next(self._numbers))
        if body.stream:
            with_usage = bool((body.stream_options or {}).get("include_usage"))
            pieces = self.batching.pieces(prompt, sampling)
            lines = chat.events(self.model, pieces, len(prompt), with_usage=with_usage)
            # The first piece shows whether the request is in order, while a status can be sent.
            first = await self._while_wanted(request, anext(lines))
            return StreamingResponse(_after(first, lines), media_type="text/event-stream")
        rollouts = await self._while_wanted(request, self.batching.samples(prompt, sampling))
        answer = chat.completion(self.model, rollouts, len(prompt))
        self.metrics.tokens(len(prompt), answer["usage"]["completion_tokens"])
        return JSONResponse(answer)

    async def _while_wanted(
        self, request: Request, work: Awaitable[Result] | Coroutine[Any, Any, Result]
    ) -> Result:
        """Do the work while the client waits for it, and not longer than is allowed."""
        task = asyncio.ensure_future(work)
        end = time.monotonic() + self.limits.timeout
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=min(0.5, max(0.0, end - time.monotonic())))
                if task.done():
                    break
                if await request.is_disconnected():
                    raise _Gone
                if time.monotonic() >= end:
                    raise TimeoutError
            return await task
        finally:
            task.cancel()

    async def counted(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Count a request by its route: a path of a client's own making is no label."""
        began = time.monotonic()
        response = await call_next(request)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        self.metrics.request(path, response.status_code, time.monotonic() - began)
        return response


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for line in rest:
        yield line


def _answer_errors(app: FastAPI) -> None:
    """Every error as OpenAI's clients read it."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            told = "the body must come with Content-Type: application/json (curl: --json)"
            return JSONResponse(error_body(told, "invalid_request_error"), 400)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        told = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(error_body(told, "invalid_request_error", where or None), 400)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Busy)
    async def busy(_: Request, __: Busy) -> JSONResponse:
        body = error_body("the server is busy; try again in a second", "overloaded_error")
        return JSONResponse(body, 503, headers={"Retry-After": _RETRY_SECONDS})

    @app.exception_handler(TimeoutError)
    async def late(_: Request, __: TimeoutError) -> JSONResponse:
        told = "the answer took longer than this server allows; ask for fewer tokens or votes"
        return JSONResponse(error_body(told, "timeout_error"), 504)

    @app.exception_handler(_Gone)
    async def gone(_: Request, __: _Gone) -> Response:
        return Response(status_code=_CLOSED_BY_CLIENT)

    @app.exception_handler(RuntimeError)
    async def failed(_: Request, error: RuntimeError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error"), 500)
