"""Samples as they finish, and control over those that have not: what `Generator.stream` returns."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rmr1.engine.detokenize import TextStream
from rmr1.engine.generation import Rollout
from rmr1.engine.sampling import SamplingParams
from rmr1.engine.sequences import Sequence

if TYPE_CHECKING:
    from rmr1.engine.generator import Generator


@dataclass(frozen=True, slots=True)
class Finished:
    """A sample that is done: `prompt` is the prompt's number in the stream, `sample` of it."""

    prompt: int
    sample: int
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of a sample; the pieces of a sample joined are its `Rollout.text`.

    `rollout` comes with the last one. `anew`: the weights have changed and the sample begins anew,
    so what came before this piece is void.
    """

    prompt: int
    sample: int
    text: str
    rollout: Rollout | None
    anew: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    stream: TextStream
    restarts: int


class RolloutStream:
    """An iterator over samples in the order in which they finish.

    Requests may be added and cancelled at any time. Streams of one generator share its batch; the
    work is done while one of them is iterated. What is left when a stream is closed, or when nobody
    holds it any more, is cancelled. Not for several threads at once.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._samples: list[int] = []  # of each prompt
        self._running: dict[tuple[int, int], Sequence] = {}  # by prompt and sample
        self._done: deque[tuple[Sequence, Rollout]] = deque()
        self._failure: BaseException | None = None
        # Collected by the generator's next step: this may run in the middle of one.
        weakref.finalize(self, _drop, self._running, generator._dropped)

    def __enter__(self) -> RolloutStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def unfinished(self) -> int:
        """Samples that are neither finished nor cancelled."""
        return len(self._running)

    def add(self, prompt: list[int], params: SamplingParams, *, draws_as: int | None = None) -> int:
        """One more prompt; returns its number, from 0.

        It draws what a prompt of that number draws, or of the number `draws_as`: with 0 the same as
        in a call of its own, whatever came before it in this stream.

        Raises:
            ValueError: as `Generator.generate`; nothing else in the batch is touched.
        """
        number = len(self._samples)
        self._take(self._generator._add(self, prompt, params, number, draws_as))
        return number

    def cancel(self, prompt: int, sample: int | None = None) -> None:
        """Give up a sample, or all of a prompt; those that have finished are not affected.

        Raises:
            ValueError: no such prompt or sample.
        """
        if not 0 <= prompt < len(self._samples):
            raise ValueError(f"prompt must be from 0 to {len(self._samples) - 1}, got {prompt}")
        samples = self._samples[prompt]
        if sample is not None and not 0 <= sample < samples:
            raise ValueError(f"sample must be from 0 to {samples - 1}, got {sample}")
        for one in range(samples) if sample is None else [sample]:
            sequence = self._running.pop((prompt, one), None)
            if sequence is not None:
                self._generator._cancel(sequence)

    def close(self) -> None:
        """Cancel what is unfinished."""
        while self._running:
            self._generator._cancel(self._running.popitem()[1])

    def __iter__(self) -> Iterator[Finished]:
        return self

    def __next__(self) -> Finished:
        while not self._done:
            if not self._running:
                self._check_failure()
                raise StopIteration
            self._generator._step()
        sequence, rollout = self._done.popleft()
        return Finished(sequence.request.index, sequence.sample, rollout)

    def pieces(self) -> Iterator[Piece]:
        """The text as it grows, token by token, instead of whole samples.

        Whole characters only, and nothing that a stop string might yet take back. Unlike iteration
        over whole samples this costs some Python for every token.
        """
        texts: dict[Sequence, _Text] = {}
        while self._running or self._done:
            if self._running and not self._done:
                self._generator._step()
            for place, sequence in list(self._running.items()):
                if place not in self._running:  # whoever takes a piece may cancel, or go on
                    if sequence.cancelled:
                        texts.pop(sequence, None)
                    continue
                text, anew = self._text_of(sequence, texts)
                new = text.stream.read(self._generator._drawn(sequence))
                if new or anew:
                    yield Piece(*place, new, None, anew)
            while self._done:
                sequence, rollout = self._done.popleft()
                text, anew = self._text_of(sequence, texts)
                del texts[sequence]
                rest = rollout.text[text.stream.shown :]
                yield Piece(sequence.request.index, sequence.sample, rest, rollout, anew)
        self._check_failure()

    def _text_of(self, sequence: Sequence, texts: dict[Sequence, _Text]) -> tuple[_Text, bool]:
        """The text of a sample so far, and whether it has just begun anew."""
        text = texts.get(sequence)
        if text is not None and text.restarts == sequence.restarts:
            return text, False
        stream = TextStream(self._generator.tokenizer, sequence.request.stops)
        texts[sequence] = _Text(stream, sequence.restarts)
        return texts[sequence], text is not None

    def _take(self, sequences: list[Sequence]) -> None:
        prompt = len(self._samples)
        self._samples.append(len(sequences))
        self._running.update({(prompt, one.sample): one for one in sequences})

    def _finish(self, sequence: Sequence, rollout: Rollout) -> None:
        if self._running.pop((sequence.request.index, sequence.sample), None) is not None:
            self._done.append((sequence, rollout))

    def _abort(self, error: BaseException) -> None:
        self._running.clear()
        self._failure = error

    def _check_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RuntimeError(
                "these samples were dropped: a step of the generator failed, see the cause above"
            ) from failure


def _drop(running: dict[tuple[int, int], Sequence], dropped: deque[Sequence]) -> None:
    dropped.extend(running.values())
