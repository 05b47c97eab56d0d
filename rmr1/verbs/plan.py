"""The verb that says whether a recipe fits some GPUs and how long it may take: plan."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table

from rmr1.config import RlvrConfig, SftConfig, load_config
from rmr1.gpus import GPUS, MEMORY_SHARE, NODE
from rmr1.verbs.arguments import Verb

if TYPE_CHECKING:
    from rmr1.engine.memory_plan import MemoryPlan
    from rmr1.engine.model_config import ModelConfig


class Plan(Verb):
    """Memory by part on each GPU, whether it fits, what to change, and an estimate of the time.

    rmr1 plan recipes/rlvr-qwen2.5-7b.toml --model_config recipes/models/qwen2.5-7b.json
    rmr1 plan RECIPE --model_config CONFIG.json --gpu h200 --gpus 16

    Nothing is loaded. Without --gpus: one GPU, then 2, 4 and 8, then two nodes, four and eight.
    """

    recipe: CliPositionalArg[str] = Field(description="TOML file of a stage, `sft` or `rlvr`")
    model_config_file: str = Field(
        "",
        alias="model_config",
        description="the model's config.json; empty: the recipe's model's",
    )
    gpu: Literal["a100", "h100", "h200", "b200", "mi300x"] = Field("h100", description="which")
    gpus: int | None = Field(None, ge=1, description="how many")
    host_memory_gb: float = Field(2000.0, gt=0, description="memory of a node beside its GPUs")
    prompt_tokens: int | None = Field(
        None, ge=1, description="mean length of a prompt; unset: 1200, or the recipe's cap"
    )
    judgment_tokens: int | None = Field(
        None, ge=1, description="mean length of a judgment; unset: the paper's 800, or the cap"
    )
    traces: int | None = Field(
        None, ge=1, description="sft: how many; unset: the recipe's data.tasks, or the paper's 8753"
    )
    json_output: bool = Field(False, alias="json", description="print as JSON")

    def run(self) -> int:
        """Plan and print; exit code 1 when it does not fit on --gpus."""
        config, model = _recipe(self.recipe), self._model()
        counts = [self.gpus] if self.gpus else [1, 2, 4, NODE, 2 * NODE, 4 * NODE, 8 * NODE]
        found = [self._plan(config, model, count) for count in counts]
        if self.json_output:
            print(json.dumps(found))
        else:
            _print(found, self.gpu, config.dtype)
        return 0 if any(one["fits"] for one in found) else 1

    def _model(self) -> ModelConfig:
        from rmr1.engine.model_config import ModelConfig
        from rmr1.models import MODEL_NAMES, resolve_model

        path = Path(self.model_config_file) if self.model_config_file else None
        if path is None:
            name = str(read_toml(self.recipe).get("model", ""))
            # A name is that of a model here; a directory may be on the cluster only.
            path = (resolve_model(name) if name in MODEL_NAMES else Path(name)) / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{path}: cannot be read ({error.strerror}); name the model's config.json with"
                " --model_config, such as one of recipes/models"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error}); give the model's config.json") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: no JSON object; give the model's config.json")
        return ModelConfig.from_dict(found)

    def _plan(
        self, config: SftConfig | RlvrConfig, model: ModelConfig, gpus: int
    ) -> dict[str, Any]:
        from rmr1.memory import plan_run
        from rmr1.step_estimate import TRACES, lengths_of, rlvr_estimate, sft_estimate

        gpu = GPUS[self.gpu]
        usable = int(gpu.memory * MEMORY_SHARE)
        here: Any = {"ranks": gpus, "device": "cuda", "device_memory": usable}
        memory = plan_run(config, model, **here)
        lengths = lengths_of(config, model, self.prompt_tokens, self.judgment_tokens)
        if isinstance(config, RlvrConfig):
            cache = memory.phases["rollout"].get("KV cache", 0)
            estimate = rlvr_estimate(config, model, gpu, gpus, lengths, cache)
        else:
            traces = self.traces or config.data.tasks or TRACES
            estimate = sft_estimate(config, model, gpu, gpus, lengths, traces)
        host = host_bytes(config, model, gpus)
        changes = _changes(config, model, memory, here)
        if host > self.host_memory_gb * 1e9:
            changes.append("take more GPUs, or unset what is offloaded to the node's own memory")
        return {
            "gpus": gpus,
            "fits": not changes,
            "needed_gb": memory.total / 1e9,
            "usable_gb": usable / 1e9,
            "host_gb_a_node": host / 1e9,
            "phases_gb": {
                phase: {part: size / 1e9 for part, size in parts.items() if size}
                for phase, parts in memory.phases.items()
            },
            "change": "; ".join(changes),
            "step_seconds": estimate.parts,
            "seconds_per_step": estimate.step,
            "steps": estimate.steps,
            "hours": estimate.hours,
            "gpu_hours": estimate.hours * gpus,
            "samples_at_a_time": estimate.rows,
            "prompt_tokens": lengths.prompt,
            "judgment_tokens": lengths.judgment,
        }


def _changes(
    config: SftConfig | RlvrConfig, model: ModelConfig, memory: MemoryPlan, here: dict[str, Any]
) -> list[str]:
    """What does not fit a GPU, and what would help; `here` are more arguments of `plan_run`."""
    from rmr1.memory import check_cache, memory_advice

    usable = here["device_memory"]
    if sum(memory.phases["load"].values()) > usable:
        return ["take a larger GPU, as each loads the whole model before it is shared"]
    changes = []
    if memory.total > usable:
        advice = memory_advice(config, model, **here)
        changes.append(f"the {memory.phase} takes {memory.total / 1e9:.1f} GB; {advice}")
    # A cache that nobody gave a number takes its share of what is left, so first of all make room.
    given = isinstance(config, RlvrConfig) and config.rollout.kv_memory_gb is not None
    if given or not changes:
        try:
            check_cache(config, model, memory)
        except ValueError as error:
            keys = "rollout.kv_memory_gb; max_prompt_tokens, rollout.max_new_tokens"
            changes.append(f"{error} ({keys})")
    return changes


def host_bytes(config: SftConfig | RlvrConfig, model: ModelConfig, gpus: int) -> int:
    """Of a node's own memory: what its GPUs' ranks keep there, each for itself."""
    from rmr1.engine.memory_plan import parameters
    from rmr1.step_estimate import number_size

    count, each = parameters(model), 0
    if config.zero.offload_optimizer and gpus > 1:  # fp32 weights, two moments, gradients
        each += 16 * count // gpus
    if isinstance(config, RlvrConfig) and config.grpo.beta and config.grpo.offload_reference:
        each += number_size(config) * count
    return each * min(gpus, NODE)


def read_toml(path: str) -> dict[str, Any]:
    """What a recipe says; ValueError where it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a recipe") from None
    except ValueError as error:
        raise ValueError(f"{path}: no valid TOML ({error})") from None


def _recipe(path: str) -> SftConfig | RlvrConfig:
    """The configuration in a file, of the stage whose keys it has."""
    tree = read_toml(path)
    if "model" not in tree or not {"data", "optim"} & tree.keys() or "teacher" in tree:
        raise ValueError(f"{path}: no training recipe; give one of `rmr1 sft` or `rmr1 rlvr`")
    if "rollout" in tree or "grpo" in tree:
        return load_config(RlvrConfig, path)
    return load_config(SftConfig, path)


def _print(found: list[dict[str, Any]], gpu: str, dtype: str) -> None:
    console = Console()
    table = Table(title=f"{gpu.upper()}, GB on each of them in the phase that takes the most")
    memory = ("GPUs", "needed", "usable", "fits", "host, a node")
    for name in (*memory, "s a step", "steps", "hours", "GPU hours"):
        table.add_column(name, justify="right")
    for one in found:
        times = (
            f"{one['seconds_per_step']:,.0f}",
            f"{one['steps']:,}",
            f"{one['hours']:,.1f}",
            f"{one['gpu_hours']:,.0f}",
        )
        table.add_row(
            str(one["gpus"]),
            f"{one['needed_gb']:.1f}",
            f"{one['usable_gb']:.1f}",
            "yes" if one["fits"] else "no",
            f"{one['host_gb_a_node']:.0f}",
            *(times if one["fits"] else ()),
        )
    console.print(table)
    shown = next((one for one in found if one["fits"]), found[-1])
    _print_parts(console, shown)
    rate = "fp32 FLOP/s, without TF32" if dtype == "float32" else "bf16 FLOP/s"
    console.print(
        f"Times are a roofline estimate, no measurement: 45% of the data sheet's {rate}, 70% of its"
        f" bandwidths, all prompts of {shown['prompt_tokens']:,} tokens and judgments of"
        f" {shown['judgment_tokens']:,}; see rmr1/step_estimate.py.",
        highlight=False,
    )


def _print_parts(console: Console, one: dict[str, Any]) -> None:
    """Memory by part in each phase, and seconds by part, for one number of GPUs."""
    phases = one["phases_gb"]
    table = Table(title=f"On {one['gpus']} GPUs, GB by phase")
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        row = [parts.get(part) for parts in phases.values()]
        table.add_row(part, *("" if size is None else f"{size:.1f}" for size in row))
    table.add_section()
    table.add_row("all", *(f"{sum(parts.values()):.1f}" for parts in phases.values()))
    console.print(table)
    times = ", ".join(f"{name} {seconds:,.1f}" for name, seconds in one["step_seconds"].items())
    rows = one["samples_at_a_time"]
    drawn = f"; {rows:,} samples at a time on each GPU" if rows else ""
    console.print(f"Seconds of a step: {times}{drawn}", highlight=False)
    if one["change"]:
        console.print(f"It does not fit: {one['change']}", highlight=False)
