"""The HTTP server from its start to its end: whoever waits when it ends is told so."""

from __future__ import annotations

import asyncio
import math
import socket

import uvicorn
from fastapi import FastAPI

from rmr1.serving.patience import OpenRequests

# Between the moment when open requests are given up and that when uvicorn cuts connections.
_MARGIN = 10


class HttpServer(uvicorn.Server):
    """uvicorn with the application of app.py.

    Told to stop, it takes no new connections. What is open has `shutdown_seconds` to finish, then
    it is answered with 503, and streams end with an error. A second Ctrl-C does that at once.
    """

    def __init__(
        self, app: FastAPI, host: str, port: int, shutdown_seconds: float, log_level: str = "info"
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level=log_level,
                timeout_graceful_shutdown=math.ceil(shutdown_seconds) + _MARGIN,
            )
        )
        self._open: OpenRequests = app.state.open
        self._seconds = shutdown_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        asyncio.get_running_loop().call_later(self._seconds, self._open.close)
        await super().shutdown(sockets)
        if self.force_exit:
            self._open.close()
            await asyncio.sleep(0.5)  # for what they are told to be sent
            await self.lifespan.shutdown()  # left out by uvicorn; it ends the threads
