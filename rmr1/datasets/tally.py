"""What came of the rows of a build, by the value of their column `source`.

Some sets have another value in every row, an address say. So the counts stand in the build's SQLite
file, and in memory only those of the last rows. In the end the values with most rows are shown by
themselves and all others together, whatever the order of the rows.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rmr1.data import Label

SHOWN = 50  # values
OTHERS = "(others)"
_AT_ONCE = 4096  # counts in memory

What = Literal["read", "left out", "dropped", "renamed"]


@dataclass
class SourceCounts:
    """The rows of one source. Read = left out + dropped + not drawn + kept."""

    read: int = 0
    left_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    not_drawn: int = 0
    kept: int = 0
    label_a: int = 0
    renamed: int = 0
    expected: int | None = None
    as_expected: bool = True  # each source of the config by itself

    @property
    def all_dropped(self) -> int:
        """Rows that a filter has dropped."""
        return sum(self.dropped.values())

    def add(self, what: What, reason: str, count: int) -> None:
        """Count rows."""
        if what == "dropped":
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        elif what == "read":
            self.read += count
        elif what == "left out":
            self.left_out += count
        else:
            self.renamed += count


class Tally:
    """Counts while sources are read. A table of its own is made in `database`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute(
            "CREATE TABLE tally (origin TEXT, value TEXT, what TEXT, reason TEXT, count INTEGER,"
            " UNIQUE (origin, value, what, reason))"
        )
        self._pending: Counter[tuple[str, str, What, str]] = Counter()
        self._all: Counter[What] = Counter()

    def count(self, origin: str, value: str, what: What, reason: str = "") -> None:
        """Count a row that a source of the config has brought, and the value that it names."""
        self._all[what] += 1
        self._pending[origin, value, what, reason] += 1
        if len(self._pending) >= _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._database.executemany(
            "INSERT INTO tally VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET count = count + excluded.count",
            [(*key, count) for key, count in self._pending.items()],
        )
        self._pending.clear()

    @property
    def kept_share(self) -> float:
        """The share of taken rows that have passed the filters so far."""
        taken = self._all["read"] - self._all["left out"]
        return 1 - self._all["dropped"] / max(1, taken)

    def has(self, origin: str, value: str) -> bool:
        """Whether a source of the config has brought a row with this value."""
        self._flush()
        query = "SELECT 1 FROM tally WHERE origin = ? AND value = ?"
        return self._database.execute(query, (origin, value)).fetchone() is not None

    def taken(self, origin: str, value: str) -> int:
        """Rows with this value that a source of the config has brought into the filters: what its
        `expect` is compared with.
        """
        self._flush()
        query = (
            "SELECT coalesce(sum(CASE what WHEN 'read' THEN count WHEN 'left out' THEN -count END),"
            " 0) FROM tally WHERE origin = ? AND value = ?"
        )
        return int(self._database.execute(query, (origin, value)).fetchone()[0])

    def shown(self, named: Iterable[str]) -> list[str]:
        """The values to show by themselves: those that the config names, and the most frequent."""
        self._flush()
        most = self._database.execute(
            "SELECT value FROM tally WHERE what = 'read' GROUP BY value"
            " ORDER BY sum(count) DESC, value LIMIT ?",
            (SHOWN,),
        )
        wanted = dict.fromkeys(named)
        for (value,) in most:
            if len(wanted) < SHOWN:
                wanted.setdefault(value)
        return list(wanted)

    def others(self, shown: Sequence[str]) -> int:
        """How many values there are besides those."""
        slots = ",".join("?" * len(shown))
        query = f"SELECT count(DISTINCT value) FROM tally WHERE value NOT IN ({slots})"
        return int(self._database.execute(query, shown).fetchone()[0])

    def counts(
        self,
        shown: Sequence[str],
        kept: Mapping[str, Mapping[Label, int]],
        not_drawn: Mapping[str, int],
    ) -> dict[str, SourceCounts]:
        """The counts of every value that is shown, then those of the others.

        `kept` and `not_drawn` are what the store has in the end, by the same values.
        """
        slots = ",".join("?" * len(shown))
        rows = self._database.execute(
            f"SELECT CASE WHEN value IN ({slots}) THEN value ELSE '{OTHERS}' END AS name, what,"
            f" reason, sum(count) FROM tally GROUP BY name, what, reason"
            f" ORDER BY name = '{OTHERS}', min(rowid)",
            shown,
        )
        found: dict[str, SourceCounts] = {}
        for name, what, reason, count in rows:
            found.setdefault(name, SourceCounts()).add(what, reason, count)
        for name, counts in found.items():
            sides = kept.get(name, {"A": 0, "B": 0})
            counts.kept, counts.label_a = sides["A"] + sides["B"], sides["A"]
            counts.not_drawn = not_drawn.get(name, 0)
        return found
