"""A response that is sent piece by piece, and says so where it has to end early."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rmr1.serving.chat import event
from rmr1.serving.errors import Gone, ServingError, body_of
from rmr1.serving.patience import Patience

_log = logging.getLogger(__name__)

_LAST_WORD_SECONDS = 5.0  # for a client that does not read what it is sent


class EventStream(Response):
    """Server-sent events: `first`, then `rest`, as long as the request's patience lasts.

    `held` is what the request holds, and is given back at the end. A status has been sent by now,
    so what goes wrong becomes an event with an `error`, which OpenAI's clients raise.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        patience: Patience,
        held: contextlib.AsyncExitStack,
    ) -> None:
        self._first, self._rest, self._patience, self._held = first, rest, patience, held
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI's specification."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        last = b""
        async with self._held:
            try:
                # Sending too: a client that reads no more must not keep its places.
                await self._patience.wait_for(self._pieces(send))
            except Gone:
                return
            except Exception as error:
                if not isinstance(error, ServingError | ValueError):
                    _log.exception("a stream failed")
                last = event(body_of(error))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pieces(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for line in self._rest:
            await send({"type": "http.response.body", "body": line, "more_body": True})
