"""One GRPO step: rollout, rewards, reference and update, against TRL's GRPOTrainer, in turn.

    python benchmarks/bench_step.py --trl-python ENV/bin/python [--shapes 2x1000x8x128 2x2000x8x128]

A shape is prompts x tokens of a prompt x samples x new tokens. Both get the same prompts, draw
samples of the same length at temperature 1, score them with a reference model (beta 1e-3) and make
one update. TRL lives in an environment of its own (`pip install trl==1.16.0 torch==2.13.0`), and
without one only this project runs. What exactly is called and timed: `step_peers.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import harness
import torch
from generate_workloads import Shape, texts
from harness import Limits, Row, Work
from peer_process import ProviderFailed, call
from rich.console import Console
from rich.table import Table

from rmr1.engine.flops import body_size, forward_flops, head_size, training_flops
from rmr1.engine.model_config import ModelConfig
from rmr1.engine.packing import Group
from rmr1.engine.weights import read_config
from rmr1.models import load_tokenizer, resolve_model

PEERS = Path(__file__).with_name("step_peers.py")
HEADLINE = "2x1000x8x128"
QUICK = "2x60x4x16"
BETA = 1e-3


def exact_prompts(found: list[str], tokenizer: Any, shape: Shape) -> list[dict[str, Any]]:
    """Texts that the tokenizer turns into exactly so many tokens, and these."""
    prompts: list[dict[str, Any]] = []
    source = iter(found)
    while len(prompts) < shape.prompts:
        text = f"Task {len(prompts)}\n"
        while len(tokenizer(text)["input_ids"]) < shape.length:
            text += next(source) + "\n"
        tokens = tokenizer(text)["input_ids"][: shape.length]
        for _ in range(20):  # the end of a cut text may be tokenized otherwise
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            again = tokenizer(text)["input_ids"]
            if len(again) == shape.length:
                prompts.append({"text": text, "token_ids": again})
                break
            tokens = (again + tokenizer(" yes" * shape.length)["input_ids"])[: shape.length]
    return prompts


def least(config: ModelConfig, shape: Shape, dtype: torch.dtype, name: str) -> Work:
    """The operations of a step that shares prompts everywhere, and its bytes.

    Those of a forward in the rollout and in the pass of the reference, and of forward and backward
    in the update. Bytes: the decoding steps, which read all weights, and the optimiser.
    """
    groups = [Group(shape.length, (shape.new,) * shape.samples)] * shape.prompts
    flops = 2 * forward_flops(config, groups) + training_flops(config, groups)
    weights = (body_size(config) + head_size(config)) * dtype.itemsize
    return Work(name, flops, float(weights * (shape.new + 9)))


def in_turn(
    shape: Shape, options: argparse.Namespace, model: Path, found: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """What every provider's processes answered, in turn; TRL is left out where it fails."""
    runs = {"trl": options.trl_python} if options.trl_python and not options.quick else {}
    runs |= {"rmr1": sys.executable}
    results: dict[str, list[dict[str, Any]]] = {provider: [] for provider in runs}
    with tempfile.TemporaryDirectory() as folder:
        prompts = exact_prompts(found, load_tokenizer(model), shape)
        Path(folder, "prompts.json").write_text(json.dumps(prompts))
        job = {name: getattr(options, name) for name in ("threads", "device", "dtype")}
        job |= {"model": str(model), "samples": shape.samples, "new_tokens": shape.new}
        job |= {"prompts": f"{folder}/prompts.json", "folder": folder, "beta": BETA}
        job |= {"micro_batch": options.trl_micro_batch, "max_micro_tokens": options.micro_tokens}
        for turn in range(options.samples):
            for provider in list(results):
                try:
                    result = call(runs[provider], PEERS, job | {"provider": provider})
                except ProviderFailed as error:
                    if provider == "rmr1":
                        raise
                    print(f"{error}; it is left out", file=sys.stderr)
                    del results[provider]
                    continue
                results[provider].append(result)
                print(f"turn {turn + 1}: {provider} {result['seconds']:.4g} s", file=sys.stderr)
    return results


def rows_of(
    work: Work, results: dict[str, list[dict[str, Any]]], device: str, limits: Limits
) -> list[Row]:
    """A row a provider, with its phases."""
    found = []
    for provider, own in results.items():
        row = harness.row(work, provider, [one["seconds"] for one in own], device, limits)
        ratios = [
            one["seconds"] / other["seconds"]
            for one, other in zip(own, results["rmr1"], strict=True)
        ]
        phases = {
            name: statistics.median(one["phases"][name] for one in own) for name in own[0]["phases"]
        }
        memory = max(one["peak_memory_mb"] for one in own)
        found.append(
            row
            | {
                "version": own[0]["version"],
                "yardstick": "rmr1",
                "x_yardstick": statistics.median(ratios),
                "phases": phases,
                "peak_memory_mb": memory,
            }
        )
    return found


def show(rows: list[Row]) -> None:
    """Print a table for each shape."""
    first, console = rows[0], Console(highlight=False)
    console.print(f"[bold]One GRPO step, {first['device']}, {first['threads']} threads")
    for workload, group in groupby(rows, lambda row: row["workload"]):
        table = Table(title=workload, box=None, pad_edge=False, title_justify="left")
        for name in ("provider", "seconds", "x rmr1", "share", "peak GB", "phases, seconds"):
            table.add_column(name, justify="left" if name[:2] in ("pr", "ph") else "right")
        for one in group:
            phases = ", ".join(f"{name} {took:.3g}" for name, took in one["phases"].items())
            numbers = [f"{one['median']:.4g}", f"{one['x_yardstick']:.2f}", f"{one['share']:.0%}"]
            memory = f"{one['peak_memory_mb'] / 1024:.2f}"
            table.add_row(one["provider"], *numbers, memory, phases)
        console.print(table)
    print(
        f"share: of the least time at {first['limit_flops'] / 1e9:,.0f} GFLOP/s and"
        f" {first['limit_bandwidth'] / 1e9:,.1f} GB/s, measured before, every prompt computed once."
    )


def measure(options: argparse.Namespace) -> list[Row]:
    """Every shape; the file is written after each."""
    model = resolve_model("pocket" if options.quick else options.model)
    config, dtype = read_config(model), getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    limits = harness.limits(options.device, dtype)
    rows: list[Row] = []
    found = texts(options.data)
    for text in [QUICK] if options.quick else options.shapes:
        shape = Shape(*map(int, text.split("x")))
        work = least(config, shape, dtype, f"{shape.name}, {model.name} {options.dtype}")
        rows += rows_of(work, in_turn(shape, options, model, found), options.device, limits)
        harness.save(rows, options.output)
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "step", samples=3)
    parser.add_argument("--model", default="smollm2", help="a directory, or a name that rmr1 knows")
    parser.add_argument("--shapes", nargs="+", default=[HEADLINE], help=f"default {HEADLINE}")
    parser.add_argument("--data", type=Path, help="RM-Bench's files (default: the embedded tasks)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--micro_tokens", type=int, default=2048, help="of rmr1's micro-batches")
    parser.add_argument("--trl_micro_batch", type=int, default=4, help="sequences (default 4)")
    parser.add_argument("--trl-python", default=os.environ.get("RMR1_TRL_PYTHON"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{parser.prog}: no CUDA device is here; use --device cpu", file=sys.stderr)
        return 2
    if options.trl_python and not shutil.which(options.trl_python):
        print(f"{parser.prog}: --trl-python {options.trl_python} is no program", file=sys.stderr)
        return 2
    options.samples = options.samples or (1 if options.quick else options.full_samples)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    try:
        rows = measure(options)
    except (ProviderFailed, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
