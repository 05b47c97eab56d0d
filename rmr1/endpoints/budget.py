"""What may be spent on an endpoint."""

from __future__ import annotations

import asyncio


class OverBudget(Exception):
    """A request could cost more than is left."""


class Budget:
    """What may be spent, in dollars; None: anything. Each request holds its worst case back."""

    def __init__(self, limit: float | None = None, spent: float = 0.0) -> None:
        self.limit, self.spent = limit, spent
        self._held, self._changed = 0.0, asyncio.Condition()

    async def hold(self, worst: float) -> None:
        """Wait until that much is free. OverBudget when it never will be."""
        async with self._changed:
            while self.limit is not None and self.spent + self._held + worst > self.limit:
                if self.spent + worst > self.limit:
                    raise OverBudget
                await self._changed.wait()
            self._held += worst

    async def settle(self, worst: float, cost: float) -> None:
        """What was held back for a request is free again, but for what it cost."""
        async with self._changed:
            self.spent += cost
            # Sums of floats: what is left when nothing is out is not quite nothing.
            self._held = self._held - worst if self._held - worst > 1e-9 else 0.0
            self._changed.notify_all()
