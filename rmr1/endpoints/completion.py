"""Chat completions as servers send them, read with suspicion."""

from __future__ import annotations

from typing import Any, Literal

from rmr1.answers import Reply

# Counts beyond this are nonsense, and would overflow the sums.
_MOST_TOKENS = 10**9


def read_completion(made: Any) -> Reply:
    """The reply in a completion.

    An answer without text (withheld by a filter, or a call of a tool) is an empty one: it was made
    and paid for. ValueError: this is no completion.
    """
    try:
        choice = made.choices[0]
        text = choice.message.content
        finish = choice.finish_reason
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"its content is {type(text).__name__}")
    # Half a surrogate pair is valid JSON, and in no file.
    text = text.encode("utf-8", "replace").decode("utf-8")
    prompt_tokens, new_tokens = usage_of(made) or (0, 0)
    reason: Literal["stop", "length"] = "length" if finish == "length" else "stop"
    return Reply(text, prompt_tokens, new_tokens, reason)


def usage_of(made: Any) -> tuple[int, int] | None:
    """(tokens of the prompt, new tokens) as the server counted them; None where it did not."""
    usage = getattr(made, "usage", None)
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    for count in counts:
        if type(count) is not int or not 0 <= count <= _MOST_TOKENS:
            return None
    return counts  # type: ignore[return-value]
