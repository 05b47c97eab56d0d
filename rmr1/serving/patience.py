"""How long a request is worked on: in its time, while its client is there and the server stays up.

Whatever a request waits for, it waits for here, so one deadline holds for all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from rmr1.serving.errors import Gone, Late, ServingError, ShuttingDown

Result = TypeVar("Result")


class OpenRequests:
    """All requests that are worked on; each has `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._open: set[Patience] = set()
        self._closed = False

    def begin(self, request: Request) -> Patience:
        """Work on one more; use it as a context."""
        one = self.begin_reading(self.seconds)
        one.watch(request)
        return one

    def begin_reading(self, seconds: float) -> Patience:
        """Read the body of one more; it is its reader who sees whether the client goes."""
        one = Patience(seconds, self._open)
        if self._closed:
            one.end(ShuttingDown())
        return one

    def close(self) -> None:
        """Give up what is open and whatever comes yet: the server ends."""
        self._closed = True
        for one in list(self._open):
            one.end(ShuttingDown())


class Patience:
    """That of one request, from now on."""

    def __init__(self, seconds: float, among: set[Patience]) -> None:
        loop = asyncio.get_running_loop()
        self._among, self._why = among, ServingError()
        self._over: asyncio.Future[None] = loop.create_future()
        self._clock = loop.call_later(seconds, self.end, Late())
        self._watching: asyncio.Future[None] | None = None
        among.add(self)

    async def __aenter__(self) -> Patience:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._among.discard(self)
        self._clock.cancel()
        if self._watching is not None:
            self._watching.cancel()

    def watch(self, request: Request) -> None:
        """It ends when the client goes, too."""
        self._watching = asyncio.ensure_future(self._until_gone(request))

    def end(self, why: ServingError) -> None:
        """No longer than until now; the first reason counts."""
        if not self._over.done():
            self._why = why
            self._over.set_result(None)

    async def wait_for(self, work: Awaitable[Result] | Coroutine[Any, Any, Result]) -> Result:
        """Do the work. When patience ends it is cancelled, and has come to its end.

        Raises:
            Late: the request's time is over.
            Gone: its client is.
            ShuttingDown: the server soon will be.
        """
        task = asyncio.ensure_future(work)
        try:
            both: set[asyncio.Future[Any]] = {task, self._over}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._why
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                # What it says when cancelled is not what its client is told.
                with contextlib.suppress(asyncio.CancelledError):
                    task.exception()

    async def _until_gone(self, request: Request) -> None:
        # The body has been read: what comes now is that the client has closed the connection.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.end(Gone())
