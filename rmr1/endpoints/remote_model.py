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
    Ctrl-C. No request is begun after that; those under way are waited for, as they are paid for.
    """

    config: EndpointConfig
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
            return asyncio.run(self._answer(chats, sampling, progress, stop))

    async def _answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        progress: Progress | None,
        stop: StopRequest,
    ) -> list[list[Reply]]:
        replies: list[Reply | None] = [None] * (len(chats) * sampling.n)
        done, total, failure = 0, len(replies), ""

        async def one(row: int) -> None:
            nonlocal done, failure
            try:
                replies[row] = (await endpoint.chat(chats[row // sampling.n], sampling)).reply
            except NotSent:
                return
            except Refused as error:
                replies[row] = Reply(skipped=f"refused: {error}")
            except RequestFailed as error:
                failure = failure or (
                    f"{self.config.base_url}: {error}; run the same again to go on"
                )
                return
            except ValueError as error:  # no request can succeed
                failure = failure or str(error)
                return
            done += 1
            if progress is not None:
                progress(done, total)

        def ending() -> bool:
            return bool(failure) or stop.requested

        if progress is not None:
            progress(0, total)
        async with Endpoint(self.config, ending=ending, past=self._past) as endpoint:
            await asyncio.gather(*(one(row) for row in range(total)))
        return self._whole(replies, sampling.n, failure, interrupted=stop.requested)

    def _whole(
        self, replies: list[Reply | None], samples: int, failure: str, *, interrupted: bool
    ) -> list[list[Reply]]:
        """The replies by chat; CutShort where some are missing, or no more are wanted."""
        refused = [reply.skipped for reply in replies if reply and reply.skipped]
        if refused and (failure or not self._past.answered):
            # It may be how all are asked. Kept, these would never be asked again.
            replies = [None if reply and reply.skipped else reply for reply in replies]
            failure = failure or (
                f"{self.config.base_url} refused all {len(refused)} prompts, the last with"
                f" {refused[-1].removeprefix('refused: ')}; see the endpoint's settings"
            )
        whole = [
            [reply for reply in replies[row : row + samples] if reply is not None]
            for row in range(0, len(replies), samples)
        ]
        if not interrupted and all(len(own) == samples for own in whole):
            return whole
        kept = [own if len(own) == samples else None for own in whole]
        raise CutShort(failure or "interrupted", kept, interrupted=interrupted and not failure)
