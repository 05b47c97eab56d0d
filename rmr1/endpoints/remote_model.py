"""A judge behind an endpoint."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from rmr1.answers import CutShort, Progress, Reply
from rmr1.data import Message
from rmr1.endpoints.endpoint import (
    Endpoint,
    EndpointConfig,
    NotSent,
    Past,
    Refused,
    RequestFailed,
)
from rmr1.engine.sampling import SamplingParams
from rmr1.stop_request import StopRequest


@dataclass(slots=True)
class RemoteModel:
    """A model behind an endpoint as a judge (see `answers.Answers`).

    A prompt that the server refuses, as it is too long for one, is skipped. `CutShort` when a
    request fails for any other reason (an endpoint that is down says nothing about a judge), and on
    Ctrl-C. Requests under way are waited for, as they are paid for. `cost` is what all answers and
    failed attempts have cost so far, in dollars.
    """

    config: EndpointConfig
    cost: float = 0.0
    _past: Past = field(default_factory=Past, init=False)

    def answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """See `Answers`."""
        stop = StopRequest("Stopping when the answers that are asked for have come")
        # Only the main thread may handle signals; on another one somebody else does.
        main = threading.current_thread() is threading.main_thread()
        with stop if main else nullcontext():
            batch = _Batch([None] * (len(chats) * sampling.n))
            asyncio.run(self._ask_all(chats, sampling, progress, stop, batch))
        return self._whole(batch, sampling.n, interrupted=stop.requested)

    async def _ask_all(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        progress: Progress | None,
        stop: StopRequest,
        batch: _Batch,
    ) -> None:
        replies, done = batch.replies, 0

        async def one(row: int) -> None:
            nonlocal done
            try:
                answer = await endpoint.chat(chats[row // sampling.n], sampling)
                replies[row] = answer.reply
                self.cost += answer.cost
            except NotSent:
                return
            except Refused as error:
                replies[row] = Reply(skipped=f"refused: {error}")
                self.cost += error.cost
            except RequestFailed as error:
                batch.last = str(error)
                self.cost += error.cost
                return
            except ValueError as error:  # no request can succeed
                batch.hopeless = batch.hopeless or str(error)
                return
            done += 1
            if progress is not None:
                progress(done, len(replies))

        def ending() -> bool:
            return bool(batch.hopeless) or stop.requested

        if progress is not None:
            progress(0, len(replies))
        async with Endpoint(self.config, ending=ending, past=self._past) as endpoint:
            await asyncio.gather(*(one(row) for row in range(len(replies))))

    def _whole(self, batch: _Batch, samples: int, *, interrupted: bool) -> list[list[Reply]]:
        """The replies by chat; CutShort where some are missing, or no more are wanted."""
        where, replies, why = self.config.base_url, batch.replies, batch.hopeless
        refused = [reply.skipped for reply in replies if reply and reply.skipped]
        if refused and (why or not self._past.answered):
            # It may be how all are asked. Kept, these would never be asked again.
            replies = [None if reply and reply.skipped else reply for reply in replies]
            why = why or (
                f"{where} refused all {len(refused)} prompts, the last with"
                f" {refused[-1].removeprefix('refused: ')}; see the endpoint's settings"
            )
        whole = [
            [reply for reply in replies[row : row + samples] if reply is not None]
            for row in range(0, len(replies), samples)
        ]
        if not interrupted and all(len(own) == samples for own in whole):
            return whole
        passing = not why and not interrupted
        if passing:
            why = f"{where}: requests failed, the last with {batch.last}"
        kept = [own if len(own) == samples else None for own in whole]
        raise CutShort(
            why or "interrupted", kept, interrupted=interrupted and not why, passing=passing
        )


@dataclass(slots=True)
class _Batch:
    """What came of some requests.

    `last` says why the last one failed; `hopeless` why no other can succeed, else it is empty.
    """

    replies: list[Reply | None]
    last: str = ""
    hopeless: str = ""
