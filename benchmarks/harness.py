"""What the benchmarks share: measuring in turn, peak memory, the JSON and the table."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import rmr1


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the instruction set that the kernels use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    from rmr1 import _C

    return f"{names[0] if names else platform.processor()}, {_C.isa()}"


def in_turn(
    providers: dict[str, Callable[[], object]], samples: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of every provider, measured in turn (A B C A B C ...) after a round of warm-up, so
    that a machine that slows down slows all of them.
    """
    for run in providers.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(samples):
        for name, run in providers.items():
            _settle(device)
            began = time.perf_counter()
            run()
            _settle(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """How far memory rises above what is there before, while `run` works. Linux or CUDA."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def row(
    workload: str, provider: str, seconds: Sequence[float], device: str, **more: Any
) -> dict[str, Any]:
    """One result as it stands in the JSON."""
    cuts = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
    return {
        "workload": workload,
        "provider": provider,
        "version": rmr1.__version__,
        "torch": torch.__version__,
        "unit": "s",
        "median": statistics.median(seconds),
        "p20": cuts[1],
        "p80": cuts[7],
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **more,
    }


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def show(title: str, rows: list[dict[str, Any]], columns: dict[str, Callable[[Any], str]]) -> None:
    """Print a table of `rows`; `columns` maps a heading to the text of a row."""
    table = Table(title=title)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    for one in rows:
        table.add_row(*(text(one) for text in columns.values()))
    Console().print(table)


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")
