"""Settings of the rollout and of the objective. No torch: the command line's help needs these."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, model_validator

from rmr1.kernels.policy_loss_config import (
    Correction,
    KlEstimate,
    Normalize,
    Objective,
    Ratio,
    variant,
)
from rmr1.section import Section


class RolloutConfig(Section):
    """How judgments are sampled for RL."""

    prompts: int = Field(64, ge=1, description="pairs in one step")
    samples: int = Field(7, ge=2, description="judgments of each pair: the group")
    temperature: float = Field(1.0, gt=0, description="of the sampling and of the loss")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 samples from everything")
    max_new_tokens: int = Field(8192, ge=1, description="cap of a judgment's length")
    kv_memory_gb: float | None = Field(None, gt=0, description="KV cache; unset: what is free")
    release: bool = Field(
        False,
        description="give back the generator's memory while the policy is updated: its KV cache"
        " and, under zero.stage 3, its copy of the weights",
    )


class RewardConfig(Section):
    """The weights of a reward's parts (rmr1/rewards.py); 0 leaves one out. RM-R1 has the first."""

    correctness: float = Field(1.0, gt=0, description="+1 for the right verdict, -1 otherwise")
    swap_consistency: float = Field(
        0.0, ge=0, description="share of judgments with the answers exchanged that agree, 0 to 1"
    )
    grounding: float = Field(0.0, ge=0, description="share of quotes that the answer holds")
    format: float = Field(0.0, ge=0, description="1 for a judgment that keeps the format")
    length: float = Field(0.0, ge=0, description="-1 for a judgment as long as the cap, 0 for none")


class GrpoConfig(Section):
    """The objective: GRPO as RM-R1 uses it, or another one of the family.

    `variant` sets what is published under that name, for the keys that are not given themselves.
    """

    variant: Literal["rm_r1", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"] = Field(
        "rm_r1", description="a published objective; other keys here win over it"
    )
    beta: float = Field(1e-3, ge=0, description="weight of the KL to the start; 0: no reference")
    kl: KlEstimate = Field("k3", description="how that KL is estimated")
    ratio: Ratio = Field("token", description="of each token, or one of the sequence (GSPO)")
    objective: Objective = Field("clip", description="clipped ratio, or CISPO's clipped weight")
    clip_low: float = Field(0.2, ge=0, description="ratios below 1 - this are clipped")
    clip_high: float = Field(0.2, ge=0, description="ratios above 1 + this are clipped")
    dual_clip: float | None = Field(None, gt=1, description="cap of the loss where A < 0, times A")
    normalize: Normalize = Field(
        "token", description="what losses are divided by: tokens, sequences, sequences x the cap"
    )
    correction: Correction = Field(
        "none", description="weigh by policy over generator: truncated, masked (token, sequence)"
    )
    correction_low: float = Field(0.5, ge=0, description="lowest weight that mask lets through")
    correction_high: float = Field(2.0, gt=0, description="cap of that weight")
    scale: Literal["std", "none"] = Field("std", description="divide advantages by the group's std")
    baseline: Literal["mean", "loo"] = Field("mean", description="group mean, or leave-one-out")
    overlong_buffer: int = Field(
        0, ge=0, description="the last so many tokens before the cap cost up to 1 reward (DAPO)"
    )
    resample_rounds: int = Field(
        0, ge=0, description="so often groups of equal reward give way to new prompts' (DAPO)"
    )
    offload_reference: bool = Field(
        False, description="keep the reference in host memory between its uses (on a CPU: on disk)"
    )
    minibatches: int = Field(8, ge=1, description="updates per rollout")
    old_logprobs: Literal["rollout", "recompute"] = Field(
        "rollout", description="take them from the generator, or run the policy once more"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_variant(cls, given: Any) -> Any:
        name = given.get("variant") if isinstance(given, dict) else None
        return given if name not in ADVANTAGES else {**_published(name), **given}

    @model_validator(mode="after")
    def _one_objective(self) -> GrpoConfig:
        if self.ratio == "sequence" and self.objective == "cispo":
            raise ValueError("objective cispo weighs single tokens; with it ratio must be token")
        if not self.correction_high > self.correction_low:
            raise ValueError(f"correction_high must be above correction_low, {self.correction_low}")
        if self.correction != "none" and self.old_logprobs == "rollout":
            # The ratio is then of policy over generator, and there is nothing left to correct.
            raise ValueError(
                f'grpo.correction = "{self.correction}" corrects nothing with grpo.old_logprobs ='
                ' "rollout"; set old_logprobs = "recompute", or correction = "none"'
            )
        return self


# How the advantages of each variant are made, and its prompts chosen.
ADVANTAGES: dict[str, dict[str, str | int]] = {
    "rm_r1": {},
    "grpo": {},
    "dapo": {"resample_rounds": 2},
    "gspo": {},
    "cispo": {},
    "dr_grpo": {"scale": "none"},
    "rloo": {"scale": "none", "baseline": "loo"},
}
_NO_BOUND = 1e9  # a log-ratio is clamped to 20, so no ratio is as large


def _published(name: str) -> dict[str, Any]:
    """The settings of a variant."""
    fields = dataclasses.asdict(variant(name, max_length=1))
    fields["clip_high"] = min(fields["clip_high"], _NO_BOUND)
    del fields["max_length"]  # it is rollout.max_new_tokens
    return fields | ADVANTAGES[name]


def refuse_more_minibatches(rollout: RolloutConfig, grpo: GrpoConfig) -> None:
    """ValueError when a step has fewer judgments than updates."""
    total = rollout.prompts * rollout.samples
    if grpo.minibatches > total:
        raise ValueError(
            f"grpo.minibatches = {grpo.minibatches} is more than the {total} judgments of a step"
            " (rollout.prompts x rollout.samples)"
        )
