"""The verbs that train: demo, sft, rlvr.

What needs torch is imported where a verb runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console

from rmr1.config import RlvrConfig, SftConfig, to_toml
from rmr1.data import read_rows
from rmr1.demo_config import DemoConfig
from rmr1.engine.launch import launched
from rmr1.terminal import Phase, phase, print_table
from rmr1.verbs.arguments import SETTINGS, Verb

DRY_RUN = Field(
    False, alias="dry-run", description="resolve, check and print the configuration, then end"
)
TOML = Field("", description="TOML file; options given beside it win over the file")


class Demo(DemoConfig, Verb):
    """Train a judge end to end: evaluate, distil, evaluate, RL, evaluate, report.

    Without arguments the pocket model learns the embedded tasks in at most ten minutes on two
    cores. Interrupted, the same command goes on where it stopped.
    """

    model_config = SETTINGS
    config_file: CliPositionalArg[str] = TOML
    json_output: bool = Field(False, alias="json", description="print the table as JSON")

    def run(self) -> int:
        """Run the demo and print its table and the report's path."""
        from rmr1.demo import run_demo

        config = DemoConfig.model_validate(self.model_dump(include=set(DemoConfig.model_fields)))
        rows, report = run_demo(config, phase)
        for stage in ("sft", "rlvr"):
            _tell_dropped(config.directory / stage)
        if rows["base"]["skipped_prompt_too_long"]:
            print(
                f"{rows['base']['skipped_prompt_too_long']} of {rows['base']['judgments']} held-out"
                " prompts were over the token limit; they count as wrong",
                file=sys.stderr,
            )
        if self.json_output:
            keys = ("accuracy", "accuracy_parsed", "parse_rate", "ci")
            print(json.dumps({stage: {k: row[k] for k in keys} for stage, row in rows.items()}))
        else:
            print_table(rows)
            Console().print(f"Report: {report}", highlight=False, soft_wrap=True)
        return 0


class Sft(SftConfig, Verb):
    """Stage 1, distillation: fine-tune on judgment traces; the loss is on trace tokens only.

    Example: rmr1 sft recipes/sft-laptop.toml --optim.learning_rate 1e-5
    """

    model_config = SETTINGS
    config_file: CliPositionalArg[str] = TOML
    dry_run: bool = DRY_RUN

    def run(self) -> int:
        """Run or resume stage 1."""
        from rmr1.distill import distill
        from rmr1.models import resolve_model

        config = SftConfig.model_validate(self.model_dump(include=set(SftConfig.model_fields)))
        if self.dry_run:
            return _dry_run(config)
        if not _speaks():
            distill(config)
            return 0
        resolve_model(config.model)  # an import has a bar of its own: not inside another one
        with _steps("Distil") as bar:
            follow = partial(_follow, bar, ("loss", "grad_norm"))
            model = distill(config, on_start=bar.begin, on_step=follow)
        return _finish(config, str(model))


class Rlvr(RlvrConfig, Verb):
    """Stage 2, RL with verifiable rewards: GRPO, +1 for the right verdict and -1 otherwise.

    Example: rmr1 rlvr recipes/rlvr-laptop.toml --grpo.beta 0
    """

    model_config = SETTINGS
    config_file: CliPositionalArg[str] = TOML
    dry_run: bool = DRY_RUN

    def run(self) -> int:
        """Run or resume stage 2."""
        from rmr1.models import resolve_model
        from rmr1.rlvr import rlvr

        config = RlvrConfig.model_validate(self.model_dump(include=set(RlvrConfig.model_fields)))
        if self.dry_run:
            return _dry_run(config)
        if not _speaks():
            rlvr(config)
            return 0
        resolve_model(config.model)  # an import has a bar of its own: not inside another one
        with _steps("RL") as bar:
            follow = partial(_follow, bar, ("reward", "kl", "entropy"))
            model = rlvr(config, on_start=bar.begin, on_step=follow)
        return _finish(config, str(model))


def _dry_run(config: SftConfig | RlvrConfig) -> int:
    """Print the whole configuration, as a run would write it, and on stderr what is not here."""
    from rmr1.engine.weights import read_config
    from rmr1.run import refuse_changes

    print(to_toml(config), end="")
    folder = Path(config.model)
    known = config.model in ("pocket", "smollm2")
    if not known and not (folder / "config.json").is_file():
        print(f"model: no {folder}/config.json here", file=sys.stderr)
    elif not known:
        read_config(folder)  # ValueError says what this project cannot compute
    if config.data.path and not Path(config.data.path).is_file():
        print(f"data.path: no {config.data.path} here", file=sys.stderr)
    if (config.directory / "config.toml").is_file():
        refuse_changes(config.directory, config)
        print(f"{config.directory} is there already and would be resumed", file=sys.stderr)
    return 0


def _speaks() -> bool:
    """Whether this process shows progress and results: of a job's ranks the first one does."""
    place = launched()
    first = place is None or place.rank == 0
    if not first:  # what it has to say, the first one says too
        logging.getLogger("rmr1").setLevel(logging.ERROR)
    return first


def _steps(title: str) -> AbstractContextManager[Phase]:
    return phase(title, 1, "steps")


def _follow(
    bar: Phase, names: tuple[str, ...], step: int, total: int, row: dict[str, float]
) -> None:
    bar.reach(step, total)
    bar.show({name: row[name] for name in names if name in row})


def _tell_dropped(run: Path) -> None:
    """Say on stderr how many pairs a training run left out as too long."""
    path = run / "metrics.jsonl"
    # A complete run is not made again, though somebody may have emptied its metrics.
    rows = [row for _, row in read_rows(path)] if path.is_file() else []
    dropped = rows[-1].get("dropped_prompts", 0) if rows else 0
    if dropped:
        print(
            f"{run.name}: {dropped} pairs were over the token limits and left out", file=sys.stderr
        )


def _finish(config: SftConfig | RlvrConfig, model: str) -> int:
    from rmr1.reporting.report import write_report

    report = write_report(config.directory)
    _tell_dropped(config.directory)
    Console().print(f"Model: {model}\nReport: {report}", highlight=False, soft_wrap=True)
    return 0
