"""A judge whose comparisons share the batch of a running generator."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from rmr1.answers import Reply
from rmr1.data import Message, Pair
from rmr1.engine.generator import SamplingParams
from rmr1.judge import Judge, Judgment, judgments_of, placed, placements_of, vote
from rmr1.prompts import encode
from rmr1.serving.batching import Batching


class ServedJudge:
    """`Judge.compare`, for an event loop."""

    def __init__(self, judge: Judge, batching: Batching) -> None:
        self.judge, self.batching = judge, batching

    async def compare(self, pairs: Sequence[Pair], *, votes: int, swap: bool) -> list[Judgment]:
        """The vote on each pair; all of them in one batch.

        Raises:
            ValueError: a prompt is too long.
            Busy: too many requests are open.
        """
        judge = self.judge
        sampling = judge.sampling(votes)
        places = placed(pairs, placements_of(swap=swap))
        tasks = [
            asyncio.ensure_future(self._reply(judge.prompt.render(pair), sampling, number))
            for number, (pair, _) in enumerate(places)
        ]
        try:
            replies = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        judgments = judgments_of(places, replies)
        each = len(judgments) // len(pairs)
        return [vote(judgments[at : at + each]) for at in range(0, len(judgments), each)]

    async def _reply(
        self, chat: list[Message], sampling: SamplingParams, number: int
    ) -> list[Reply]:
        prompt = encode(self.judge.tokenizer, chat)
        # As in one call of the generator: prompt number `number` draws what it would draw there.
        drawn = await self.batching.samples(prompt, replace(sampling, first_prompt=number))
        return [
            Reply(one.text, len(prompt), len(one.token_ids), one.finish_reason) for one in drawn
        ]
