"""Every option of the policy loss, in every implementation, against a formula in Python floats."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss, variant

# One sequence has a single token, one has none, one has no advantage.
LENGTHS = (17, 1, 0, 40, 9)
ADVANTAGES = (1.5, -0.75, 2.0, -1.25, 0.0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole blocks and a part of one, so that both ways of loading run."""
    from rmr1.kernels import policy_loss_triton

    monkeypatch.setattr(policy_loss_triton, "BLOCK", 32)


def data(seed: int = 0) -> dict[str, Tensor]:
    """Log-ratios of both signs, on both sides of every bound, some beyond the limit of 20."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(count, generator=generator)

    new = noise(0.5) - 3
    old = new + noise(0.3)
    old[5], old[20] = new[5] - 25, new[20] + 25
    rollout = old + noise(0.5)
    rollout[18:58] += 0.6  # one sequence as a whole is far from the generator's
    return {
        "logprobs": new,
        "old_logprobs": old,
        "ref_logprobs": new + noise(0.8),
        "rollout_logprobs": rollout,
        "advantages": torch.tensor(ADVANTAGES),
        "sequence_ids": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
    }


def limited(x: float) -> tuple[float, float]:
    """x within +-20, and the slope of that."""
    return min(max(x, -20.0), 20.0), float(-20 <= x <= 20)


def plain(c: PolicyLossConfig, given: dict[str, Tensor]) -> tuple[float, list[float]]:
    """Loss and slope, one sequence and one token after the other."""
    new, old, ref, rollout = (
        given[name].tolist()
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    )
    loss, slopes, start = 0.0, [], 0
    for length, a in zip(LENGTHS, ADVANTAGES, strict=True):
        span = range(start, start + length)
        start += length
        mean = sum(new[t] - old[t] for t in span) / max(length, 1)
        apart = math.exp(sum(old[t] - rollout[t] for t in span) / max(length, 1))
        weight = {
            "token": 1 / sum(LENGTHS),
            "sequence": 1 / (max(length, 1) * len(LENGTHS)),
            "fixed": 1 / (len(LENGTHS) * (c.max_length or 1)),
        }[c.normalize]
        values, parts, keeps = [], [], []
        for t in span:
            d, inside = limited(mean if c.ratio == "sequence" else new[t] - old[t])
            r = math.exp(d)
            held = min(max(r, 1 - c.clip_low), 1 + c.clip_high)
            if c.objective == "cispo":
                value, slope = -held * a * new[t], -held * a
            else:
                value = -min(r * a, held * a)
                slope = -r * a * inside if r * a <= held * a else 0.0
                if c.dual_clip and a < 0 and value > -c.dual_clip * a:
                    value, slope = -c.dual_clip * a, 0.0
            w = math.exp(limited(old[t] - rollout[t])[0])
            keep = {
                "none": 1.0,
                "truncate": min(w, c.correction_high),
                "mask": w if c.correction_low <= w <= c.correction_high else 0.0,
                "mask_sequence": float(c.correction_low <= apart <= c.correction_high),
            }[c.correction]
            values.append(keep * value)
            parts.append(slope)
            keeps.append(keep)
        if c.ratio == "sequence":  # each token moves the ratio, and so the loss, of all of them
            keeps = [sum(keeps) / max(length, 1)] * length
        for t, value, slope, keep in zip(span, values, parts, keeps, strict=True):
            d, inside = limited(ref[t] - new[t])
            kl, kl_slope = {
                "k1": (-d, inside),
                "k2": (d * d / 2, -d * inside),
                "k3": (math.exp(d) - 1 - d, (1 - math.exp(d)) * inside),
            }[c.kl]
            loss += weight * (value + c.beta * kl)
            slopes.append(weight * (keep * slope + c.beta * kl_slope))
    return loss, slopes


VARIANTS = {name: variant(name) for name in ("rm_r1", "grpo", "dapo", "gspo", "cispo", "rloo")}
VARIANTS["dr_grpo"] = variant("dr_grpo", max_length=50)
OPTIONS = {
    f"{kl} {correction} {normalize}": PolicyLossConfig(
        beta=0.1,
        kl=kl,  # type: ignore[arg-type]
        correction=correction,  # type: ignore[arg-type]
        normalize=normalize,  # type: ignore[arg-type]
        max_length=50 if normalize == "fixed" else None,
        dual_clip=3.0 if kl == "k2" else None,
        correction_high=1.6,
    )
    for kl, correction, normalize in itertools.product(
        ("k1", "k2", "k3"),
        ("none", "truncate", "mask", "mask_sequence"),
        ("token", "sequence", "fixed"),
    )
}
OPTIONS["sequence ratio, corrected"] = PolicyLossConfig(ratio="sequence", correction="truncate")
# Bounds so wide that the slope of no sequence is 0.
OPTIONS |= {
    f"sequence ratio, wide, {correction}": PolicyLossConfig(
        ratio="sequence",
        correction=correction,  # type: ignore[arg-type]
        clip_low=1,
        clip_high=9,
        beta=0,
    )
    for correction in ("truncate", "mask", "mask_sequence")
}
CONFIGS = VARIANTS | OPTIONS


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_formula(name: str, backend: Any) -> None:
    config, given = CONFIGS[name], data()
    if backend == "reference":
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    expected, slopes = plain(config, given)
    logprobs = given["logprobs"].requires_grad_()
    with use(backend):
        loss, stats = policy_loss(**given, config=config)
    (slope,) = torch.autograd.grad(3 * loss, logprobs)
    exact = 1e-12 if backend == "reference" else 1e-5
    largest = max(map(abs, slopes))
    assert largest > 1e-4
    if "wide" in name:
        assert min(map(abs, slopes[:58])) > 1e-4  # all that have an advantage
    assert loss.item() == pytest.approx(expected, rel=10 * exact, abs=exact)
    wanted = torch.tensor([3 * one for one in slopes], dtype=slope.dtype)
    torch.testing.assert_close(slope, wanted, rtol=10 * exact, atol=exact * largest)
    assert stats["nonfinite"] == 0


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", ["rm_r1", "gspo", "dapo"])
def test_statistics_equal_those_of_the_reference(name: str, backend: Any) -> None:
    found = []
    for one in ("reference", backend):
        with use(one):
            config = replace(CONFIGS[name], correction="truncate")
            found.append(policy_loss(**data(), config=config)[1])
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 9
    for key, value in found[0].items():
        assert found[1][key].item() == pytest.approx(value.item(), rel=1e-4), key
    assert found[0]["clip_ratio/low_mean"] > 0
    assert found[0]["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float, backend: Any) -> None:
    given = data()
    given["logprobs"][3] = bad
    with use(backend):
        loss, stats = policy_loss(**given, config=PolicyLossConfig(clip_high=math.inf))
    assert stats["nonfinite"] == (1 if math.isnan(bad) else 0)  # +-inf is held within the limit
    assert loss.isnan() == math.isnan(bad)


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_no_tokens(backend: Any) -> None:
    empty = torch.zeros(0)
    with use(backend):
        loss, stats = policy_loss(
            empty.requires_grad_(), empty.detach(), torch.zeros(2), torch.zeros(0).long(),
            ref_logprobs=empty.detach(), config=PolicyLossConfig(),
        )  # fmt: skip
    loss.backward()
    assert loss == 0
    assert stats["kl"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": "word"}, "ratio must be one of token, sequence, got 'word'"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"correction_low": 3.0}, r"correction_high must be above correction_low \(3.0\)"),
        ({"normalize": "fixed"}, "max_length belongs to normalize fixed"),
        ({"max_length": 5}, "max_length belongs to normalize fixed"),
        ({"ratio": "sequence", "objective": "cispo"}, "ratio must be token"),
    ],
)
def test_impossible_options(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PolicyLossConfig(**changes)


def test_unknown_variants() -> None:
    with pytest.raises(ValueError, match="variant must be one of dr_grpo, rm_r1"):
        variant("ppo")
    with pytest.raises(ValueError, match="dr_grpo divides by max_length"):
        variant("dr_grpo")


def test_a_correction_needs_the_generators_log_probabilities() -> None:
    given = {k: v for k, v in data().items() if k != "rollout_logprobs"}
    with pytest.raises(ValueError, match="rollout_logprobs is needed by correction 'mask'"):
        policy_loss(**given, config=PolicyLossConfig(correction="mask"))
