"""Files of judgments that grow line by line and survive being cut off anywhere."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rmr1.data import Pair


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """The file, mended, for this process alone. ValueError when another one has it open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path}: another process is writing to it; wait for it, or give another output"
            ) from None
        except OSError:  # a file system without locks
            pass
        repair_tail(path)
        yield stream


def content_of(pair: Pair) -> str:
    """A hash of all that a judgment depends on: a rebuilt file may give an id to another pair."""
    told = repr([pair.conversation, pair.answer_a, pair.answer_b, pair.label])
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def append(stream: TextIO, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows and see them onto the disk: from here on they are not made again."""
    stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    stream.flush()
    os.fsync(stream.fileno())


def repair_tail(path: Path) -> bool:
    """Mend a last line that a killed run left half written; True when there was one.

    A whole row that lacks only its newline is kept, anything else after the last newline is cut.
    """
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return False
    end = content.rfind(b"\n") + 1
    try:
        whole = isinstance(json.loads(content[end:].decode("utf-8")), dict)
    except (RecursionError, ValueError):  # no UTF-8 or no JSON: the row was torn
        whole = False
    with path.open("r+b") as stream:
        if whole:
            stream.seek(0, os.SEEK_END)
            stream.write(b"\n")
        else:
            stream.truncate(end)
    return True
