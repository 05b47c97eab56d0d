"""A judge whose comparisons share the batch of a running generator."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rmr1.answers import Reply
from rmr1.best_of_n import Method, Ranking, go_on
from rmr1.data import Pair
from rmr1.engine.generator import SamplingParams
from rmr1.judge import Answer, Judge, Judgment, judgments_of, pair_of, placed, placements_of, vote
from rmr1.prompts import encode
from rmr1.serving.batching import Batching
from rmr1.serving.places import Share
from rmr1.serving.tokenising import Tokenising


class ServedJudge:
    """`Judge.compare` and `rank`, for an event loop; `count` is told of each verdict.

    A prompt may have `room` tokens.
    """

    def __init__(
        self,
        judge: Judge,
        batching: Batching,
        tokenising: Tokenising,
        count: Callable[[Answer | None], None],
        room: int,
    ) -> None:
        self.judge, self.batching, self.tokenising = judge, batching, tokenising
        self.room, self._count = room, count

    async def compare(
        self, share: Share, pairs: Sequence[Pair], *, votes: int, swap: bool
    ) -> list[Judgment]:
        """The vote on each pair; they join the batch as the request's share of places allows.

        Raises:
            TooLong: a prompt is.
            ValueError: as `Prompt.render`.
        """
        sampling = self.judge.sampling(votes)
        places = placed(pairs, placements_of(swap=swap))
        replies = await self._replies(share, [pair for pair, _ in places], sampling)
        each = len(places) // len(pairs)
        found = []
        for at in range(0, len(places), each):
            one = vote(judgments_of(places[at : at + each], replies[at : at + each]))
            self._count(one.verdict)
            found.append(one)
            await asyncio.sleep(0)  # there may be thousands to read: others have their turn
        return found

    async def rank(
        self,
        share: Share,
        method: Method,
        shown: Callable[[int, int], Pair],
        candidates: int,
        *,
        votes: int,
        swap: bool,
    ) -> Ranking:
        """The tournament `method`; `shown(i, j)` is the pair of two candidates.

        Raises:
            TooLong: a prompt is.
            ValueError: as `Prompt.render`.
        """
        known: dict[tuple[int, int], Answer | None] = {}
        while True:
            asked = go_on(method, candidates, known, seed=self.judge.sampled.seed)
            if isinstance(asked, Ranking):
                return asked
            pairs = [shown(i, j) for i, j in asked]
            found = await self.compare(share, pairs, votes=votes, swap=swap)
            known |= zip(asked, [one.verdict for one in found], strict=True)

    async def _replies(
        self, share: Share, shown: Sequence[Pair], sampling: SamplingParams
    ) -> list[list[Reply]]:
        """What the model says of each pair, as it is shown."""
        # The longest first: if one is too long, nothing has been computed for the others.
        longest = max(range(len(shown)), key=lambda at: _characters(shown[at]))
        order = [longest, *(at for at in range(len(shown)) if at != longest)]
        found: dict[int, asyncio.Task[list[Reply]]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for number in order:
                    render = partial(self.judge.prompt.render, shown[number])
                    prompt = await self.tokenising.tokens(render, self.room)
                    await share.prompt()
                    # Number `number` draws what it would draw in one call of the generator.
                    drawn = replace(sampling, first_prompt=number)
                    found[number] = group.create_task(self._reply(share, prompt, drawn))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others are of those it cancelled
        return [found[number].result() for number in range(len(shown))]

    async def _reply(
        self, share: Share, prompt: list[int], sampling: SamplingParams
    ) -> list[Reply]:
        try:
            drawn = await self.batching.samples(prompt, sampling)
        finally:
            share.give_back()
        return [
            Reply(one.text, len(prompt), len(one.token_ids), one.finish_reason) for one in drawn
        ]


def room_for_prompts(judge: Judge) -> int:
    """The tokens that a prompt may have; ValueError where the shortest comparison has more."""
    left = judge.generator.model.config.max_position_embeddings - judge.greedy.max_new_tokens
    room = min(left, judge.model.max_prompt_tokens or left)
    least = len(encode(judge.tokenizer, judge.prompt.render(pair_of("a", "a", "b"))))
    if least > room:
        raise ValueError(
            f"the prompt {judge.prompt.style} has {least} tokens around the shortest texts, and"
            f" this model's positions have room for {room} beside an answer of"
            f" {judge.greedy.max_new_tokens}; serve with --prompt_style compact, or a smaller"
            " --max_new_tokens"
        )
    return room


def _characters(pair: Pair) -> int:
    return len(pair.answer_a) + len(pair.answer_b)
