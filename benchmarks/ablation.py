"""The paper's ablation in small: what rubrics, classification and distillation add to RL.

    python benchmarks/ablation.py [--seeds 0 1 2] [--only cold rubrics]

The shape of RM-R1's tables 2 and 3 (arXiv 2505.02387), on the pocket model and the embedded tasks.
The pocket model writes the whole format from the start, with true notes and a verdict drawn at
random. An arm that is to write less is shown the training traces with the sections left out and
their verdicts drawn at random: it learns what to write, and nothing about who is right. That takes
as many steps as distillation does. Then every arm gets the same RL.

    base            the pocket model as it is
    cold            evaluation and verdict only, then RL
    rubrics         with a rubric or an own solution, then RL
    classified      with the type of the task too, then RL
    rm_r1           distilled from right traces of the whole format, then RL
    distilled       distilled only
    answers         SFT on right verdicts alone, on all pairs that rm_r1 sees, four times

Each (arm, seed) has its folder, shared by processes as those of learning_curves.py are.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import harness
import torch
from ablation_plot import plot
from pocket_runs import after_rl, begin, complete, conduct, held, pooled_gain, told
from rich.console import Console
from rich.table import Table

import rmr1
from rmr1.config import DataConfig, SftConfig
from rmr1.data import Pair, write_pairs
from rmr1.demo import evaluate_stage
from rmr1.demo_config import DemoConfig, DistillPlan, RlPlan, sft_config
from rmr1.distill import distill
from rmr1.evaluate import Evaluation, summarise
from rmr1.models import resolve_model
from rmr1.tasks.catalog import draw_pairs
from rmr1.terminal import phase

DEMO = RlPlan()
SEEDS = (0, 1, 2)
STEPS, PROMPTS = 8, 32  # of RL, as in learning_curves.py
# Over the verdicts alone, 608 pairs: as many sequences as distillation and RL see (352 + 2,048).
EPOCHS = 4

TYPE = re.compile(r"<type>.*?</type>\n", re.DOTALL)
HEAD = re.compile(r"<(solution|rubric)>.*?</\1>\n", re.DOTALL)
SECTIONS = ("Chat", "Safety", "Reasoning")


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the table. `without`: sections that its judgments lack."""

    name: str
    without: tuple[re.Pattern[str], ...] = ()
    told: bool = False  # whether its traces have the right verdict
    verdict_only: bool = False
    learns: bool = True  # whether it is fine-tuned at all
    rl: bool = True


ARMS = {
    "base": Arm("Base", learns=False, rl=False),
    "cold": Arm("Cold-start RL", without=(TYPE, HEAD)),
    "rubrics": Arm("+ rubrics or own solution", without=(TYPE,)),
    "classified": Arm("+ task classification"),
    "rm_r1": Arm("+ distillation (RM-R1)", told=True),
    "distilled": Arm("Distillation alone", told=True, rl=False),
    "answers": Arm("Answer-only SFT", told=True, verdict_only=True, rl=False),
}


def plan(options: argparse.Namespace, arm: str, seed: int) -> DemoConfig:
    """An arm's runs with one seed, all else as in the demo."""
    sizes = {"prompts": 4, "samples": 4} if options.quick else {"prompts": PROMPTS}
    rollout = DEMO.rollout.model_copy(update=sizes)
    steps = 2 if options.quick else STEPS
    traces = DistillPlan(traces=32) if options.quick else DistillPlan()
    return DemoConfig(
        name=f"{arm}-{seed}",
        runs_dir=str(options.runs),
        seed=seed,
        heldout=24 if options.quick else 510,
        distill=traces,
        rl=DEMO.model_copy(update={"steps": steps, "rollout": rollout}),
    )


def shown(arm: Arm, pair: Pair, rng: Random) -> Pair:
    """A training pair with the trace that an arm learns from."""
    verdict = pair.label if arm.told else rng.choice("AB")
    text = "" if arm.verdict_only else pair.trace[: pair.trace.index("<answer>")]
    for section in arm.without:
        text = section.sub("", text)
    return replace(pair, trace=f"{text}<answer>[[{verdict}]]</answer>")


def pairs_of(arm: Arm, config: DemoConfig) -> list[Pair]:
    """What an arm is fine-tuned on: the demo's traces; verdicts alone, RL's pairs as well."""
    traces = draw_pairs(config.distill.traces, seed=config.seed, split="train")
    if arm.verdict_only:
        count = config.rl.steps * config.rl.rollout.prompts
        more = draw_pairs(count, seed=config.seed + 1_000_000, split="train")
        traces += [replace(pair, id=f"rl-{pair.id}") for pair in more]
    rng = Random(f"ablation/{config.seed}")
    return [shown(arm, pair, rng) for pair in traces]


def fine_tuned(arm: Arm, config: DemoConfig) -> Path:
    """The model that an arm's RL or evaluation starts from."""
    if not arm.learns:
        return resolve_model(config.model)
    path = config.directory / "traces.jsonl"
    if not path.is_file():
        write_pairs(path, pairs_of(arm, config))
    base = sft_config(config)
    stage: SftConfig = base.model_copy(
        update={
            "data": DataConfig(path=str(path), seed=base.data.seed),
            "epochs": EPOCHS if arm.verdict_only else base.epochs,
        }
    )
    with phase(f"SFT {config.name}", 1, "steps") as bar:
        return distill(
            stage, on_start=bar.begin, on_step=lambda done, all_, row: bar.reach(done, all_)
        )


def made(key: str, config: DemoConfig, pairs: list[Pair]) -> Evaluation:
    """Train and judge, or read what an earlier call did."""
    arm = ARMS[key]
    begin(config)
    if arm.rl:
        start = config.directory if complete(config) else fine_tuned(arm, config)
        return after_rl(config, start, pairs)
    done = (config.directory / "judgments-end.jsonl").is_file()
    model = config.directory if done else fine_tuned(arm, config)
    return evaluate_stage(config, "end", model, pairs, phase)


def is_done(key: str, config: DemoConfig) -> bool:
    """Whether there is nothing left to do for an arm and a seed."""
    return complete(config) or (config.directory / "judgments-end.jsonl").is_file()


def measure(options: argparse.Namespace) -> dict[str, list[Evaluation]]:
    """Do what is left to do; the evaluations of all arms whose seeds are all there."""
    heldout = plan(options, "base", 0).heldout
    pairs = draw_pairs(heldout, seed=0, split="heldout")
    for seed, key in itertools.product(options.seeds, options.only):
        config = plan(options, key, seed)
        with held(config.directory) as mine:
            if mine:
                made(key, config, pairs)
    found = {}
    for key in ARMS:
        configs = [plan(options, key, seed) for seed in options.seeds]
        if all(is_done(key, config) for config in configs):
            found[key] = [made(key, config, pairs) for config in configs]
        elif key in options.only:
            print(f"{key} is not complete: another process has it", file=sys.stderr)
    return found


# --- Figures -------------------------------------------------------------------------------------


def section(source: str, kind: str) -> str:
    """Which column of the table a task belongs to."""
    if source in ("tasks/safety", "tasks/over_refusal"):
        return "Safety"
    return "Chat" if kind == "chat" else "Reasoning"


def part(evaluation: Evaluation, name: str) -> Evaluation:
    """The judgments of one column."""
    kept = [one for one in evaluation.judgments if section(one.source, one.kind) == name]
    return summarise(kept, prompt_hash=evaluation.prompt_hash, seed=evaluation.seed)


def accuracy(evaluations: Sequence[Evaluation]) -> float:
    """Unparsed judgments counted as wrong, over all seeds."""
    judged = [one for each in evaluations for one in each.judgments]
    return sum(one.correct for one in judged) / len(judged)


def rows_of(options: argparse.Namespace) -> list[harness.Row]:
    """A line each; a gain is over the arm before in the first table, over base in the second."""
    rows = []
    found = measure(options)
    for key, evaluations in found.items():
        arm = ARMS[key]
        before = {"rubrics": "cold", "classified": "rubrics", "rm_r1": "classified"}.get(
            key, "base"
        )
        gains = {
            name: told(pooled_gain(found[name], evaluations))
            for name in dict.fromkeys(("base", before))
            if name in found and name != key
        }
        row: dict[str, Any] = {
            "workload": "ablation on the pocket model",
            "provider": f"rmr1 {key}",
            "version": rmr1.__version__,
            "torch": torch.__version__,
            "device": harness.device_name("cpu"),
            "name": arm.name,
            "seeds": list(options.seeds),
            "heldout_pairs": len({one.id for one in evaluations[0].judgments}),
            "accuracy": accuracy(evaluations),
            "accuracy_by_seed": [one.figures.accuracy for one in evaluations],
            "parse_rate": [one.figures.parse_rate for one in evaluations],
            "tokens": [one.mean_completion_length for one in evaluations],
            "sections": {
                name: accuracy([part(one, name) for one in evaluations]) for name in SECTIONS
            },
            "before": before,
            "gain": gains.get(before),
            "gain_over_base": gains.get("base"),
        }
        rows.append(row)
    return rows


def show(rows: Sequence[harness.Row]) -> None:
    """Both tables in one, as the paper lays them out."""
    console = Console(highlight=False)
    console.width = max(console.width, 132)
    table = Table(title="Ablation, accuracy in percent", title_justify="left", box=None)
    table.add_column("")
    for name in (
        *SECTIONS,
        "all",
        "by seed",
        "over base",
        "over the arm before",
        "parsed",
        "tokens",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        if row["provider"] == "rmr1 distilled":
            table.add_section()
        again = row["gain"] if row["before"] != "base" else None
        table.add_row(
            row["name"],
            *(f"{100 * row['sections'][name]:.1f}" for name in SECTIONS),
            f"{100 * row['accuracy']:.1f}",
            " ".join(f"{100 * value:.1f}" for value in row["accuracy_by_seed"]),
            interval(row["gain_over_base"]),
            interval(again),
            f"{100 * min(row['parse_rate']):.0f}+",
            f"{sum(row['tokens']) / len(row['tokens']):.0f}",
        )
    console.print(table)
    console.print(
        f"{rows[0]['heldout_pairs']} held-out pairs in both placements, seeds"
        f" {', '.join(map(str, rows[0]['seeds']))}; unparsed judgments are wrong. Gains in points"
        " with 95% intervals: pair by pair, seeds pooled, bootstrap over pairs.",
        soft_wrap=True,
    )


def interval(gain: list[float] | None) -> str:
    """A gain in points with its interval."""
    if gain is None:
        return ""
    value, low, high = (100 * one for one in gain)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ARMS, help="arms to run (default all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2, quick 0")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("results/ablation.json"))
    options = parser.parse_args()
    options.only = options.only or list(ARMS)
    options.seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    return conduct(options, "" if options.quick else "ablation", rows_of, show, plot)


if __name__ == "__main__":
    sys.exit(main())
