"""What a client can be told, and the JSON that tells it: as OpenAI's clients read errors."""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class ServingError(Exception):
    """Something went wrong that its client is told in these words."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    told: ClassVar[str] = "the server failed; its log says why"

    def __init__(self, told: str = "") -> None:
        super().__init__(told or self.told)


class Busy(ServingError):
    """As much is open as is allowed."""

    status, kind = 503, "overloaded_error"
    told = "the server is busy; try again in a second"


class ShuttingDown(ServingError):
    """The server was told to stop, and what is open took longer than it was given."""

    status, kind = 503, "overloaded_error"
    told = "the server is shutting down; try again when it is back"


class Late(ServingError):
    """A request had all the time that one may have."""

    status, kind = 504, "timeout_error"
    told = "the answer took longer than this server allows; ask for fewer tokens, votes or answers"


class Gone(ServingError):
    """The client has closed the connection. Nobody reads the status, but /metrics counts it."""

    status = 499  # nginx's number


class GeneratorFailed(ServingError):
    """A step of the generator failed, or its thread has ended."""

    told = "the generator failed, and the server's log says why; try again"


class TooLong(ServingError):
    """A prompt that the model has no room for."""

    status, kind, code = 400, "invalid_request_error", "context_length_exceeded"


class NoSuchModel(ServingError):
    """The server has one model, and it has another name."""

    status, kind, code = 404, "invalid_request_error", "model_not_found"


# What the kinds of a prompt are called in pydantic's errors; clients know no such fields.
TEXT, TURNS = "(text)", "(turns)"


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> dict[str, Any]:
    """The same of what was raised; only what is meant for clients is told."""
    if isinstance(error, ServingError):
        return error_body(str(error), error.kind, code=error.code)
    if isinstance(error, ValueError):
        return error_body(str(error), "invalid_request_error")
    return error_body(ServingError.told, ServingError.kind)


def answer_errors(app: FastAPI) -> None:
    """Every error of the application becomes JSON."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            told = "the body must come with Content-Type: application/json (curl: --json)"
            return JSONResponse(error_body(told, "invalid_request_error"), 400)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", TEXT, TURNS))
        told = f"{where}: {first['msg']}" if where else str(first["msg"])
        return JSONResponse(error_body(told, "invalid_request_error", where or None), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(ServingError)
    async def serving(_: Request, error: ServingError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(body_of(error), error.status, headers=headers)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse(body_of(error), 400)

    @app.exception_handler(Exception)  # starlette raises it again, and uvicorn logs it
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(body_of(error), 500)
