"""What a request must be before it is looked at: allowed, not too large, and sent in time.

A server that ends does not wait for the rest of a body.
"""

from __future__ import annotations

import json
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rmr1.serving.errors import Late, ShuttingDown, error_body
from rmr1.serving.patience import OpenRequests

# A load balancer has no token, and neither has a browser that shows the page of the API.
OPEN_PATHS = ("/healthz", "/docs", "/openapi.json")
BODY_SECONDS = 30.0  # in which a body must have come


class Limits:
    """ASGI middleware: bearer token, size of the body, time to send it."""

    def __init__(
        self, app: ASGIApp, *, token: str, max_body_bytes: int, requests: OpenRequests
    ) -> None:
        self.app, self._token, self._most = app, token.encode(), max_body_bytes
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI's specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self._allowed(scope):
            told = "the bearer token is missing or wrong; send Authorization: Bearer <token>"
            await _refuse(send, 401, told, "authentication_error", ("www-authenticate", "Bearer"))
            return
        try:
            async with self._requests.begin_reading(BODY_SECONDS) as patience:
                body = await patience.wait_for(_whole(receive, self._most))
        except Late:
            told = f"the body did not come within {BODY_SECONDS:.0f} s"
            await _refuse(send, 408, told, "invalid_request_error")
            return
        except ShuttingDown as error:
            await _refuse(send, error.status, str(error), error.kind, ("retry-after", "1"))
            return
        if body is None:
            told = f"the body is larger than {self._most:,} bytes; send less"
            await _refuse(send, 413, told, "invalid_request_error")
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()  # what comes now is that the client has gone
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _allowed(self, scope: Scope) -> bool:
        if not self._token or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        # In constant time: how much of a guess is right must not show.
        return secrets.compare_digest(token.strip(), self._token) and kind.lower() == b"bearer"


async def _whole(receive: Receive, most: int) -> bytes | None:
    """The body, or None where it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body"):
            return bytes(body)


async def _refuse(send: Send, status: int, told: str, kind: str, *headers: tuple[str, str]) -> None:
    data = json.dumps(error_body(told, kind)).encode()
    shown = [("content-type", "application/json"), ("content-length", str(len(data))), *headers]
    pairs = [(name.encode(), value.encode()) for name, value in (*shown, ("connection", "close"))]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": data})
