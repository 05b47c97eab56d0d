"""The pairs of a build while it runs: a temporary SQLite file, so that memory does not grow.

Which pairs are drawn from a source, which are distilled, which side the better answer is on and in
what order pairs are written are decided by four keyed hashes of what a pair says, in either order
of its answers. So they depend on the seed and on the set of pairs alone, not on the order in which
sources were read nor on ids, and none of the four says anything about another.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from rmr1.data import Label, Pair
from rmr1.datasets.sources import Candidate
from rmr1.datasets.tally import OTHERS

Part = Literal["rl", "distill"]
SMALL = 32  # pairs of a source: with fewer it is balanced together with other small ones

_TABLES = """
CREATE TABLE pair (
    key INTEGER PRIMARY KEY, id TEXT UNIQUE, content TEXT UNIQUE, origin TEXT, source TEXT,
    traced INTEGER, label TEXT, lot INTEGER, draw INTEGER, pick INTEGER, side INTEGER,
    place INTEGER, distill INTEGER DEFAULT 0, rl INTEGER DEFAULT 0, drawn INTEGER DEFAULT 1
);
CREATE TABLE body (key INTEGER PRIMARY KEY, candidate TEXT);
"""


class PairStore:
    """Candidates that have passed the filters. A context: its file goes when it closes."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=".rmr1-data-", dir=folder)
        self._seed = seed
        # One transaction for all: nobody else reads the file, and it is never wanted again.
        file = Path(self._folder.name) / "pairs.sqlite"
        self.database = sqlite3.connect(file, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-8192"):
            self.database.execute(f"PRAGMA {pragma}")
        self.database.executescript(_TABLES)
        self.database.execute("BEGIN")
        self._count = 0

    def __enter__(self) -> PairStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: object
    ) -> None:
        self.database.close()
        self._folder.cleanup()

    def _hash(self, purpose: str, text: str) -> int:
        key = f"{self._seed}/{purpose}".encode()[:64]
        digest = blake2b(text.encode(), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "big", signed=True)

    def known(self, content: str) -> int | None:
        """The key of the pair with the same conversation and answers, in either order."""
        found = self._one("SELECT key FROM pair WHERE content = ?", content)
        return None if found is None else int(found[0])

    def _one(self, query: str, value: object) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self.database.execute(query, (value,)).fetchone()
        return row

    def candidate(self, key: int) -> Candidate:
        """A candidate that was added."""
        found = self._one("SELECT candidate FROM body WHERE key = ?", key)
        assert found is not None, "a key that add() has given"
        return _decoded(found[0])

    def add(self, candidate: Candidate, content: str, origin: str) -> tuple[int, bool]:
        """Store a candidate of a source; (its key, whether its id was taken and has been changed).

        An id that another pair has already gets a piece of the pair's content behind it.
        """
        name = candidate.id
        taken = self._one("SELECT 1 FROM pair WHERE id = ?", name)
        if taken:
            name = f"{name}#{content}"
        self._count += 1
        self.database.execute(
            "INSERT INTO pair (key, id, content, origin, source, traced, label, lot, draw, pick,"
            " side, place) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._count, name, content, origin, candidate.source,
                int(bool(candidate.trace)), candidate.label,
                self._hash("lot", candidate.source),
                *(self._hash(use, content) for use in ("draw", "pick", "side", "place")),
            ),
        )  # fmt: skip
        text = json.dumps({**asdict(candidate), "id": name}, ensure_ascii=False)
        self.database.execute("INSERT INTO body VALUES (?, ?)", (self._count, text))
        return self._count, bool(taken)

    def sample(self, origin: str, count: int) -> None:
        """Keep `count` pairs of a source, drawn at random."""
        self.database.execute(
            "UPDATE pair SET drawn = 0 WHERE key IN"
            " (SELECT key FROM pair WHERE origin = ? ORDER BY draw LIMIT -1 OFFSET ?)",
            (origin, count),
        )

    def split(self, distill: int, *, distill_in_rl: bool) -> None:
        """Choose both sets: traced pairs and `distill` others to distil from, the rest for RL."""
        self.database.execute("UPDATE pair SET distill = 1 WHERE drawn AND traced")
        self.database.execute(
            "UPDATE pair SET distill = 1 WHERE key IN (SELECT key FROM pair WHERE drawn AND NOT"
            " traced ORDER BY pick LIMIT ?)",
            (distill,),
        )
        self.database.execute(
            "UPDATE pair SET rl = 1 WHERE drawn AND (NOT distill OR ?)", (distill_in_rl,)
        )

    def place(self) -> None:
        """Put the better answer of every other pair of a source on side A, in a random order.

        Each source has as many A as B, or one more, in the distillation set and in the RL set; so
        have the small ones taken together, which could all have their odd one on the same side.
        A traced pair keeps the side that its trace speaks of and is not counted.
        """
        self.database.execute(
            "CREATE TABLE small AS SELECT lot FROM pair WHERE drawn AND NOT traced GROUP BY lot"
            f" HAVING count(*) < {SMALL}"
        )
        rows = self.database.execute(
            "SELECT key, CASE WHEN lot IN (SELECT lot FROM small) THEN 0 ELSE lot END AS heap"
            " FROM pair WHERE drawn AND NOT traced ORDER BY heap, distill DESC, lot, side"
        )
        before, label = None, "A"
        chosen: list[tuple[str, int]] = []
        for key, heap in rows:
            if heap != before:  # which side an odd one takes is random too
                before, label = heap, "AB"[self._hash("odd", str(heap)) % 2]
            chosen.append((label, key))
            label = "B" if label == "A" else "A"
            if len(chosen) == 1024:
                self._label(chosen)
                chosen = []
        self._label(chosen)
        self.database.execute("CREATE INDEX by_place ON pair (place)")

    def _label(self, chosen: list[tuple[str, int]]) -> None:
        self.database.executemany("UPDATE pair SET label = ? WHERE key = ?", chosen)

    def pairs(self, part: Part) -> Iterator[Pair]:
        """The pairs of a set in random order."""
        # By the index: sorting would carry the texts along.
        rows = self.database.execute(
            "SELECT label, candidate FROM pair INDEXED BY by_place JOIN body USING (key)"
            f" WHERE {part} ORDER BY place"
        )
        for label, text in rows:
            yield _decoded(text).pair(label)

    def counts(
        self, part: Part | Literal["drawn"], shown: Sequence[str]
    ) -> dict[str, dict[Label, int]]:
        """Source -> label -> how many pairs of a set (or of all that are left).

        Sources that are not among those `shown` are one, called `tally.OTHERS`.
        """
        found: dict[str, dict[Label, int]] = {}
        rows = self.database.execute(
            f"SELECT {_named(shown)} AS name, label, count(*) FROM pair WHERE {part}"
            " GROUP BY name, label",
            shown,
        )
        for name, label, count in rows:
            found.setdefault(name, {"A": 0, "B": 0})[label] = count
        return found

    def by_origin(self) -> dict[str, int]:
        """Source of the config -> how many pairs are left of it."""
        return dict(
            self.database.execute(
                "SELECT origin, count(*) FROM pair WHERE drawn GROUP BY origin"
            ).fetchall()
        )

    def not_drawn(self, shown: Sequence[str]) -> dict[str, int]:
        """Source -> how many pairs its sample left out."""
        return dict(
            self.database.execute(
                f"SELECT {_named(shown)} AS name, count(*) FROM pair WHERE NOT drawn GROUP BY name",
                shown,
            ).fetchall()
        )


def _named(shown: Sequence[str]) -> str:
    """The source of a pair if it is shown by itself, as SQL."""
    slots = ",".join("?" * len(shown))
    return f"CASE WHEN source IN ({slots}) THEN source ELSE '{OTHERS}' END"


def _decoded(text: str) -> Candidate:
    fields: dict[str, Any] = json.loads(text)
    return Candidate(**{**fields, "conversation": tuple(fields["conversation"])})
