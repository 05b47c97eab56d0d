"""The judge over HTTP: /v1/judge, /v1/rank, OpenAI's chat completions, /healthz and /metrics.

Answers are computed together: whatever is asked at the same time shares the generator's batch. A
request is let in (places.py), its prompts are made into tokens (tokenising.py), and whatever it
waits for, it waits for as long as its patience lasts (patience.py). An error is a JSON object as
OpenAI's clients read it. /docs shows the API.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

from rmr1.data import Pair
from rmr1.judge import Judge, pair_of
from rmr1.judgment_view import to_json
from rmr1.serving import chat
from rmr1.serving.batching import Batching
from rmr1.serving.errors import NoSuchModel, answer_errors
from rmr1.serving.event_stream import EventStream
from rmr1.serving.judging import ServedJudge, room_for_prompts
from rmr1.serving.limits import Limits
from rmr1.serving.metrics import Counted, Metrics
from rmr1.serving.patience import OpenRequests
from rmr1.serving.places import Places
from rmr1.serving.schemas import JudgeReply, JudgeRequest, RankRequest
from rmr1.serving.tokenising import Tokenising


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server lets its clients do."""

    token: str = ""  # empty: anybody may ask
    max_body_bytes: int = 2_000_000
    max_open: int = 256  # samples at a time; requests beyond are told to come back
    timeout: float = 300.0  # seconds for one request


def create_app(judge: Judge, model: str, limits: ServerLimits) -> FastAPI:
    """The application around a judge, which clients know by the name `model`.

    ValueError for a judge that has no room for any comparison.
    """

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.tokenising.stop()
        server.batching.stop(timeout=10.0)

    # So that /docs can send the token. Whether it is right is decided in limits.py.
    asked = [Depends(HTTPBearer(auto_error=False))] if limits.token else []
    app = FastAPI(
        title="rmr1",
        summary="A reasoning reward model as a judge",
        lifespan=living,
        dependencies=asked,
    )
    server = _Server(judge, model, limits)
    app.state.open = server.open
    app.add_middleware(
        Limits, token=limits.token, max_body_bytes=limits.max_body_bytes, requests=server.open
    )
    app.add_middleware(Counted, metrics=server.metrics)
    answer_errors(app)
    app.get("/healthz")(server.healthz)
    app.get("/metrics")(server.show_metrics)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.one_model)
    app.post("/v1/judge", response_model=JudgeReply)(server.judge_pair)
    app.post("/v1/rank")(server.rank_answers)
    app.post("/v1/chat/completions")(server.chat_completions)
    return app


class _Server:
    """The routes, and what they share."""

    def __init__(self, judge: Judge, model: str, limits: ServerLimits) -> None:
        self.judge, self.model = judge, model
        self.positions = judge.generator.model.config.max_position_embeddings
        room = room_for_prompts(judge)  # first of all: it may be none
        self.open = OpenRequests(limits.timeout)
        self.places = Places(limits.max_open)
        self.metrics = Metrics(lambda: len(self.places.shares), lambda: self.places.taken)
        self.batching = Batching(judge.generator, self.metrics.tokens)
        self.tokenising = Tokenising(judge.tokenizer)
        self.served = ServedJudge(judge, self.batching, self.tokenising, self.metrics.verdict, room)
        self._numbers = itertools.count(1)

    async def healthz(self) -> JSONResponse:
        """Whether the server can answer: 503 if its generator has ended or only fails."""
        if self.batching.healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failing"}, 503)

    async def show_metrics(self) -> Response:
        """Counters in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [await self.one_model(self.model)]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The model of that name."""
        self._check_name(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "rmr1"}

    async def judge_pair(self, body: JudgeRequest, request: Request) -> dict[str, Any]:
        """Compare two answers."""
        pair = pair_of(body.conversation(), body.answer_a, body.answer_b)
        async with self.open.begin(request) as patience:
            with self.places.enter(body.votes) as share:
                work = self.served.compare(share, [pair], votes=body.votes, swap=body.swap)
                found = (await patience.wait_for(work))[0]
        told = to_json(found, pair)
        return told | {"model": self.model, "prompt_hash": self.judge.prompt.hash}

    async def rank_answers(self, body: RankRequest, request: Request) -> dict[str, Any]:
        """Order several answers, the best first."""
        # The conversation and each answer are looked at once, not in each of the pairs.
        first, *others = body.answers
        checked = pair_of(body.conversation(), first, first)
        for answer in others:
            pair_of("?", answer, answer)

        def shown(i: int, j: int) -> Pair:
            return replace(checked, answer_a=body.answers[i], answer_b=body.answers[j])

        async with self.open.begin(request) as patience:
            with self.places.enter(body.votes) as share:
                work = self.served.rank(
                    share, body.method, shown, len(body.answers), votes=body.votes, swap=body.swap
                )
                found = await patience.wait_for(work)
        told = found.to_json(body.answers)
        return told | {"model": self.model, "prompt_hash": self.judge.prompt.hash}

    async def chat_completions(self, body: chat.ChatRequest, request: Request) -> Response:
        """Continue a chat with the judge's model, as OpenAI's API does."""
        self._check_name(body.model)
        async with AsyncExitStack() as held:
            held.enter_context(self.places.enter(body.n))
            patience = await held.enter_async_context(self.open.begin(request))
            # One position at least is left for the answer; by default all of them, up to the cap.
            work = self.tokenising.tokens(body.chat, self.positions - 1)
            prompt = await patience.wait_for(work)
            longest = min(self.judge.greedy.max_new_tokens, self.positions - len(prompt))
            sampling = body.sampling(longest, seed=next(self._numbers))
            if not body.stream:
                rollouts = await patience.wait_for(self.batching.samples(prompt, sampling))
                return JSONResponse(chat.completion(self.model, rollouts, len(prompt)))
            pieces = self.batching.pieces(prompt, sampling)
            with_usage = bool(body.stream_options.include_usage)
            lines = chat.events(self.model, pieces, len(prompt), with_usage=with_usage)
            held.push_async_callback(lines.aclose)
            # The first piece shows whether the request is in order, while a status can be sent.
            first = await patience.wait_for(anext(lines))
            return EventStream(first, lines, patience, held.pop_all())

    def _check_name(self, name: str) -> None:
        if name != self.model:
            raise NoSuchModel(f"no model {name!r} here; this server has {self.model!r}")
