"""What the benchmarks share: arguments, limits of the machine, timing, JSON and table.

`share` of a row is its share of the roofline: the least time the work can take, max(FLOPs / rate of
a bare GEMM, bytes / rate of a copy), over the median. Both rates are measured in the same run. The
first provider of a workload is its yardstick; `x_yardstick` is the time in units of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from check import WrongResult
from rich.console import Console
from rich.table import Table

import rmr1

Run = Callable[[], object]
Row = dict[str, Any]

SAMPLE = 1e-3  # seconds; a shorter call is repeated within one sample


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine can do: FLOP/s of a bare GEMM, and bytes/s of a copy, read plus written."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Work:
    """A workload with what no implementation can avoid: floating-point operations and bytes."""

    name: str
    flops: float
    bytes: float

    def bound(self, limits: Limits) -> float:
        """The least seconds it can take."""
        return max(self.flops / limits.flops, self.bytes / limits.bandwidth)


def arguments(description: str | None, stem: str, samples: int) -> argparse.ArgumentParser:
    """The arguments that every op's benchmark takes; `rmr1 bench` counts on these names."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of activations and weights (default: float32, on a GPU bfloat16); what an op keeps in"
        " float32 whatever the model's dtype stays so",
    )
    parser.add_argument("--samples", type=int, help=f"of every provider (default {samples})")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; always on a GPU")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it works")
    parser.add_argument("--output", type=Path, default=Path(f"results/bench_{stem}.json"))
    parser.set_defaults(full_samples=samples)
    return parser


def run(
    parser: argparse.ArgumentParser,
    title: str,
    measure: Callable[[argparse.Namespace, Limits], list[Row]],
) -> int:
    """Read the arguments, measure, print and save; the exit code: 1 a wrong result, 2 no GPU."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{parser.prog}: no CUDA device is here; use --device cpu", file=sys.stderr)
        return 2
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.compile = options.compile or options.device == "cuda"
    options.samples = options.samples or (3 if options.quick else options.full_samples)
    try:
        rows = measure(options, limits(options.device, getattr(torch, options.dtype)))
    except WrongResult as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    show(title, rows)
    save(rows, options.output)
    return 0


# --- Time and memory -----------------------------------------------------------------------------


def in_turn(runs: dict[str, Run], samples: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every provider, measured in turn (A B C A B C ...) after a round of warm-up, so
    that a machine that slows down slows all of them.

    Caches stay warm, a GPU's L2 too: in a model the step before has just written the inputs. So
    work that fits a cache may pass the bound, which is that of the memory.
    """
    calls = {}
    for name, call in runs.items():
        took = _seconds(call, 1, device)  # builds and tunes kernels
        if took < 100 * SAMPLE:
            took = _seconds(call, 1, device)
        calls[name] = max(1, min(100, round(SAMPLE / max(1e-9, took))))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, call in runs.items():
            seconds[name].append(_seconds(call, calls[name], device))
    return seconds


def _seconds(call: Run, calls: int, device: str) -> float:
    """Seconds of one of several calls; on a GPU by its own clock."""
    if device == "cuda":
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(calls):
            call()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def limits(device: str, dtype: torch.dtype) -> Limits:
    """The best of a few runs: a limit is what the machine can do, not what it does on average."""
    dtypes = {dtype}
    if device == "cpu":
        dtypes.add(torch.float32)  # often the fastest there, and then what an op computes in
    rate = max(_gemm_rate(device, one) for one in dtypes)
    source = torch.ones((1 << 28) if device == "cuda" else (1 << 25), device=device)
    target = torch.empty_like(source)
    # On a CPU piece by piece: a whole copy takes longer than a busy machine leaves us alone.
    pieces = 1 if device == "cuda" else 16
    pairs = list(zip(target.chunk(pieces), source.chunk(pieces), strict=True))
    best = min(_seconds(lambda p=p: p[0].copy_(p[1]), 1, device) for p in pairs * 7)
    return Limits(rate, 2 * source.numel() * source.element_size() / pieces / best)


def _gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square GEMM, the best of the sizes that take no more than some 20 ms."""
    rate = 0.0
    for side in (512, 1024, 2048, 4096, 8192):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def gemm(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        best = min(in_turn({"gemm": gemm}, 7, device)["gemm"])
        rate = max(rate, 2 * side**3 / best)
        # A dtype that the processor has no units for, or large enough. A small one may only have
        # met a busy machine.
        if best > 0.2 or (best > 0.02 and side >= 2048):
            break
    return rate


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one size: what was compiled for the sizes before must not generalise it."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def copy_of(size: float, device: str) -> Run:
    """A copy that moves `size` bytes, half of them read and half written."""
    source = torch.zeros(max(1, int(size) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def peak_bytes(call: Run, device: str = "cpu") -> int:
    """How far memory rises above what is there before, while `call` works. Linux or CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


# --- Rows ----------------------------------------------------------------------------------------


def measure(
    work: Work,
    runs: dict[str, Run],
    options: argparse.Namespace,
    limits: Limits,
    errors: dict[str, float],
    *,
    results: int = 0,
) -> list[Row]:
    """The rows of one workload, one a provider; the first provider is the yardstick.

    errors: provider -> what `check` found. results: bytes of what a provider returns, which its
    peak memory leaves out.
    """
    seconds = in_turn(runs, options.samples, options.device)
    yardstick = next(iter(runs))
    found = []
    gc.collect()
    for name, call in runs.items():
        # Pair by pair: a slow moment of the machine meets neighbours alike.
        ratios = [a / b for a, b in zip(seconds[name], seconds[yardstick], strict=True)]
        peak = max(0, peak_bytes(call, options.device) - results)
        more = {"yardstick": yardstick, "x_yardstick": statistics.median(ratios)}
        more |= {"error_ratio": errors.get(name), "peak_memory_mb": peak / 2**20}
        found.append(row(work, name, seconds[name], options.device, limits) | more)
    return found


def row(work: Work, provider: str, seconds: Sequence[float], device: str, limits: Limits) -> Row:
    """One result as it stands in the JSON."""
    cuts = (
        statistics.quantiles(seconds, n=10, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 9
    )
    median, bound = statistics.median(seconds), work.bound(limits)
    return {
        "workload": work.name,
        "provider": provider,
        "version": version(provider),
        "torch": torch.__version__,
        "unit": "s",
        "median": median,
        "p20": cuts[1],
        "p80": cuts[7],
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "flops": work.flops,
        "bytes": work.bytes,
        "limit_flops": limits.flops,
        "limit_bandwidth": limits.bandwidth,
        "bound": bound,
        "share": bound / median,
    }


def version(provider: str) -> str:
    """Of the package that a provider comes from."""
    if provider.startswith("rmr1"):
        return rmr1.__version__
    return metadata.version("liger-kernel") if provider.startswith("Liger") else torch.__version__


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the instruction set that the kernels use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    from rmr1 import _C

    return f"{names[0] if names else platform.processor()}, {_C.isa()}"


def save(rows: list[Row], path: Path) -> None:
    """Write the JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def show(title: str, rows: list[Row]) -> None:
    """Print the rows as a table, the providers of a workload under its name."""
    first = rows[0]
    table = Table(title=f"{title}, {first['device']}, {first['threads']} threads")
    table.add_column("provider", overflow="fold")
    for name in ("microseconds", "x first", "share", "error", "extra MB"):
        table.add_column(name, justify="right")
    for number, one in enumerate(rows):
        if not number or one["workload"] != rows[number - 1]["workload"]:
            table.add_section()
            table.add_row(f"[bold]{one['workload']}")
        error = one["error_ratio"]
        table.add_row(
            f"  {one['provider']}",
            f"{1e6 * one['median']:,.0f}",
            f"{one['x_yardstick']:.2f}",
            f"{one['share']:.0%}",
            "" if error is None else f"{error:.2f}",
            f"{one['peak_memory_mb']:.1f}",
        )
    Console().print(table)
    print(
        f"share: of the least time at {first['limit_flops'] / 1e9:,.0f} GFLOP/s and"
        f" {first['limit_bandwidth'] / 1e9:,.1f} GB/s, measured before (work that fits a cache may"
        " pass it).\nx first: in units of the workload's first provider. error: in units of torch's"
        " own."
    )
