"""Samples as they finish, and control over those that have not: what `Generator.stream` returns."""

from __future__ import annotations

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
    work is done while one of them is iterated. What is left when a stream is closed is cancelled.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._running: dict[Sequence, None] = {}
        self._prompts: list[list[Sequence]] = []
        self._done: deque[Finished] = deque()
        self._failure: BaseException | None = None

    @property
    def unfinished(self) -> int:
        """Samples that are neither finished nor cancelled."""
        return len(self._running)

    def add(self, prompt: list[int], params: SamplingParams) -> int:
        """One more prompt; returns its number, from 0.

        Raises:
            ValueError: as `Generator.generate`; nothing else in the batch is touched.
        """
        number = len(self._prompts)
        self._take(self._generator._add(self, prompt, params, number))
        return number

    def cancel(self, prompt: int, sample: int | None = None) -> None:
        """Give up a sample, or all of a prompt; those that have finished are not affected.

        Raises:
            ValueError: no such prompt or sample.
        """
        if not 0 <= prompt < len(self._prompts):
            raise ValueError(f"prompt must be from 0 to {len(self._prompts) - 1}, got {prompt}")
        sequences = self._prompts[prompt]
        if sample is not None:
            if not 0 <= sample < len(sequences):
                raise ValueError(f"sample must be from 0 to {len(sequences) - 1}, got {sample}")
            sequences = sequences[sample : sample + 1]
        for sequence in sequences:
            if sequence in self._running:
                del self._running[sequence]
                self._generator._cancel(sequence)

    def close(self) -> None:
        """Cancel what is unfinished."""
        for prompt in range(len(self._prompts)):
            self.cancel(prompt)

    def __iter__(self) -> Iterator[Finished]:
        return self

    def __next__(self) -> Finished:
        while not self._done:
            if not self._running:
                self._check_failure()
                raise StopIteration
            self._generator._step()
        return self._done.popleft()

    def pieces(self) -> Iterator[Piece]:
        """The text as it grows, token by token, instead of whole samples.

        Whole characters only, and nothing that a stop string might yet take back. Unlike iteration
        over whole samples this costs some Python for every token.
        """
        texts: dict[Sequence, _Text] = {}
        while self._running or self._done:
            if self._running and not self._done:
                self._generator._step()
            for sequence in list(self._running):  # whoever takes a piece may add and cancel
                if sequence not in self._running:
                    continue
                text, anew = self._text_of(sequence, texts)
                new = text.stream.read(self._generator._drawn(sequence))
                if new or anew:
                    yield Piece(sequence.request.index, sequence.sample, new, None, anew)
            while self._done:
                done = self._done.popleft()
                sequence = self._prompts[done.prompt][done.sample]
                text, anew = self._text_of(sequence, texts)
                rest = done.rollout.text[text.stream.shown :]
                yield Piece(done.prompt, done.sample, rest, done.rollout, anew)
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
        self._prompts.append(sequences)
        self._running.update(dict.fromkeys(sequences))

    def _finish(self, sequence: Sequence, rollout: Rollout) -> None:
        if sequence in self._running:
            del self._running[sequence]
            self._done.append(Finished(sequence.request.index, sequence.sample, rollout))

    def _abort(self, error: BaseException) -> None:
        self._running.clear()
        self._failure = error

    def _check_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RuntimeError(
                "these samples were dropped: a step of the generator failed, see the cause above"
            ) from failure
