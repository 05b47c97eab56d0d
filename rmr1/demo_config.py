"""Settings of the demo, and the two training runs that follow from them."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from rmr1.config import (
    DataConfig,
    GrpoConfig,
    RlvrConfig,
    RolloutConfig,
    Section,
    SftConfig,
    refuse_more_minibatches,
)
from rmr1.engine.optim_config import OptimConfig
from rmr1.prompts import PromptStyle


class DistillPlan(Section):
    """How much the demo distils."""

    traces: int = Field(352, ge=1, description="traces of embedded tasks to learn from")
    batch_size: int = Field(16, ge=1, description="traces in one update")
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(5, ge=0, description="updates over which the rate rises")


class RlPlan(Section):
    """How long the demo trains by RL."""

    steps: int = Field(18, ge=1, description="rollout steps")
    learning_rate: float = Field(1e-4, gt=0, description="constant learning rate")
    warmup_steps: int = Field(2, ge=0, description="updates over which the rate rises")
    rollout: RolloutConfig = RolloutConfig(prompts=64, samples=8, max_new_tokens=192)
    grpo: GrpoConfig = GrpoConfig(minibatches=4)

    @model_validator(mode="after")
    def _minibatches_fit(self) -> RlPlan:
        # Said before the demo starts, not when it comes to its last stage.
        refuse_more_minibatches(self.rollout, self.grpo)
        return self


class DemoConfig(Section):
    """`rmr1 demo`: the pocket model by default, any model by a file such as demo-smollm2.toml."""

    name: str = Field("demo", min_length=1, description="the demo writes runs/<name>/")
    runs_dir: str = Field("runs", description="the folder of all runs")
    model: str = Field("pocket", description="Hugging Face directory, or `pocket`, `smollm2`")
    seed: int = Field(0, ge=0, description="of the tasks, the order and every draw")
    prompt_style: PromptStyle = Field("compact", description="the judge's prompt")
    heldout: int = Field(510, ge=1, description="held-out pairs to evaluate on, in both placements")
    max_prompt_tokens: int = Field(768, ge=1, description="longer prompts are dropped and counted")
    max_new_tokens: int = Field(192, ge=1, description="cap of a judgment in evaluations")
    eval_temperature: float = Field(
        1.0, ge=0, description="of evaluated judgments; 1: sampled as RL samples them, 0: greedy"
    )
    max_micro_tokens: int = Field(8192, ge=1, description="tokens in one training forward")
    checkpoint_every: int = Field(10, ge=1, description="steps between two checkpoints")
    distill: DistillPlan = DistillPlan()
    rl: RlPlan = RlPlan()

    @property
    def directory(self) -> Path:
        """The demo's folder."""
        return Path(self.runs_dir) / self.name


def sft_config(config: DemoConfig) -> SftConfig:
    """Stage 1 of the demo as a run of its own."""
    plan = config.distill
    return SftConfig(
        name="sft",
        runs_dir=str(config.directory),
        model=config.model,
        seed=config.seed,
        prompt_style=config.prompt_style,
        max_prompt_tokens=config.max_prompt_tokens,
        max_micro_tokens=config.max_micro_tokens,
        checkpoint_every=config.checkpoint_every,
        data=DataConfig(tasks=plan.traces, seed=config.seed),
        batch_size=plan.batch_size,
        optim=OptimConfig(
            learning_rate=plan.learning_rate, schedule="linear", warmup_steps=plan.warmup_steps
        ),
    )


def rlvr_config(config: DemoConfig, distilled: Path) -> RlvrConfig:
    """Stage 2 of the demo; its pairs are drawn with another seed than the traces."""
    plan = config.rl
    return RlvrConfig(
        name="rlvr",
        runs_dir=str(config.directory),
        model=str(distilled),
        seed=config.seed,
        prompt_style=config.prompt_style,
        max_prompt_tokens=config.max_prompt_tokens,
        max_micro_tokens=config.max_micro_tokens,
        checkpoint_every=config.checkpoint_every,
        data=DataConfig(tasks=plan.steps * plan.rollout.prompts, seed=config.seed + 1_000_000),
        steps=plan.steps,
        rollout=plan.rollout,
        grpo=plan.grpo,
        optim=OptimConfig(learning_rate=plan.learning_rate, warmup_steps=plan.warmup_steps),
    )
