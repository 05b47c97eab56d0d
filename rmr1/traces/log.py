"""The log of a `rmr1 trace` run: a line for each answer, and what follows from all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmr1.data import Pair, read_rows
from rmr1.traces.check import Pass

REFUSED = "refused by the server"


@dataclass(slots=True)
class Traced:
    """What there is of the work: traces by the pair's id, and why others have none."""

    traces: dict[str, str] = field(default_factory=dict)
    faults: dict[str, dict[Pass, str]] = field(default_factory=dict)  # id -> what was wrong
    texts: dict[str, str] = field(default_factory=dict)  # id -> the teacher's flawed judgment
    corrected: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    cost: float = 0.0

    def pay(self, row: Mapping[str, Any]) -> None:
        """What a line of the log has cost, whatever it is good for."""
        self.tokens["prompt"] += row["prompt_tokens"]
        self.tokens["new"] += row["new_tokens"]
        self.cost += row["cost"]

    def add(self, row: Mapping[str, Any]) -> None:
        """One line of the log, about one of the pairs."""
        self.pay(row)
        if row["failed"]:  # it came to nothing but its cost, and is asked again
            return
        name, step, fault = row["id"], row["pass"], row["fault"]
        if not fault:
            self.traces[name] = row["text"]
            self.corrected += step == "corrector"
            self.texts.pop(name, None)
            return
        self.faults.setdefault(name, {})[step] = fault
        if step == "teacher":
            self.texts[name] = row["text"]

    def left(self, pair: Pair, *, two_passes: bool) -> Pass | None:
        """Whom to ask about a pair next; None: nobody."""
        if pair.id in self.traces:
            return None
        asked = self.faults.get(pair.id, {})
        if "teacher" not in asked:
            return "teacher"
        if not two_passes or "corrector" in asked or asked["teacher"].startswith(REFUSED):
            return None
        return "corrector"

    def rejected(self) -> dict[str, int]:
        """How many pairs have no trace, by the last reason."""
        last = [
            list(faults.values())[-1].partition(": ")[0]  # what a server said is in the log
            for name, faults in self.faults.items()
            if name not in self.traces
        ]
        return dict(Counter(last).most_common())


def resumed(
    log: Path, contents: Mapping[str, str], settings: Mapping[Pass, Mapping[str, Any]]
) -> Traced:
    """What earlier runs have got. `contents`: of each pair's id, `judgment_log.content_of`.

    Lines about other pairs count by their cost only. ValueError where a line about one of these was
    asked for with other settings, or about another text.
    """
    traced = Traced()
    for number, row in read_rows(log):
        try:
            wanted: dict[str, Any] = dict(settings[row["pass"]])
            known = contents.get(row["id"])
            if known is None:
                traced.pay(row)
                continue
            for name, value in {**wanted, "content": known}.items():
                if row[name] != value:
                    raise ValueError(
                        f"{log}, line {number}: {name} is {row[name]!r}, but this run has"
                        f" {value!r}; give another output, or remove the log to start over"
                    )
            traced.add(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{log}, line {number}: no answer of a trace run ({error})") from None
    return traced
