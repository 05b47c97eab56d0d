"""Requests of an event loop, answered by one generator on a thread of its own, in one batch.

The generator is for one thread at a time; the thread here owns it. A request joins the batch as
soon as the step in progress is done, and leaves it when nobody waits for it any more. How many may
come is not decided here but in places.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.rollout_stream import Piece, RolloutStream
from rmr1.serving.errors import GeneratorFailed, ShuttingDown

_log = logging.getLogger(__name__)

_FAILURES = 3  # in a row, after which a generator is not healthy


@dataclass(eq=False, slots=True)
class _Job:
    """A request; `out` brings its pieces, or what went wrong, to the event loop."""

    prompt: list[int]
    params: SamplingParams
    texts: bool  # whether pieces of text are wanted, or whole samples only
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    left: int = 0
    number: int = -1  # of the stream; -1: not there yet, or no longer

    def deliver(self, item: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has gone, and with it who waited
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)


class Batching:
    """A running generator; `count(prompt, completion)` is told of tokens as they are done."""

    def __init__(self, generator: Generator, count: Callable[[int, int], None]) -> None:
        self.generator, self._count = generator, count
        self._inbox: queue.SimpleQueue[tuple[str, _Job | None]] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}  # by number, only the thread touches it
        self._thread = threading.Thread(target=self._run, name="rmr1-generator", daemon=True)
        self._stopping = self._ended = False
        self._failures = 0  # since a sample was last finished
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread is there, and its last steps have not all failed."""
        return not self._ended and self._failures < _FAILURES

    def stop(self, timeout: float) -> None:
        """Let go of what is running and end the thread."""
        self._inbox.put(("stop", None))
        self._thread.join(timeout)

    async def samples(self, prompt: list[int], params: SamplingParams) -> list[Rollout]:
        """All samples of a prompt. Cancelled, it takes them out of the batch.

        Raises:
            GeneratorFailed: a step did, or the thread has ended.
            ValueError: as `Generator.generate`.
        """
        found = {}
        async with contextlib.aclosing(self._items(prompt, params, texts=False)) as items:
            async for piece in items:
                assert piece.rollout is not None
                found[piece.sample] = piece.rollout
        return [found[sample] for sample in range(params.n)]

    def pieces(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Piece]:
        """The text of all samples as it grows; closed early, it takes them out of the batch."""
        return self._items(prompt, params, texts=True)

    async def _items(
        self, prompt: list[int], params: SamplingParams, *, texts: bool
    ) -> AsyncGenerator[Piece]:
        if self._ended:
            raise GeneratorFailed
        job = _Job(prompt, params, texts, asyncio.get_running_loop(), left=params.n)
        left = params.n
        self._inbox.put(("add", job))
        try:
            while left:
                item = await job.out.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                left -= item.rollout is not None
                yield item
        finally:
            if left:
                self._inbox.put(("cancel", job))

    # --- The thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._answer()
        finally:
            # Whatever has ended the thread, nobody may be left waiting.
            self._ended = True
            left = list(self._jobs.values())
            while not self._inbox.empty():
                what, job = self._inbox.get()
                left += [job] if what == "add" and job is not None else []
            for job in left:
                job.deliver(ShuttingDown() if self._stopping else GeneratorFailed())

    def _answer(self) -> None:
        """All that comes, until a step fails or the server stops."""
        stream = self.generator.stream()
        self._jobs.clear()
        try:
            self._take(stream, wait=True)
            for piece in stream.pieces():
                self._hand_on(piece)
                self._take(stream, wait=False)
                if self._stopping:
                    break
        except Exception:  # of one step: whoever comes next finds a new stream
            _log.exception("a step of the generator failed")
            self._failures += 1
            for job in self._jobs.values():
                job.deliver(GeneratorFailed())
        finally:
            stream.close()

    def _hand_on(self, piece: Piece) -> None:
        job = self._jobs.get(piece.prompt)
        if job is None:
            return
        if piece.rollout is not None:
            self._failures = 0
            self._count(0, len(piece.rollout.token_ids))
            job.left -= 1
            if not job.left:
                del self._jobs[piece.prompt]
        if piece.rollout is not None or job.texts:
            job.deliver(piece)

    def _take(self, stream: RolloutStream, *, wait: bool) -> None:
        """What has come in; `wait` for the first thing."""
        while True:
            try:
                what, job = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if job is None:
                self._stopping = True
                return
            if what == "cancel":
                if self._jobs.get(job.number) is job:
                    del self._jobs[job.number]
                    stream.cancel(job.number)
                continue
            try:
                job.number = stream.add(job.prompt, job.params, draws_as=0)
                self._jobs[job.number] = job
                self._count(len(job.prompt), 0)
            except ValueError as error:
                job.deliver(error)
            except Exception:  # of this request; the others go on
                _log.exception("a request could not be taken")
                self._failures += 1
                job.deliver(GeneratorFailed())
