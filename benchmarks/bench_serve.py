"""The judge over HTTP against one call of `Judge.compare_all` with the same comparisons.

    python benchmarks/bench_serve.py --threads 2

Clients send comparisons of the embedded tasks to `rmr1 serve`, each client the next one as soon as
it has its judgment; so many clients are so many prompts in the generator's batch at most. One call
with all comparisons is the yardstick. Calls with as many at a time as there are clients tell what
of the difference is the smaller batch, and what HTTP and a batch that changes all the time cost.
Judgments are greedy; `equal` says how many have the text that such a call gave them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table

from rmr1.data import Pair
from rmr1.judge import Judge
from rmr1.models import resolve_model
from rmr1.tasks.catalog import draw_pairs

ONE_CALL = "compare_all, one call"


@contextmanager
def served(options: argparse.Namespace) -> Iterator[str]:
    """`rmr1 serve` as a process of its own; its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    arguments = ["--model", options.model, "--prompt_style", options.prompt_style]
    arguments += ["--max_new_tokens", str(options.max_new_tokens), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rmr1.cli", "serve", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads), "RMR1_TOKEN": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise ValueError("rmr1 serve did not start; run it by hand to see why")
            try:
                urllib.request.urlopen(f"{address}/healthz", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, pair: Pair) -> tuple[float, dict[str, Any]]:
    """(seconds, judgment) of one comparison."""
    body = {"prompt": list(pair.conversation), "answer_a": pair.answer_a, "answer_b": pair.answer_b}
    request = urllib.request.Request(
        f"{address}/v1/judge",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)
    return time.perf_counter() - began, found


def from_clients(
    address: str, pairs: Sequence[Pair], clients: int
) -> tuple[float, list[float], list[str]]:
    """(seconds of all, seconds of each, their texts), asked by so many clients."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda pair: ask(address, pair), pairs))
    whole = time.perf_counter() - began
    return whole, [seconds for seconds, _ in answers], [found["text"] for _, found in answers]


def in_calls(judge: Judge, pairs: Sequence[Pair], size: int) -> tuple[float, list[str]]:
    """(seconds, texts) of `compare_all` on so many at a time, one call after the other."""
    began = time.perf_counter()
    texts: list[str] = []
    for start in range(0, len(pairs), size):
        texts += [one.text for one in judge.compare_all(pairs[start : start + size])]
    return time.perf_counter() - began, texts


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """Every number of clients, and the calls, in turn, each turn with comparisons of its own."""
    torch.set_num_threads(options.threads)
    judge = Judge(
        resolve_model(options.model),
        style=options.prompt_style,
        max_new_tokens=options.max_new_tokens,
    )
    sets = (draw_pairs(options.pairs, seed=seed, split="heldout") for seed in itertools.count())
    times: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    equal: dict[str, list[bool]] = {}
    with served(options) as address:
        warm = next(sets)[:2]
        from_clients(address, warm, 2)
        judge.compare_all(warm)
        for _ in range(options.samples):
            # Prompts are cached: who asks about the same once more is answered sooner.
            calls = in_calls(judge, next(sets), options.pairs)[0]
            times.setdefault(ONE_CALL, []).append(calls)
            for clients in options.clients:
                # One client alone takes a while for each: a part of them shows its rate.
                some = next(sets)[: max(2, min(options.pairs, clients * options.rounds))]
                scale = options.pairs / len(some)
                calls, said = in_calls(judge, some, clients)
                times.setdefault(f"compare_all, {clients} a call", []).append(calls * scale)
                whole, each, texts = from_clients(address, some, clients)
                name = f"HTTP, {clients} clients"
                times.setdefault(name, []).append(whole * scale)
                waits.setdefault(name, []).extend(each)
                equal.setdefault(name, []).extend(a == b for a, b in zip(texts, said, strict=True))
    return rows_of(options, times, waits, equal)


def rows_of(
    options: argparse.Namespace,
    times: dict[str, list[float]],
    waits: dict[str, list[float]],
    equal: dict[str, list[bool]],
) -> list[harness.Row]:
    """A line for the one call and for each number of clients."""
    work = harness.Work(f"{options.pairs} comparisons, {options.model}", flops=0.0, bytes=0.0)
    bare = harness.Limits(1.0, 1.0)  # what HTTP costs has no bound; the one call is the yardstick
    base = statistics.median(times[ONE_CALL])
    rows = []
    for name, seconds in times.items():
        each = sorted(waits.get(name, []))
        row = harness.row(work, f"rmr1 {name}", seconds, "cpu", bare)
        extra = {
            "yardstick": f"rmr1 {ONE_CALL}",
            "x_yardstick": row["median"] / base,
            "judgments_per_second": options.pairs / row["median"],
            "latency_p50": each[len(each) // 2] if each else None,
            "latency_p95": each[int(len(each) * 0.95)] if each else None,
            "equal": statistics.fmean(equal[name]) if name in equal else None,
        }
        rows.append(row | extra)
    return rows


def show(rows: Sequence[harness.Row]) -> None:
    """The table."""
    table = Table(
        title=f"Judge over HTTP: {rows[0]['workload']}, {rows[0]['threads']} threads", box=None
    )
    table.add_column("")
    for name in ("judgments/s", "time, one call = 1", "p50 s", "p95 s", "equal"):
        table.add_column(name, justify="right")
    for row in rows:
        waited = [row["latency_p50"], row["latency_p95"]]
        table.add_row(
            row["provider"].removeprefix("rmr1 "),
            f"{row['judgments_per_second']:.2f}",
            f"{row['x_yardstick']:.2f}",
            *("" if one is None else f"{one:.2f}" for one in waited),
            "" if row["equal"] is None else f"{100 * row['equal']:.0f}%",
        )
    Console(highlight=False).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a directory or a name (default smollm2, quick pocket)")
    parser.add_argument("--prompt_style", help="default rubric, quick compact")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, help="comparisons (default 64, quick 8)")
    parser.add_argument("--clients", type=int, nargs="+", help="default 1 8 32, quick 4")
    parser.add_argument("--rounds", type=int, default=4, help="comparisons of a client, at most")
    parser.add_argument("--samples", type=int, help="turns (default 3, quick 1)")
    parser.add_argument("--threads", type=int, default=2, help="of the model (default 2)")
    parser.add_argument("--quick", action="store_true", help="a small size, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("results/bench_serve.json"))
    options = parser.parse_args()
    quick = options.quick
    options.model = options.model or ("pocket" if quick else "smollm2")
    options.prompt_style = options.prompt_style or ("compact" if quick else "rubric")
    options.pairs = options.pairs or (8 if quick else 64)
    options.clients = options.clients or ([4] if quick else [1, 8, 32])
    options.samples = options.samples or (1 if quick else 3)
    try:
        rows = measure(options)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    show(rows)
    harness.save(rows, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
