"""Who may have how many samples in the batch: places, and a request's share of them.

A request comes in with places for its first prompt, or is told to come back. What else it has to
ask, as a ranking has, follows as places come free. A request may hold its share and no more: what
each would have if there were one request more than there is. So one that asks a lot leaves room
for the next one to come in, and the more there are, the less each holds. Only the event loop
touches any of this.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rmr1.serving.errors import Busy


class Places:
    """`most` samples at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0
        self.shares: set[Share] = set()
        self.waiting: list[_Waiting] = []  # the longest first

    def enter(self, samples: int) -> Share:
        """A request comes in, whose prompts are drawn `samples` times each.

        Raises:
            Busy: there are no places for its first prompt.
            ValueError: there never are.
        """
        if samples > self.most:
            raise ValueError(
                f"this asks for {samples} samples of one prompt, and this server draws at most"
                f" {self.most} at a time; ask for fewer votes, or a smaller n"
            )
        # Whoever waits comes before whoever is new.
        if self.taken + samples > self.most or any(one.entitled for one in self.waiting):
            raise Busy
        return Share(self, samples)

    @property
    def fair(self) -> int:
        """What a request may hold."""
        return self.most // (len(self.shares) + 1)

    def hand_out(self) -> None:
        """Give free places to those who wait."""
        for one in list(self.waiting):
            if one.entitled:
                if self.taken + one.share.samples > self.most:
                    return  # nobody who has waited for less time may overtake it
                self.waiting.remove(one)
                one.share.take()
                one.granted.set_result(None)


class Share:
    """The places of one request; a context that gives all of them back."""

    def __init__(self, places: Places, samples: int) -> None:
        self.samples, self.held = samples, 0
        self._places = places
        self._unused = True  # those that it came in with
        self.take()
        places.shares.add(self)

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.shares.discard(self)
        self._places.taken -= self.held
        self.held = 0
        self._places.hand_out()

    async def prompt(self) -> None:
        """Wait for the places of one more prompt."""
        if self._unused:
            self._unused = False
            return
        one = _Waiting(self, asyncio.get_running_loop().create_future())
        self._places.waiting.append(one)
        try:
            self._places.hand_out()
            await one.granted
        finally:
            if one in self._places.waiting:
                self._places.waiting.remove(one)
                self._places.hand_out()  # somebody may have stood behind it

    def give_back(self) -> None:
        """The places of one prompt."""
        if self.held:  # else all were given back together
            self.held -= self.samples
            self._places.taken -= self.samples
            self._places.hand_out()

    def take(self) -> None:
        """The places of one prompt, which are free."""
        self.held += self.samples
        self._places.taken += self.samples

    @property
    def full(self) -> bool:
        """Whether it holds what it may; one prompt is always allowed."""
        return self.held > 0 and self.held + self.samples > self._places.fair


@dataclass(eq=False, slots=True)
class _Waiting:
    share: Share
    granted: asyncio.Future[None]

    @property
    def entitled(self) -> bool:
        return not self.share.full
