"""What bodies have in common: bounds, so that one that is wrong all over is refused at once.

Bodies are checked on the event loop, and by default pydantic gathers every error of them: a body of
two megabytes can have a million. So lists have a longest length and end at their first error, and
objects have a greatest number of fields that is looked at before any of these is.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

MOST_TURNS = 1024  # of a conversation, and parts of a turn
_MOST_FIELDS = 64  # of an object


def few_fields(value: Any) -> Any:
    """The value; ValueError for an object of very many fields."""
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise ValueError(f"{len(value):,} fields are too many; at most {_MOST_FIELDS} are read")
    return value


class Body(BaseModel):
    """An object, in which an unknown field is an error: a misspelt option would go unnoticed."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return few_fields(value)
