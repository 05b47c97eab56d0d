"""Bodies of the judge's own routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from rmr1.data import Message, Role
from rmr1.serving.bodies import MOST_TURNS, Body
from rmr1.serving.errors import TEXT, TURNS

Text = Annotated[str, Field(min_length=1)]


class Turn(Body):
    """A turn of a conversation."""

    role: Role
    content: str


def _kind(prompt: Any) -> str:
    return TURNS if isinstance(prompt, list) else TEXT


Turns = Annotated[list[Turn], Field(min_length=1, max_length=MOST_TURNS, fail_fast=True)]
# By its kind, so that what is told to be wrong is wrong with that kind.
Prompt = Annotated[Annotated[Text, Tag(TEXT)] | Annotated[Turns, Tag(TURNS)], Discriminator(_kind)]


class Asked(Body):
    """What every judgment needs."""

    prompt: Prompt = Field(
        description="what the answers reply to: a text, or messages that end with a user turn"
    )
    votes: int = Field(1, ge=1, le=64, description="judgments whose majority wins")
    swap: bool = Field(False, description="judge as many again with the answers exchanged")

    def conversation(self) -> str | list[Message]:
        """The prompt as `rmr1.judge.pair_of` takes it."""
        if isinstance(self.prompt, str):
            return self.prompt
        return [{"role": turn.role, "content": turn.content} for turn in self.prompt]


class JudgeRequest(Asked):
    """Two answers to compare."""

    answer_a: Text
    answer_b: Text


class RankRequest(Asked):
    """Answers to order from the best to the worst."""

    answers: list[Text] = Field(min_length=2, max_length=32, fail_fast=True)
    method: Literal["round_robin", "knockout"] = Field(
        "round_robin", description="each against each, or a knockout that finds the best only"
    )


class JudgeReply(BaseModel):
    """The verdict and what led to it; see `rmr1.judgment_view.to_json`."""

    verdict: Literal["A", "B", "tie"] | None
    votes: dict[str, int]
    task_type: Literal["chat", "reasoning"] | None
    rubric: list[dict[str, Any]]
    justification: str
    solution: str
    quotes: list[dict[str, Any]]
    text: str
    judgments: list[dict[str, Any]]
    usage: dict[str, int]
    model: str
    prompt_hash: str
