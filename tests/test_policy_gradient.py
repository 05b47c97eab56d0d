"""The policy loss where no bound is active: gradient and figures of every option, in every
implementation, against torch's autograd of the formula written plainly, in fp64.

tests/test_policy_variants.py has tokens on both sides of every bound. There the slope of most
sequences is 0 with a ratio of the whole sequence, which hides how its tokens hang together.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import use
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss

# One sequence has a single token, one has none.
LENGTHS = (17, 1, 0, 40, 9, 25)
ADVANTAGES = (1.5, -0.75, 2.0, -1.25, -0.5, 0.25)
SPANS = list(itertools.pairwise([0, *itertools.accumulate(LENGTHS)]))
NAMES = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native", "triton"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks and a part of one, and blocks that end within a sequence."""
    from rmr1.kernels import policy_loss_triton

    monkeypatch.setattr(policy_loss_triton, "BLOCK", 32)


def data() -> dict[str, Tensor]:
    """Ratios within 20% of 1, corrections far from 1 that differ within a sequence."""
    generator = torch.Generator().manual_seed(1)
    count = sum(LENGTHS)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(count, generator=generator)

    new = noise(0.5) - 3
    old = new - noise(0.04).clamp(-0.1, 0.1)
    old[slice(*SPANS[3])] -= 0.08  # so much likelier as a whole that a dual clip of 1.05 holds it
    rollout = old - noise(0.5)
    rollout[slice(*SPANS[4])] -= 0.9  # as a whole too far from the generator
    return {
        "logprobs": new,
        "old_logprobs": old,
        "ref_logprobs": new + noise(0.8),
        "rollout_logprobs": rollout,
        "advantages": torch.tensor(ADVANTAGES),
        "sequence_ids": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
    }


def corrections(apart: Tensor, c: PolicyLossConfig) -> Tensor:
    """Those of the tokens of one sequence."""
    w = apart.exp()
    if c.correction == "truncate":
        return w.clamp(max=c.correction_high)
    if c.correction == "mask":
        return w * ((w >= c.correction_low) & (w <= c.correction_high))
    if c.correction == "mask_sequence":
        whole = apart.mean().exp()
        return torch.ones_like(w) * ((whole >= c.correction_low) & (whole <= c.correction_high))
    return torch.ones_like(w)


def plain(given: dict[str, Tensor], c: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and figures by token, sequence after sequence."""
    losses, figures = [], []
    for a, length, span in zip(ADVANTAGES, LENGTHS, SPANS, strict=True):
        new, old, ref, rollout = (given[name][slice(*span)] for name in NAMES)
        r = (new - old).exp()
        if c.ratio == "sequence":
            r = (new - old).mean().exp().expand(length)
        held = r.clamp(1 - c.clip_low, 1 + c.clip_high)
        policy = -torch.minimum(r * a, held * a)
        if c.objective == "cispo":
            policy = -held.detach() * a * new
        elif c.dual_clip and a < 0:
            policy = policy.clamp(max=-c.dual_clip * a)
        d = ref - new
        kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[c.kl]
        w = corrections(old - rollout, c)
        count = {
            "token": sum(LENGTHS),
            "sequence": length * len(LENGTHS),
            "fixed": len(LENGTHS) * (c.max_length or 0),
        }[c.normalize]
        losses.append(((w * policy + c.beta * kl) / max(count, 1)).sum())
        figures.append(torch.stack([r, w, kl, (old - rollout).abs()]))
    names = ("ratio", "correction", "kl", "mismatch")
    by_token = dict(zip(names, torch.cat(figures, dim=1).detach(), strict=True))
    return torch.stack(losses).sum(), by_token


def config(**options: Any) -> PolicyLossConfig:
    return PolicyLossConfig(clip_high=0.28, correction_high=1.6, **options)


CONFIGS = {
    f"{ratio} {correction} beta={beta} dual={dual}": config(
        ratio=ratio, correction=correction, beta=beta, dual_clip=dual
    )
    for ratio, correction, beta, dual in itertools.product(
        ("token", "sequence"),
        ("none", "truncate", "mask", "mask_sequence"),
        (0.0, 0.1),
        (None, 1.05),
    )
}
CONFIGS |= {
    f"cispo {correction} beta={beta}": config(objective="cispo", correction=correction, beta=beta)
    for correction, beta in itertools.product(("none", "truncate", "mask_sequence"), (0.0, 0.1))
}
CONFIGS |= {
    f"{ratio} {normalize} {kl}": config(
        ratio=ratio,
        normalize=normalize,
        max_length=50 if normalize == "fixed" else None,
        correction="truncate",
        beta=0.1,
        kl=kl,
    )
    for ratio, (normalize, kl) in itertools.product(
        ("token", "sequence"), (("sequence", "k1"), ("fixed", "k2"))
    )
}


def errors(c: PolicyLossConfig, given: dict[str, Tensor]) -> tuple[float, float]:
    """Of the loss, and the largest of the slope as a share of the largest slope."""
    exact = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    leaf = exact["logprobs"].requires_grad_()
    wanted, _ = plain(exact, c)
    (truth,) = torch.autograd.grad(wanted, leaf)
    new = given["logprobs"].clone().requires_grad_()
    found, _ = policy_loss(**{**given, "logprobs": new}, config=c)
    (slope,) = torch.autograd.grad(found, new)
    worst = (slope.double() - truth).abs().max() / truth.abs().max()
    return abs(found.item() - wanted.item()), worst.item()


@BACKENDS
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_autograd(name: str, backend: Any) -> None:
    given = data()
    if backend == "reference":
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    with use(backend):
        loss, slope = errors(CONFIGS[name], given)
    bound = 1e-12 if backend == "reference" else 2e-6
    assert loss < bound
    assert slope < bound


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_every_instruction_set(correction: Any, isa: str) -> None:
    with use("native"):
        _, slope = errors(config(ratio="sequence", correction=correction), data())
    assert slope < 2e-6, isa


@BACKENDS
@pytest.mark.parametrize("name", CONFIGS)
def test_figures_are_those_of_the_formula(name: str, backend: Any) -> None:
    given, c = data(), CONFIGS[name]
    _, by_token = plain({k: v.double() if k in NAMES else v for k, v in given.items()}, c)
    with use(backend):
        _, stats = policy_loss(**given, config=c)
    wanted = {
        "clip_ratio/low_mean": 0.0,  # no bound is active
        "clip_ratio/high_mean": 0.0,
        "kl": by_token["kl"].mean().item(),
        "ratio_mean": by_token["ratio"].mean().item(),
        "ratio_max": by_token["ratio"].max().item(),
        "ratio_min": by_token["ratio"].min().item(),
        "logprob_mismatch": by_token["mismatch"].mean().item(),
        "correction_mean": by_token["correction"].mean().item(),
        "nonfinite": 0.0,
    }
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(wanted, rel=1e-5)


def test_the_data_tell_right_from_wrong() -> None:
    given = data()
    for correction in ("truncate", "mask"):
        c = config(ratio="sequence", correction=correction, beta=0)
        _, by_token = plain(given, c)
        for begin, end in SPANS:
            if end - begin > 1:  # the mean is no token's own
                assert by_token["correction"][begin:end].std() > 0.2
        given["logprobs"] = given["logprobs"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(plain(given, c)[0], given["logprobs"])
        assert slope.abs().min() > 1e-4  # every token of every sequence has one
        dual = config(ratio="sequence", correction=correction, beta=0, dual_clip=1.05)
        (slope,) = torch.autograd.grad(plain(given, dual)[0], given["logprobs"])
        held = [bool((slope[begin:end] == 0).all()) for begin, end in SPANS if end > begin]
        assert held == [False, False, True, False, False]
