"""A provider measured in a process and a Python environment of its own: both ends of the call.

Nothing but the standard library is imported: the other end runs in a peer's environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]


class ProviderFailed(Exception):
    """A provider's process came to nothing; its sentence is for the user."""


def call(python: str, script: Path, job: Job) -> dict[str, Any]:
    """What the script answers to a job; ProviderFailed says its last error."""
    command = [python, str(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        # Warnings of an interpreter that ends may follow.
        errors = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)]
        code = f"exit code {done.returncode}"
        raise ProviderFailed(f"{job['provider']} failed ({code}): {(errors or said)[-1].strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def answer(measure: Callable[[Job], dict[str, Any]]) -> None:
    """The script's end: the job is its argument, the result one JSON line on stdout."""
    # Libraries print to stdout too; the result is to be alone there.
    out = os.dup(1)
    os.dup2(2, 1)
    result = json.dumps(measure(json.loads(sys.argv[1])))
    os.write(out, result.encode() + b"\n")


def reset_peak() -> None:
    """Forget the peak of memory so far, of all processes."""
    for path in _family():
        (path / "clear_refs").write_text("5")


def peak(device: str) -> int:
    """Bytes: resident at most, added over the processes (Linux), so a page that two of them share
    counts twice. On a GPU what is held at the end: every provider keeps what it once allocated.
    """
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(query, check=True, capture_output=True).stdout.split()[0]) * 2**20
    lines = [line for path in _family() for line in (path / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _family() -> list[Path]:
    """/proc of this process and of all that it started: an engine may have its own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has just ended
            continue
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return [Path(f"/proc/{process}") for process in sorted(found)]
