"""The policy loss and its gradient against a plain formula, token by token, in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss

LOW, HIGH, BETA = 0.2, 0.28, 0.05
CONFIG = PolicyLossConfig(clip_low=LOW, clip_high=HIGH, beta=BETA)


def plain_grpo(
    new: Tensor, old: Tensor, ref: Tensor, advantages: list[float], owner: list[int]
) -> tuple[float, list[float], dict[str, float]]:
    """The objective and its derivative in each log-probability, in Python floats."""
    count = len(owner)
    loss, gradient = 0.0, []
    low = high = kl = 0
    for t, sequence in enumerate(owner):
        a, logp = advantages[sequence], float(new[t])
        r = math.exp(logp - float(old[t]))
        bounded = min(max(r, 1 - LOW), 1 + HIGH)
        d = float(ref[t]) - logp
        loss += -min(r * a, bounded * a) + BETA * (math.exp(d) - 1 - d)
        # Where the clipped term is the smaller one and the bound is active, nothing flows.
        flows = r * a <= bounded * a
        gradient.append(((-a * r if flows else 0.0) + BETA * (1 - math.exp(d))) / count)
        low += a < 0 and r < 1 - LOW
        high += a > 0 and r > 1 + HIGH
        kl += math.exp(d) - 1 - d
    stats = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "kl": kl}
    return loss / count, gradient, {name: value / count for name, value in stats.items()}


def tokens(count: int = 60) -> dict[str, Any]:
    """Log-probabilities whose ratios lie on both sides of both bounds."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(count, dtype=torch.float64, generator=generator)

    new = noise(1.0) - 2
    # Halves and quarters are the same in fp32 and fp64; one sequence has no advantage.
    advantages = [1.5, -0.75, 0.0, -1.25, 0.5]
    owner = sorted(torch.randint(0, 5, (count,), generator=generator).tolist())
    return {
        "logprobs": new,
        "old_logprobs": new + noise(0.3),
        "ref_logprobs": new + noise(0.4),
        "advantages": torch.tensor(advantages),
        "sequence_ids": torch.tensor(owner),
    }


def test_loss_gradient_and_figures_equal_the_plain_formula() -> None:
    data = tokens()
    logprobs = data.pop("logprobs").requires_grad_()
    loss, stats = policy_loss(logprobs, **data, config=CONFIG)
    loss.backward()
    expected, gradient, figures = plain_grpo(
        logprobs.detach(),
        data["old_logprobs"],
        data["ref_logprobs"],
        data["advantages"].tolist(),
        data["sequence_ids"].tolist(),
    )
    assert figures["clip_ratio/low_mean"] > 0.05  # the data reach all cases
    assert figures["clip_ratio/high_mean"] > 0.05
    assert abs(loss.item() - expected) < 1e-12
    assert logprobs.grad is not None
    torch.testing.assert_close(
        logprobs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-12
    )
    for name, value in figures.items():
        assert abs(stats[name].item() - value) < 1e-6, name
    largest = (logprobs.detach() - data["old_logprobs"]).exp().max().item()
    assert stats["ratio_max"].item() == pytest.approx(largest)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, -2.0),  # on the old policy: plain policy gradient
        (1.0, -2.0, 2.0),
        (1.5, 2.0, 0.0),  # good and already much likelier: clipped
        (1.5, -2.0, 3.0),  # bad and much likelier: pulled back with full force
        (0.5, 2.0, -1.0),  # good and much less likely: pulled back
        (0.5, -2.0, 0.0),  # bad and already much less likely: clipped
    ],
)
def test_each_side_of_the_clip(ratio: float, advantage: float, slope: float) -> None:
    logprobs = torch.tensor([-1.0 + math.log(ratio)], requires_grad=True)
    loss, stats = policy_loss(
        logprobs,
        torch.tensor([-1.0]),
        torch.tensor([advantage]),
        torch.tensor([0]),
        config=PolicyLossConfig(beta=0),
    )
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-6)
    assert stats["clip_ratio/high_mean"].item() == (ratio == 1.5 and advantage > 0)
    assert stats["clip_ratio/low_mean"].item() == (ratio == 0.5 and advantage < 0)
    assert "kl" not in stats


def test_kl_is_zero_on_the_reference_and_pulls_towards_it() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss, stats = policy_loss(
        logprobs,
        logprobs.detach(),
        torch.zeros(1),
        torch.zeros(3, dtype=torch.int64),
        ref_logprobs=torch.tensor([-1.0, -0.5, -2.0]),
        config=PolicyLossConfig(beta=1.0),
    )
    loss.backward()
    expected = [0.0, math.exp(0.5) - 1.5, math.exp(-1) - 1 + 1]
    assert stats["kl"].item() == pytest.approx(sum(expected) / 3)
    assert logprobs.grad is not None
    assert logprobs.grad[0] == 0
    assert logprobs.grad[1] < 0 < logprobs.grad[2]  # descent raises the first, lowers the second


def test_parts_with_the_whole_count_add_up_to_the_whole() -> None:
    data = tokens()
    data["rollout_logprobs"] = data["old_logprobs"] + 0.25
    logprobs = data["logprobs"].requires_grad_()
    whole, stats = policy_loss(**data, config=CONFIG)
    (expected,) = torch.autograd.grad(whole, logprobs)
    assert stats["logprob_mismatch"].item() == pytest.approx(0.25)

    total, sums = 0.0, dict.fromkeys(stats, 0.0)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 60)):  # uneven on purpose
        part = {k: v if k == "advantages" else v[rows] for k, v in data.items()}
        loss, found = policy_loss(**part, config=CONFIG, token_count=60)
        loss.backward()
        total += loss.item()
        for name, value in found.items():
            sums[name] += value.item()
    assert total == pytest.approx(whole.item())
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected)
    for name in stats.keys() - {"ratio_max", "ratio_min"}:
        assert sums[name] == pytest.approx(stats[name].item()), name


def test_far_off_tokens_stay_finite() -> None:
    logprobs = torch.tensor([-1e4, -1e-6, -50.0], requires_grad=True)
    other = torch.tensor([-1e-6, -1e4, -50.0])
    loss, _ = policy_loss(
        logprobs,
        other,
        torch.tensor([-1.0]),
        torch.zeros(3, dtype=torch.int64),
        ref_logprobs=other,
        config=CONFIG,
    )
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": torch.zeros(2, 2)}, r"must be a floating vector \[T\]"),
        ({"old_logprobs": torch.zeros(1)}, "old_logprobs must have the shape"),
        ({"sequence_ids": torch.zeros(3, dtype=torch.int64)}, "sequence_ids must have"),
        ({"ref_logprobs": torch.zeros(3)}, "ref_logprobs must have"),
        ({"rollout_logprobs": torch.zeros(3)}, "rollout_logprobs must have"),
        ({"advantages": torch.zeros(1, 1)}, r"a vector \[S\]"),
        ({"sequence_ids": torch.tensor([0, 1])}, r"lie in 0\.\.0 .* got 0\.\.1"),
        ({"sequence_ids": torch.tensor([-1, 0])}, "sequence_ids must lie"),
        ({"ref_logprobs": None}, "ref_logprobs is needed when beta > 0"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "logprobs": torch.zeros(2),
        "old_logprobs": torch.zeros(2),
        "advantages": torch.zeros(1),
        "sequence_ids": torch.zeros(2, dtype=torch.int64),
        "ref_logprobs": torch.zeros(2),
        **changes,
    }
    with pytest.raises(ValueError, match=words):
        policy_loss(**arguments, config=CONFIG)


@pytest.mark.parametrize("name", ["clip_low", "clip_high", "beta"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        PolicyLossConfig(**{name: value})
