"""Files of judgments that grow line by line and survive being cut off anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO


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
