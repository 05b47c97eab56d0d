"""Gain against size: distillation and RL, the same for pocket models of three widths.

    python -m rmr1.pocket --output results/pocket-64 --width 64      (and 128; hours)
    python benchmarks/size_study.py --models results/pocket-64 results/pocket-128 pocket

The question of RM-R1's scaling figure (arXiv 2505.02387), in small. All models are pretrained on
the same examples by as many updates. Each then gets the arms `base`, `distilled` and `rm_r1` of
ablation.py, at its budget and with its seeds; see there for how processes share the work.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ablation
import harness
import torch
from pocket_runs import conduct, held, pooled_gain, told
from rich.console import Console
from rich.table import Table
from size_plot import plot

import rmr1
from rmr1.demo_config import DemoConfig
from rmr1.evaluate import Evaluation
from rmr1.models import resolve_model
from rmr1.tasks.catalog import draw_pairs

ARMS = {"base": "Base", "distilled": "Distilled", "rm_r1": "Distilled, then RL"}


@dataclass(frozen=True, slots=True)
class Size:
    """A model of the study; `width` is that of its residual stream."""

    directory: Path
    width: int
    parameters: int


def size_of(model: str) -> Size:
    """What a model's directory says of its size; ValueError when it is no such directory."""
    from rmr1.engine.weights import load_model

    directory = resolve_model(model).resolve()
    loaded = load_model(directory)
    parameters = sum(one.numel() for one in loaded.parameters())
    return Size(directory, loaded.config.hidden_size, parameters)


def plan(options: argparse.Namespace, size: Size, arm: str, seed: int) -> DemoConfig:
    """The ablation's runs of an arm, from this model; its folder is named for the width."""
    config = ablation.plan(options, arm, seed)
    return config.model_copy(
        update={"name": f"{size.width}-{arm}-{seed}", "model": str(size.directory)}
    )


def measure(options: argparse.Namespace) -> dict[tuple[int, str], list[Evaluation]]:
    """Do what is left to do; the evaluations of each (model's number, arm) that is complete."""
    pairs = draw_pairs(24 if options.quick else 510, seed=0, split="heldout")
    sizes = list(enumerate(options.sizes))
    for seed, (_, size), arm in itertools.product(options.seeds, sizes, ARMS):
        config = plan(options, size, arm, seed)
        with held(config.directory) as mine:
            if mine:
                ablation.made(arm, config, pairs)
    found = {}
    for (number, size), arm in itertools.product(sizes, ARMS):
        configs = [plan(options, size, arm, seed) for seed in options.seeds]
        if all(ablation.is_done(arm, config) for config in configs):
            found[number, arm] = [ablation.made(arm, config, pairs) for config in configs]
        else:
            print(f"{size.width} {arm} is not complete: another process has it", file=sys.stderr)
    return found


def rows_of(options: argparse.Namespace) -> list[harness.Row]:
    """A line for each model and arm."""
    rows: list[harness.Row] = []
    found = measure(options)
    for (number, arm), evaluations in found.items():
        size: Size = options.sizes[number]
        base = found.get((number, "base"))
        rows.append(
            {
                "workload": "size study on pocket models",
                "provider": f"rmr1 {size.width} {arm}",
                "version": rmr1.__version__,
                "torch": torch.__version__,
                "device": harness.device_name("cpu"),
                "width": size.width,
                "parameters": size.parameters,
                "arm": arm,
                "seeds": list(options.seeds),
                "heldout_pairs": len({one.id for one in evaluations[0].judgments}),
                "accuracy": ablation.accuracy(evaluations),
                "accuracy_by_seed": [one.figures.accuracy for one in evaluations],
                "parse_rate": [one.figures.parse_rate for one in evaluations],
                "gain_over_base": (
                    told(pooled_gain(base, evaluations)) if base and arm != "base" else None
                ),
            }
        )
    return rows


def show(rows: Sequence[harness.Row]) -> None:
    """The table."""
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    table = Table(title="Size study, accuracy in percent", title_justify="left", box=None)
    table.add_column("parameters", justify="right")
    table.add_column("")
    for name in ("all", "by seed", "over base", "parsed"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['parameters'] / 1e6:.2f} M" if row["arm"] == "base" else "",
            ARMS[row["arm"]],
            f"{100 * row['accuracy']:.1f}",
            " ".join(f"{100 * value:.1f}" for value in row["accuracy_by_seed"]),
            ablation.interval(row["gain_over_base"]),
            f"{100 * min(row['parse_rate']):.0f}+",
        )
    console.print(table)
    console.print(
        f"{rows[0]['heldout_pairs']} held-out pairs in both placements, seeds"
        f" {', '.join(map(str, rows[0]['seeds']))}; unparsed judgments are wrong. Gains in points"
        " with 95% intervals: pair by pair, seeds pooled, bootstrap over pairs.",
        soft_wrap=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", required=True, help="directories, or pocket")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2, quick 0")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("results/size_study.json"))
    options = parser.parse_args()
    options.seeds = options.seeds or (ablation.SEEDS[:1] if options.quick else ablation.SEEDS)
    try:
        options.sizes = sorted(map(size_of, options.models), key=lambda one: one.parameters)
    except ValueError as error:  # no model
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return conduct(options, "" if options.quick else "sizes", rows_of, show, plot)


if __name__ == "__main__":
    sys.exit(main())
