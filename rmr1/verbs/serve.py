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
    that are open. The page /docs shows the API.
    """

    host: str = Field("127.0.0.1", description="where to listen; 0.0.0.0: on every interface")
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free")
    token_variable: str = Field(
        "RMR1_TOKEN", description="environment variable with the bearer token that clients send"
    )
    name: str = Field("", description="what clients call the model; empty: its folder's name")
    max_open: int = Field(256, ge=1, description="prompts answered at a time; more get HTTP 503")
    max_body_bytes: int = Field(2_000_000, ge=1, description="of a request; larger gets HTTP 413")
    timeout: float = Field(300.0, gt=0, description="seconds for a request; longer gets HTTP 504")
    shutdown_seconds: int = Field(60, ge=0, description="for open requests when told to stop")

    def run(self) -> int:
        """Serve until told to stop."""
        try:
            import uvicorn

            from rmr1.serving.app import ServerLimits, create_app
        except ImportError as error:
            raise ValueError(
                f"serve needs packages that are not installed ({error.name}); run"
                " `pip install 'rmr1[serve]'`"
            ) from None
        from rmr1.models import resolve_model

        token = os.environ.get(self.token_variable, "")
        if not token and self.host not in _LOOPBACK:
            logging.getLogger(__name__).warning(
                "anybody who reaches %s can ask; set %s to a secret to demand it as bearer token",
                self.host,
                self.token_variable,
            )
        folder = resolve_model(self.model)
        judge = self.judge()
        limits = ServerLimits(token, self.max_body_bytes, self.max_open, self.timeout)
        config = uvicorn.Config(
            create_app(judge, self.name or folder.name, limits),
            host=self.host,
            port=self.port,
            timeout_graceful_shutdown=self.shutdown_seconds,
        )
        # uvicorn ends in good order and then hands the signal on, which would end us by it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        uvicorn.Server(config).run()
        return 0
