"""GRPO, Dr.GRPO, DAPO, GSPO, CISPO and RLOO at equal budget: what each adds to one distilled model.

    python benchmarks/learning_curves.py [--only gspo rloo] [--seeds 0 1 2] [--steps 8]

The pocket model is distilled once, as the demo does it. From there each objective trains with the
demo's RL stage, once a seed, with the same tasks, samples and steps, and judges the same held-out
pairs as the distilled model did. Run N of every objective starts from the same draws.

Every run has its folder, variants/<objective>-<seed> beside the output, and is not repeated once it
is complete; remove the folder to run it anew. A run that another process has in hand is left to it,
so the same command, started twice, shares the work. The process that ends last writes the rows, the
table and the plot of all runs with these seeds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from learning_plot import NAMES, plot
from pocket_runs import after_rl, begin, complete, conduct, held, pooled_gain, told
from rich.console import Console
from rich.table import Table

import rmr1
from rmr1.config import GrpoConfig
from rmr1.data import Pair, read_rows
from rmr1.demo import evaluate_stage
from rmr1.demo_config import DemoConfig, DistillPlan, RlPlan, sft_config
from rmr1.distill import distill
from rmr1.evaluate import Evaluation, compare
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import phase

# Every objective as it is published, and all else as in the demo. That takes no rate of its own for
# any of them: AdamW takes the scale out of a loss, and with it what Dr.GRPO's normaliser and its
# unscaled advantages or GSPO's cut-off tokens change in the length of a step.
DEMO = RlPlan()
SEEDS = (0, 1, 2)
# The demo trains for 18 steps of 64 x 8. Less is enough to tell, and leaves time for every run.
STEPS, PROMPTS = 8, 32


# --- Runs ----------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> DemoConfig:
    """The demo as it is here: what is distilled and judged, and the budget of every run."""
    where = {"name": "distilled", "runs_dir": str(options.runs)}
    sizes = {"prompts": 4, "samples": 4} if options.quick else {"prompts": PROMPTS}
    rollout = DEMO.rollout.model_copy(update=sizes)
    rl = RlPlan(steps=options.steps, rollout=rollout)
    if options.quick:
        return DemoConfig(**where, heldout=6, distill=DistillPlan(traces=32), rl=rl)
    return DemoConfig(**where, rl=rl)


def run_of(base: DemoConfig, variant: str, seed: int, rate: float | None) -> DemoConfig:
    """The run of one objective and seed; a rate of its own stands in its name."""
    change = {
        "learning_rate": rate or DEMO.learning_rate,
        "grpo": GrpoConfig(
            variant=variant,
            minibatches=DEMO.grpo.minibatches,
            overlong_buffer=base.rl.rollout.max_new_tokens // 5 if variant == "dapo" else 0,
        ),
    }
    name = f"{variant}-{seed}" + (f"-lr{rate:g}" if rate else "")
    return base.model_copy(
        update={"name": name, "seed": seed, "rl": base.rl.model_copy(update=change)}
    )


def distilled_model(base: DemoConfig) -> Path:
    """The model that every run starts from, distilled at the first call."""
    with held(base.directory, wait=True), phase("Distil", 1, "steps") as bar:
        begin(base)
        return distill(
            sft_config(base),
            on_start=bar.begin,
            on_step=lambda step, total, row: bar.reach(step, total),
        )


def before_rl(base: DemoConfig, seed: int, model: Path, pairs: list[Pair]) -> Evaluation:
    """What the distilled model judges with a seed, drawn at the first call."""
    with held(base.directory, wait=True):
        seeded = base.model_copy(update={"seed": seed})
        return evaluate_stage(seeded, f"distilled-{seed}", model, pairs, phase)


# --- Figures -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """One complete run: the same pairs judged before RL and after it, and its metrics."""

    config: DemoConfig
    before: Evaluation
    after: Evaluation
    metrics: list[dict[str, Any]]


def row_of(variant: str, results: Sequence[Result]) -> harness.Row:
    """One objective as it stands in the JSON. Its time is that of a step."""
    config = results[0].config
    rl = config.rl
    gain = pooled_gain([one.before for one in results], [one.after for one in results])
    own = [compare(one.before, one.after)[0] for one in results]
    seconds = [step["step_time"] for one in results for step in one.metrics]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    size = f"{rl.rollout.prompts} x {rl.rollout.samples}"
    lows = [gain.interval.low, *(one.interval.low for one in own if one is not None)]
    return {
        "workload": f"RL of the distilled pocket model, {rl.steps} steps of {size}",
        "provider": f"rmr1 {variant}",
        "version": rmr1.__version__,
        "torch": torch.__version__,
        "unit": "s",
        "median": statistics.median(seconds),
        "p20": cuts[1],
        "p80": cuts[7],
        "device": harness.device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "learning_rate": rl.learning_rate,
        "objective": rl.grpo.model_dump(),
        "heldout_pairs": config.heldout,
        "judgments_a_pair": 2 * len(results),
        "seeds": [one.config.seed for one in results],
        "accuracy_before": [one.before.figures.accuracy for one in results],
        "accuracy": [one.after.figures.accuracy for one in results],
        "accuracy_parsed": [one.after.figures.accuracy_parsed for one in results],
        "parse_rate_before": [one.before.figures.parse_rate for one in results],
        "parse_rate": [one.after.figures.parse_rate for one in results],
        "accuracy_mean": statistics.fmean(one.after.figures.accuracy for one in results),
        "gain": told(gain),
        "gain_of_seeds": [None if one is None else told(one) for one in own],
        "gain_method": gain.interval.method,
        # The pooled interval knows of no seeds, so each seed must also stand on its own.
        "outside_the_noise": min(lows) > 0,
        "reward": [[step["reward"] for step in one.metrics] for one in results],
        "entropy": [[step["entropy"] for step in one.metrics] for one in results],
        "mean_length": [
            [step["completions/mean_length"] for step in one.metrics] for one in results
        ],
    }


def show(rows: Sequence[harness.Row]) -> None:
    """Print the table."""

    def points(values: Sequence[float]) -> str:
        return " ".join(f"{100 * value:.1f}" for value in values)

    first, console = rows[0], Console(highlight=False)
    console.width = max(console.width, 130)
    before = {
        seed: value
        for row in rows
        for seed, value in zip(row["seeds"], row["accuracy_before"], strict=True)
    }
    table = Table(title=first["workload"], title_justify="left", box=None, pad_edge=False)
    for name in ("objective", "rate", "accuracy by seed", "mean", "gain, points", "95% interval",
                 "lowest seed", "parsed by seed", "outside the noise"):  # fmt: skip
        left = name in ("objective", "outside the noise")
        table.add_column(name, justify="left" if left else "right")
    for row in rows:
        gain, low, high = row["gain"]
        table.add_row(
            NAMES[row["provider"].split()[1]],
            f"{row['learning_rate']:g}",
            points(row["accuracy"]),
            points([row["accuracy_mean"]]),
            f"{100 * gain:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{100 * min(own[1] for own in row['gain_of_seeds']):+.1f}",
            points(row["parse_rate"]),
            "yes" if row["outside_the_noise"] else "no",
        )
    console.print(table)
    console.print(
        f"Accuracy in percent over {first['heldout_pairs']} held-out pairs in both placements,"
        " unparsed judgments counted wrong; before RL "
        + ", ".join(f"{100 * value:.1f} (seed {seed})" for seed, value in sorted(before.items()))
        + ". Gain: pair by pair, all seeds pooled, bootstrap over pairs. Lowest seed: the lowest"
        " end of a single seed's own interval; outside the noise: it and the pooled one are"
        " above 0.",
        soft_wrap=True,
    )


# --- The command ---------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """Do what is left to do, and the rows of all runs of these seeds that are complete."""
    base = plan(options)
    pairs = draw_pairs(base.heldout, seed=base.seed, split="heldout")
    start = distilled_model(base)
    # Seeds outside: cut short, there is something of every objective.
    for seed, variant in itertools.product(options.seeds, options.only):
        config = run_of(base, variant, seed, options.learning_rate)
        with held(config.directory) as mine:
            if mine:
                after_rl(config, start, pairs)
    rows = []
    for variant in NAMES:
        results = []
        for seed in options.seeds:
            config = run_of(base, variant, seed, options.learning_rate)
            if complete(config):
                metrics = [row for _, row in read_rows(config.directory / "rlvr" / "metrics.jsonl")]
                before = before_rl(base, seed, start, pairs)
                results.append(Result(config, before, after_rl(config, start, pairs), metrics))
            elif variant in options.only:
                print(f"{config.name} is not complete: another process has it", file=sys.stderr)
        if results:
            rows.append(row_of(variant, results))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, help="objectives to run (default all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2, quick 0")
    parser.add_argument("--steps", type=int, help=f"of every run (default {STEPS}, quick 2)")
    parser.add_argument(
        "--learning_rate", type=float, help="for all objectives, to find one; runs of their own"
    )
    parser.add_argument("--quick", action="store_true", help="one short run, to see that it works")
    parser.add_argument(
        "--name", help="folder of the runs, beside the output (default variants, quick: not kept)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/learning_curves.json"))
    options = parser.parse_args()
    options.only = options.only or (["dapo"] if options.quick else list(NAMES))
    options.seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    options.steps = options.steps or (2 if options.quick else STEPS)
    folder = options.name or ("" if options.quick else "variants")
    return conduct(options, folder, measure, show, plot)


if __name__ == "__main__":
    sys.exit(main())
