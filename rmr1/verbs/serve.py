"""The verb that serves a judge over HTTP: serve."""

from __future__ import annotations

import logging
import os
import signal

from pydantic import Field

from rmr1.verbs.model import ModelVerb

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Serve(ModelVerb):
    """Serve a judge over HTTP: /v1/judge, /v1/rank, OpenAI's /v1/chat/completions, /metrics.

    rmr1 serve --model runs/rlvr/checkpoints/step-000062
    curl localhost:8000/v1/judge --json '{"prompt": "2 + 2?", "answer_a": "4", "answer_b": "5"}'

    Requests that come at the same time are computed together. Ctrl-C or SIGTERM finishes those
    that are open, a second Ctrl-C does not. The page /docs shows the API.
    """

    host: str = Field("127.0.0.1", description="where to listen; 0.0.0.0: on every interface")
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free")
    token_variable: str = Field(
        "RMR1_TOKEN", description="environment variable with the bearer token that clients send"
    )
    name: str = Field("", description="what clients call the model; empty: its folder's name")
    max_open: int = Field(256, ge=1, description="samples drawn at a time; more get HTTP 503")
    max_body_bytes: int = Field(2_000_000, ge=1, description="of a request; larger gets HTTP 413")
    timeout: float = Field(
        300.0,
        gt=0,
        allow_inf_nan=False,
        description="seconds for a request; longer gets HTTP 504",
    )
    shutdown_seconds: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="for open requests when told to stop, then HTTP 503; unset: timeout",
    )

    def run(self) -> int:
        """Serve until told to stop."""
        try:
            from rmr1.serving.app import ServerLimits, create_app
            from rmr1.serving.lifetime import HttpServer
        except ImportError as error:
            raise ValueError(
                f"serve needs packages that are not installed ({error.name}); run"
                " `pip install 'rmr1[serve]'`"
            ) from None
        from rmr1.models import resolve_model

        token = bearer_token(self.token_variable)
        if not token and self.host not in _LOOPBACK:
            logging.getLogger(__name__).warning(
                "anybody who reaches %s can ask; set %s to a secret to demand it as bearer token",
                self.host,
                self.token_variable,
            )
        folder = resolve_model(self.model)
        limits = ServerLimits(token, self.max_body_bytes, self.max_open, self.timeout)
        app = create_app(self.judge(), self.name or folder.name, limits)
        seconds = self.timeout if self.shutdown_seconds is None else self.shutdown_seconds
        # uvicorn ends in good order and then hands the signal on, which would end us by it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        HttpServer(app, self.host, self.port, seconds).run()
        return 0


def bearer_token(variable: str) -> str:
    """The token in an environment variable; empty where it is not set, or set to nothing.

    ValueError for one that no client could send: everybody, or nobody, would be let in.
    """
    given = os.environ.get(variable, "")
    token = given.strip()  # a file that it was read from ends in a line break
    if given and not token:
        raise ValueError(f"{variable} holds white space only; set it to a secret, or unset it")
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(
            f"{variable} holds a character that is no printable ASCII, or a space, and no header"
            " can carry it; set it to letters, digits and signs"
        )
    return token
