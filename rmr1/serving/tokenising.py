"""Prompts as token ids, made beside the event loop.

A body of some megabytes takes a second. The tokenizer lets go of the interpreter's lock meanwhile,
so on a thread of its own it holds up nobody but the prompts behind it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rmr1.data import Message
from rmr1.prompts import encode
from rmr1.serving.errors import TooLong

# A long text is looked at first: so many characters for each token that there is room for, and if
# these are so many times too long, the rest is not read. Where a text is cut its last word falls
# into other tokens than it would, which twice the room is far beyond.
_CHARACTERS = 16
_PLAINLY = 2


class Tokenising:
    """One thread, which takes one prompt after the other."""

    def __init__(self, tokenizer: Any) -> None:
        # Its own: the generator's thread reads with the other, and encoding changes its settings.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rmr1-tokens")

    async def tokens(self, chat: Callable[[], Sequence[Message]], room: int) -> list[int]:
        """The tokens of what `chat` returns, which is called on the thread too.

        Raises:
            TooLong: they are more than `room`.
            ValueError: as `encode`, and as `chat`.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode, chat, room)

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, chat: Callable[[], Sequence[Message]], room: int) -> list[int]:
        messages = chat()
        text = "".join(message["content"] for message in messages)
        if len(text) > _CHARACTERS * room:
            head: Message = {"role": "user", "content": text[: _CHARACTERS * room]}
            count = len(encode(self._tokenizer, [head]))
            if count > _PLAINLY * room:
                raise TooLong(_told(f"more than {count}", room))
        ids = encode(self._tokenizer, messages)
        if len(ids) > room:
            raise TooLong(_told(str(len(ids)), room))
        return ids


def _told(count: str, room: int) -> str:
    return (
        f"the prompt has {count} tokens, and there is room for {room} beside the answer in this"
        " model's positions; shorten it"
    )
