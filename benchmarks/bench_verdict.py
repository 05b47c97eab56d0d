"""The verdict parser on judgments of 4 KB: C++ on one thread and on all, and the Python reference.

    python benchmarks/bench_verdict.py [--samples 50] [--quick]

Throughput counts UTF-8 bytes. A sample parses a whole list of distinct judgments, Python's records
included; for the reference, which is slower, a part of the list.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

import rmr1
from rmr1.verdict import parse_verdict, parse_verdicts, reference_parse

SIZE = 4096  # UTF-8 bytes of a judgment, about
COUNT = 1000
REFERENCE = "Python reference"
WORDS = {
    "ascii": "the answer explains why this step is right and keeps to what was asked, but its "
    "second part misses 2 of the 7 cases. It has no source for that claim",
    "cjk": "回答 解释了 为什么 这一步 是 正确的，但是 第二部分 漏掉了 两种 情况。 它 没有 来源 😀",
}


def judgment(rng: Random, words: list[str], chat: bool) -> str:
    """A judgment in the format, about SIZE bytes long."""

    def prose(size: int) -> str:
        text = ""
        while len(text.encode()) < size:
            text += rng.choice(words) + " "
        return text

    if chat:
        items = "".join(
            f"{number}. **{prose(12)}** ({weight}%): {prose(90)}\n"
            for number, weight in enumerate((40, 25, 20, 15), start=1)
        )
        head = f"<type>Chat</type>\n<rubric>\n{items}<justify>{prose(300)}</justify>\n</rubric>"
    else:
        head = f"<type>Reasoning</type>\n<solution>\n{prose(900)}\n</solution>"
    evidence = "".join(
        f"<quote_{side}>{prose(100)}</quote_{side}>\n<summary_{side}>{prose(160)}</summary_{side}>\n"
        for side in "AABB"
    )
    comment = prose(SIZE - len((head + evidence).encode()) - 80)
    answer = rng.choice("AB")
    return f"{head}\n<eval>\n{evidence}{comment}</eval>\n<answer>[[{answer}]]</answer>"


def measure(run: Callable[[], object], size: int, samples: int) -> dict[str, float]:
    """Seconds of each sample as throughput: median, p20, p80 in GB/s."""
    run()
    rates = []
    for _ in range(samples):
        start = time.perf_counter()
        run()
        rates.append(size / (time.perf_counter() - start) / 1e9)
    quantiles = statistics.quantiles(rates, n=10, method="inclusive")
    return {"median": statistics.median(rates), "p20": quantiles[1], "p80": quantiles[7]}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def rows(samples: int, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for workload, words in WORDS.items():
        rng = Random(0)
        texts = [judgment(rng, words.split(), chat=bool(i % 2)) for i in range(count)]
        assert all(verdict.well_formed for verdict in parse_verdicts(texts))
        few = texts[: count // 20]
        providers: list[tuple[str, list[str], Callable[[list[str]], object]]] = [
            ("C++, 1 thread", texts, lambda part: parse_verdicts(part, 1)),
            (f"C++, {os.cpu_count()} threads", texts, lambda part: parse_verdicts(part)),
            ("C++, one by one", texts, lambda part: [parse_verdict(text) for text in part]),
            (REFERENCE, few, lambda part: [reference_parse(text) for text in part]),
        ]
        for provider, part, run in providers:
            size = sum(len(text.encode()) for text in part)
            figures = measure(partial(run, part), size, samples)
            found.append(
                {
                    "workload": f"judgments of 4 KB, {workload}",
                    "provider": provider,
                    "version": rmr1.__version__,
                    "yardstick": REFERENCE,
                    "unit": "GB/s",
                    "device": cpu_name(),
                    **figures,
                    # Of the process so far: the judgments themselves make up most of it.
                    "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    "python": platform.python_version(),
                }
            )
    return found


def yardstick(found: list[dict[str, Any]], workload: str) -> float:
    """GB/s of the Python reference."""
    return next(
        float(row["median"])
        for row in found
        if row["workload"] == workload and row["provider"] == REFERENCE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, help="of every provider (default 50, quick 3)")
    parser.add_argument("--quick", action="store_true", help="few judgments, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("results/bench_verdict.json"))
    options = parser.parse_args()
    samples = options.samples or (3 if options.quick else 50)
    found = rows(samples, 100 if options.quick else COUNT)
    table = Table(title=f"Verdict parser, GB/s, {cpu_name()}")
    for column in ("workload", "provider", "median", "p20", "p80", "x reference"):
        table.add_column(column, justify="left" if column in ("workload", "provider") else "right")
    for row in found:
        row["x_yardstick"] = yardstick(found, row["workload"]) / row["median"]
        numbers = [f"{row[name]:.3f}" for name in ("median", "p20", "p80")]
        times = f"{1 / row['x_yardstick']:.0f}"
        table.add_row(row["workload"], row["provider"], *numbers, times)
    Console().print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
