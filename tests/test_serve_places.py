"""Places, tokens and streams of a server, without one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

from starlette.requests import Request

from rmr1.models import POCKET, load_tokenizer
from rmr1.prompts import encode
from rmr1.serving import event_stream
from rmr1.serving.errors import Busy, TooLong
from rmr1.serving.event_stream import EventStream
from rmr1.serving.patience import OpenRequests
from rmr1.serving.places import Places, Share
from rmr1.serving.tokenising import Tokenising


async def waits(share: Share) -> asyncio.Task[None]:
    """The share asks for one more prompt."""
    task = asyncio.ensure_future(share.prompt())
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def take(share: Share, prompts: int) -> None:
    """So many prompts, none of which has to wait."""
    for _ in range(prompts):
        assert (await waits(share)).done()


def test_one_that_asks_a_lot_leaves_room_for_the_next() -> None:
    async def scene() -> None:
        places = Places(8)
        with places.enter(1) as first:
            await take(first, 4)
            more = await waits(first)
            assert not more.done()
            with places.enter(1) as second:
                await take(second, 2)  # a third of the places: another one may still come
                one_more = await waits(second)
                assert not one_more.done()
                one_more.cancel()
                for _ in range(2):
                    first.give_back()
                    await asyncio.sleep(0)
                    assert not more.done()
                first.give_back()
                await more
                assert first.held == 2  # a third as well
            await take(first, 2)
        assert (places.taken, places.waiting) == (0, [])

    asyncio.run(scene())


def test_samples_are_counted() -> None:
    async def scene() -> None:
        places = Places(8)
        with places.enter(8), pytest.raises(Busy):
            places.enter(1)
        with pytest.raises(ValueError, match="draws at most 8 at a time"):
            places.enter(9)
        with places.enter(7), places.enter(1), pytest.raises(Busy):
            places.enter(1)

    asyncio.run(scene())


def test_who_waits_comes_before_who_is_new() -> None:
    async def scene() -> None:
        places = Places(8)
        with places.enter(5) as first, places.enter(3) as second:
            await take(first, 1)
            await take(second, 1)
            first.give_back()
            held = [places.enter(1) for _ in range(4)]
            large = await waits(first)  # five places, of which one is free
            with pytest.raises(Busy):
                places.enter(1)
            second.give_back()
            assert not large.done()
            small = await waits(second)
            assert not small.done()  # it would fit, and would let the large one wait for ever
            held[0].__exit__()
            await large
            for one in held[1:]:
                one.__exit__()
            await small

    asyncio.run(scene())


def test_one_that_gives_up_holds_up_nobody() -> None:
    async def scene() -> None:
        places = Places(4)
        with places.enter(3) as first, places.enter(1) as second:
            await take(first, 1)
            await take(second, 1)
            first.give_back()
            with places.enter(2):
                large = await waits(first)
                second.give_back()
                small = await waits(second)
                assert not small.done()
                large.cancel()
                await small
                assert places.taken == 3

    asyncio.run(scene())


def test_tokenising_holds_up_nobody() -> None:
    """Half a megabyte takes the better part of a second, in which the event loop goes on."""
    tokenising = Tokenising(load_tokenizer(POCKET))
    text = "so that 128 results differ " * 20_000

    async def scene() -> tuple[float, float]:
        chat = lambda: [{"role": "user", "content": text}]  # noqa: E731
        began = last = time.monotonic()
        work, longest = asyncio.ensure_future(tokenising.tokens(chat, 1_000_000)), 0.0
        while not work.done():
            await asyncio.sleep(0.002)
            longest = max(longest, time.monotonic() - last)
            last = time.monotonic()
        assert len(work.result()) > 100_000
        return longest, last - began

    longest, whole = asyncio.run(scene())
    tokenising.stop()
    assert longest < whole / 2


def test_what_is_plainly_too_long_is_not_read_and_nothing_else_is_refused() -> None:
    tokenizer = load_tokenizer(POCKET)
    tokenising = Tokenising(tokenizer)

    async def tokens(text: str, room: int) -> list[int]:
        return await tokenising.tokens(lambda: [{"role": "user", "content": text}], room)

    began = time.monotonic()
    with pytest.raises(TooLong, match=r"more than [0-9]+ tokens, and there is room for 800"):
        asyncio.run(tokens("some words " * 200_000, 800))
    assert time.monotonic() - began < 1.0
    # The longest token there is, so often that the prompt just fits: 43 characters a token.
    text = "</summary_B>\n</eval>\n<answer>[[A]]</answer>" * 700
    whole = encode(tokenizer, [{"role": "user", "content": text}])
    assert len(whole) < 720
    assert asyncio.run(tokens(text, len(whole))) == whole
    with pytest.raises(TooLong, match=f"has {len(whole)} tokens"):
        asyncio.run(tokens(text, len(whole) - 1))
    tokenising.stop()


def test_a_client_that_does_not_read_loses_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be sent is not waited for longer than the request may take."""
    monkeypatch.setattr(event_stream, "_LAST_WORD_SECONDS", 0.1)

    async def never() -> Any:
        await asyncio.Event().wait()

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: 2"

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never()

    async def scene() -> None:
        places, scope = Places(1), {"type": "http"}
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(places.enter(1))
            patience = OpenRequests(0.2).begin(Request(scope, never))
            await held.enter_async_context(patience)
            stream = EventStream(b"data: 1", pieces(), patience, held.pop_all())
        await asyncio.wait_for(stream(scope, never, send), 5)
        assert places.taken == 0

    asyncio.run(scene())
