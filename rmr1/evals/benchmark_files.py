"""The files of a benchmark run: one JSONL of judgments, and of several ranks one each beside it.

A process alone appends to `out.jsonl`. Of a job of several ranks (torchrun, Slurm) each judges a
share and appends to `out.rankR.jsonl`; when all shares are there the first rank puts them into
`out.jsonl` and removes the others. Whoever starts reads all of these files, so a run goes on with
any number of ranks. The ranks talk through the folder alone: no network, no torch.distributed. A
small file `out.rankR.alive`, written anew every few seconds, shows the first rank whom to wait for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rmr1.engine.launch import Launch
from rmr1.judgment_log import appending, lock

BEAT = 5.0  # seconds between two signs of life
SILENCE = 300.0  # seconds without one after which a rank counts as gone, or as never started
POLL = 1.0

Located = tuple[Path, int, Any]  # (file, line, row)


@dataclass(frozen=True, slots=True)
class JudgmentFiles:
    """Where judgments are, and where this process (`place` None: alone) puts its own."""

    output: Path
    place: Launch | None = None

    @property
    def own(self) -> Path:
        """The file that this process appends to."""
        return self.output if self.place is None else self._of(self.place.rank, "jsonl")

    def _of(self, rank: int, ending: str) -> Path:
        return self.output.with_name(f"{self.output.stem}.rank{rank}.{ending}")

    def _beside(self, ending: str) -> list[Path]:
        """The files of ranks, of this job or an earlier one."""
        wanted = re.compile(rf"{re.escape(self.output.stem)}\.rank(\d+)\.{ending}")
        if not self.output.parent.is_dir():
            return []
        found = [path for path in self.output.parent.iterdir() if wanted.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.stem.rpartition("rank")[2]))

    def rows(self) -> Iterator[Located]:
        """Every judgment that is there; a line that somebody is still writing is left out."""
        whole = [self.output] if self.output.exists() else []
        for path in whole + self._beside("jsonl"):
            for number, row in _rows_so_far(path):
                yield path, number, row

    def appending(self) -> AbstractContextManager[TextIO]:
        """This process's file, mended, for it alone. ValueError when another run has it open."""
        return appending(self.own)

    def merge(
        self, key: Callable[[Mapping[str, Any]], tuple[str, ...]], order: Sequence[tuple[str, ...]]
    ) -> None:
        """Put the ranks' judgments into the output, in that order, others after them.

        ValueError when one of `order` is in no file, or when another process writes to one.
        """
        shards = self._beside("jsonl")
        there = [self.output] if shards and self.output.exists() else []
        with contextlib.ExitStack() as held:
            for path in [*shards, *there]:
                lock(held.enter_context(path.open("a")), path)
            self._merge(shards, key, order)

    def _merge(
        self,
        shards: Sequence[Path],
        key: Callable[[Mapping[str, Any]], tuple[str, ...]],
        order: Sequence[tuple[str, ...]],
    ) -> None:
        if shards:
            found: dict[tuple[str, ...], Any] = {}
            for _, _, row in self.rows():
                found.setdefault(key(row), row)
            planned = [one for one in order if one in found]
            if lacking := len(order) - len(planned):
                raise ValueError(
                    f"{self.output.parent}: {lacking} of {len(order)} judgments are in no rank's"
                    " file; run the same again to make them"
                )
            partial = self.output.with_name(f".{self.output.name}.partial")
            with partial.open("w", encoding="utf-8") as stream:
                for one in dict.fromkeys([*planned, *found]):
                    stream.write(json.dumps(found[one], ensure_ascii=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, self.output)
        for path in [*shards, *self._beside("alive")]:
            path.unlink(missing_ok=True)

    @contextmanager
    def working(self, plan: str) -> Iterator[None]:
        """Show the first rank that this one works on `plan`, and at the end how that went."""
        if self.place is None or self.place.rank == 0:  # nobody waits for these
            yield
            return
        path, stopped = self._of(self.place.rank, "alive"), threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)

        def say(words: str) -> None:
            with contextlib.suppress(OSError):  # a full disk will be told by the judgments
                path.write_text(words, encoding="utf-8")

        def beat() -> None:
            number = 0
            while not stopped.is_set():
                number += 1
                say(f"working {number}")
                stopped.wait(BEAT)

        thread = threading.Thread(target=beat, name="rmr1-alive", daemon=True)
        thread.start()
        words = f"finished {plan}"
        try:
            yield
        except BaseException as error:
            # A job that fails anew may say the same: the moment tells it from the one before.
            told = " ".join(str(error).split()) or type(error).__name__
            words = f"failed {time.time_ns()}: {told}"
            raise
        finally:
            stopped.set()
            thread.join()
            say(words)

    def said_before(self) -> dict[int, str]:
        """What the signs of the other ranks say when a job begins: those of an earlier one."""
        size = self.place.size if self.place else 0
        return {rank: self._said(rank) for rank in range(1, size)}

    def wait_for_all(self, plan: str, before: Mapping[int, str]) -> None:
        """Until every other rank has finished its share of `plan`.

        A failure is one of this job where it differs from what was there `before`.

        Raises:
            ValueError: one failed, or showed no sign of life for `SILENCE` seconds.
        """
        if self.place is None:
            return
        began = time.monotonic()
        waiting = {rank: (self._said(rank), began) for rank in range(1, self.place.size)}
        told = False
        while True:
            for rank, (said, since) in list(waiting.items()):
                now = self._said(rank)
                if now == f"finished {plan}":
                    del waiting[rank]
                elif now.startswith("failed") and now != before.get(rank):
                    raise ValueError(f"rank {rank} {_shown(now)}; run the same again to go on")
                elif now != said:
                    waiting[rank] = now, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    last = f"; the last it said there is: {_shown(now)}" if now else ""
                    raise ValueError(
                        f"rank {rank} of {self.place.size} has shown no sign of life in"
                        f" {self.output.parent} for {SILENCE:.0f} s (all ranks must see that"
                        f" folder{last}); run the same again to go on, with as many ranks as you"
                        " have"
                    )
            if not waiting:
                return
            if not told:
                names = ", ".join(map(str, waiting))
                logging.getLogger("rmr1").info("Waiting for the shares of ranks %s", names)
                told = True
            time.sleep(POLL)

    def _said(self, rank: int) -> str:
        try:
            return self._of(rank, "alive").read_text(encoding="utf-8")
        except OSError:
            return ""


def _shown(sign: str) -> str:
    """A sign of life without the moment in it."""
    return re.sub(r"^failed \d+: ", "failed: ", sign)


def _rows_so_far(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of the whole lines of a file that may be growing."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (RecursionError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: no JSON ({error}); give another output, or remove the line"
            ) from None
