"""Who answers the judge's prompts: a model here, or one behind an endpoint (endpoints/)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rmr1.data import Message
from rmr1.engine.sampling import SamplingParams
from rmr1.prompts import encode

if TYPE_CHECKING:  # an endpoint needs no torch
    from rmr1.engine.generator import Rollout

Progress = Callable[[int, int], None]  # (answers done, answers in all)

PROMPT_TOO_LONG = "prompt_too_long"


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer to a chat. `skipped` says why nothing was generated, else it is empty."""

    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish_reason: Literal["stop", "length", ""] = ""
    skipped: str = ""


class Answers(Protocol):
    """Something that answers chats."""

    def answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """`sampling.n` answers to each chat, [chat][sample]."""
        ...


class CutShort(ValueError):
    """A judge gave up on the way, with a sentence that says why.

    `replies` are those of each chat that it had answered, all samples; None for another.
    `interrupted`: somebody wanted it so. `passing`: only these failed, others may be answered.
    """

    def __init__(
        self,
        why: str,
        replies: Sequence[list[Reply] | None],
        *,
        interrupted: bool = False,
        passing: bool = False,
    ) -> None:
        super().__init__(why)
        self.replies, self.interrupted, self.passing = replies, interrupted, passing


class Generates(Protocol):
    """What `LocalModel` needs of `rmr1.engine.generator.Generator`."""

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Samples of each prompt, [prompt][sample]."""
        ...


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A generator with its tokenizer.

    A prompt over `max_prompt_tokens` (None: no limit) is never cut: a judgment of half an answer
    would look like any other. Its replies say `skipped`.
    """

    generator: Generates
    tokenizer: Any
    max_prompt_tokens: int | None = None

    def answer(
        self,
        chats: Sequence[list[Message]],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """See `Answers`; `progress` counts skipped ones too."""
        prompts = [encode(self.tokenizer, chat) for chat in chats]
        limit = self.max_prompt_tokens
        fitting = [ids for ids in prompts if limit is None or len(ids) <= limit]
        total = len(prompts) * sampling.n
        done = total - len(fitting) * sampling.n
        if progress is not None:
            progress(done, total)

        def count(finished: int, _new_tokens: int) -> None:
            nonlocal done
            done += finished
            if progress is not None:
                progress(done, total)

        rollouts = self.generator.generate(fitting, sampling, progress=count) if fitting else []
        assert [len(samples) for samples in rollouts] == [sampling.n] * len(fitting)
        made = iter(rollouts)
        replies = []
        for ids in prompts:
            if limit is not None and len(ids) > limit:
                skipped = Reply(prompt_tokens=len(ids), skipped=PROMPT_TOO_LONG)
                replies.append([skipped] * sampling.n)
                continue
            replies.append(
                [
                    Reply(one.text, len(ids), len(one.token_ids), one.finish_reason)
                    for one in next(made)
                ]
            )
        return replies
