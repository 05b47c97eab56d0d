"""The objectives of the GRPO family as options, and the published variants by name.

Every convention that implementations differ in is a field here, so that none is hidden: which
ratio, which bound, which KL estimate, what corrects for the generator, and what the sum is divided
by. No torch: configuration files need this before any tensor is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Ratio = Literal["token", "sequence"]
Objective = Literal["clip", "cispo"]
KlEstimate = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask", "mask_sequence"]
Normalize = Literal["token", "sequence", "fixed"]


@dataclass(frozen=True, slots=True)
class PolicyLossConfig:
    """How a token's loss is made; with r = exp(logp - old) and advantage A.

    ratio: "token": each token its own r; "sequence": r = exp(mean log-ratio of the sequence), GSPO.
    objective: "clip": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);
        "cispo": -stop(clip(r)) A logp.
    clip_low, clip_high: the bounds, as above; 1 and inf are none.
    dual_clip: for A < 0 the loss is at most -dual_clip A; None: no such cap.
    beta, kl: weight and estimate of the KL to the reference, d = ref - logp:
        k1 = -d; k2 = d^2 / 2; k3 = exp(d) - 1 - d.
    correction: the policy part is weighted by w = exp(old - rollout), since the generator's
        probabilities differ a little: "truncate": min(w, correction_high); "mask": w within
        [correction_low, correction_high], else 0; "mask_sequence": 0 for every token of a sequence
        whose mean log-ratio leads out of the bounds, else 1.
    normalize: the sum is divided by the tokens of the update ("token"), by the tokens of each
        sequence and then by the sequences ("sequence"), or by sequences x max_length ("fixed").
    """

    ratio: Ratio = "token"
    objective: Objective = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 1e-3
    kl: KlEstimate = "k3"
    correction: Correction = "none"
    correction_low: float = 0.5
    correction_high: float = 2.0
    normalize: Normalize = "token"
    max_length: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.ratio, "ratio", get_args(Ratio))
        _one_of(self.objective, "objective", get_args(Objective))
        _one_of(self.kl, "kl", get_args(KlEstimate))
        _one_of(self.correction, "correction", get_args(Correction))
        _one_of(self.normalize, "normalize", get_args(Normalize))
        for name in ("clip_low", "clip_high", "beta", "correction_low"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.correction_high > self.correction_low:
            raise ValueError(
                f"correction_high must be above correction_low ({self.correction_low}), got"
                f" {self.correction_high}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1 or None, got {self.dual_clip}")
        if self.ratio == "sequence" and self.objective == "cispo":
            raise ValueError("objective cispo weighs single tokens; with it ratio must be token")
        if (self.normalize == "fixed") != (self.max_length is not None):
            raise ValueError(
                f"max_length belongs to normalize fixed and to nothing else, got {self.max_length}"
                f" with {self.normalize}"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    @property
    def per_token(self) -> bool:
        """Whether a token's loss depends on no other token's log-probability (see token_loss)."""
        return self.ratio == "token" and self.correction != "mask_sequence"


def variant(name: str, *, max_length: int | None = None) -> PolicyLossConfig:
    """A published objective by its name, without KL unless its paper has one.

    rm_r1 (token mean, KL), grpo (sequence mean, KL), dr_grpo (needs `max_length`; advantages
    without std), dapo, gspo, cispo, rloo (advantages with the leave-one-out baseline). ValueError
    for another name.
    """
    variants = {
        "rm_r1": PolicyLossConfig(),
        "grpo": PolicyLossConfig(normalize="sequence", beta=0.04),
        "dapo": PolicyLossConfig(clip_high=0.28, beta=0),
        "gspo": PolicyLossConfig(
            ratio="sequence", clip_low=3e-4, clip_high=4e-4, normalize="sequence", beta=0
        ),
        # An upper bound of 5 and no lower one, as TRL has it.
        "cispo": PolicyLossConfig(objective="cispo", clip_low=1, clip_high=4, beta=0),
        "rloo": PolicyLossConfig(clip_low=1, clip_high=math.inf, beta=0),
    }
    if name == "dr_grpo":
        if max_length is None:
            raise ValueError("dr_grpo divides by max_length; give the cap of a response in tokens")
        return PolicyLossConfig(normalize="fixed", max_length=max_length, beta=0)
    if name not in variants:
        raise ValueError(f"variant must be one of dr_grpo, {', '.join(variants)}, got {name!r}")
    return variants[name]


def _one_of(value: str, name: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
