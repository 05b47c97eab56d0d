"""The policy loss of the GRPO family on packed tokens, with its slope and statistics in one pass.

`reference` below is the definition; `PolicyLossConfig` explains the options. For RM-R1's defaults,
with r = exp(logp_t - old_t) of token t in a sequence with advantage A:

    loss_t = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta * k3_t
    k3_t   = exp(ref_t - logp_t) - 1 - (ref_t - logp_t)

The sum is divided by *global* counts, those of the whole update (all micro-batches, all ranks), so
the gradient does not depend on how an update is cut. The published code of RM-R1 takes a mean per
micro-batch instead.

Statistics are sums over tokens divided by the tokens of the update: over its micro-batches they
add up to its means. `ratio_max` and `ratio_min` are extremes, `nonfinite` counts tokens whose loss
is NaN or infinite.

Shapes: T packed response tokens, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from rmr1 import _C
from rmr1.kernels.dispatch import choose
from rmr1.kernels.policy_loss_config import PolicyLossConfig, variant
from rmr1.kernels.policy_loss_input import check, sequence_starts, update_counts

__all__ = ["STATS", "PolicyLossConfig", "policy_loss", "reference", "variant"]

# exp of a larger log-ratio says only "far off"; the clamp keeps it finite.
_LIMIT = 20.0
# What every implementation returns beside the loss, in this order.
STATS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "kl",
    "ratio_mean",
    "ratio_max",
    "ratio_min",
    "logprob_mismatch",
    "correction_mean",
    "nonfinite",
)
_EXTREMES_AND_COUNTS = ("ratio_max", "ratio_min", "nonfinite")


def reference(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    ids: Tensor,
    weights: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch: loss (autograd), and the sums of STATS, [9].

    `weights` [S] is what a token of each sequence counts in the loss.
    """
    a = advantages.to(logprobs.dtype)[ids]  # [T]
    d = logprobs - old
    if config.ratio == "sequence":
        d = _sequence_mean(d, ids, len(advantages))[ids]
    ratio = d.clamp(-_LIMIT, _LIMIT).exp()
    held = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.objective == "cispo":
        policy = -held.detach() * a * logprobs
    else:
        policy = -torch.minimum(ratio * a, held * a)
        if config.dual_clip is not None:
            policy = torch.where(a < 0, torch.minimum(policy, -config.dual_clip * a), policy)
    correction = torch.ones_like(ratio)
    if rollout is not None:
        correction = _correction(old - rollout, ids, len(advantages), config)
    per_token = correction * policy
    kl = torch.zeros_like(ratio)
    if ref is not None:
        kl = _kl(ref - logprobs, config)
        per_token = per_token + config.beta * kl
    per_token = per_token * weights.to(logprobs.dtype)[ids]
    low = (ratio < 1 - config.clip_low) & (a < 0)
    high = (ratio > 1 + config.clip_high) & (a > 0)
    apart = torch.zeros_like(ratio) if rollout is None else (old - rollout).abs()
    bad = ~torch.isfinite(per_token)
    sums = [low.sum(), high.sum(), kl.sum(), ratio.sum(), *_extremes(ratio), apart.sum()]
    sums += [correction.sum(), bad.sum()]
    return per_token.sum(), torch.stack([one.detach().double() for one in sums])


def _sequence_mean(values: Tensor, ids: Tensor, sequences: int) -> Tensor:
    counts = torch.bincount(ids, minlength=sequences).clamp(min=1)
    return values.new_zeros(sequences).index_add(0, ids, values) / counts  # [S]


def _correction(apart: Tensor, ids: Tensor, sequences: int, config: PolicyLossConfig) -> Tensor:
    low, high = config.correction_low, config.correction_high
    w = apart.clamp(-_LIMIT, _LIMIT).exp()
    if config.correction == "truncate":
        return w.clamp(max=high)
    if config.correction == "mask":
        return torch.where((w < low) | (w > high), 0.0, w)  # NaN stays, and shows in the loss
    if config.correction == "mask_sequence":
        whole = _sequence_mean(apart, ids, sequences).exp()[ids]
        keep = torch.where(whole.isnan(), whole, 1.0)
        return torch.where((whole < low) | (whole > high), 0.0, keep)
    return torch.ones_like(apart)


def _kl(d: Tensor, config: PolicyLossConfig) -> Tensor:
    d = d.clamp(-_LIMIT, _LIMIT)
    if config.kl == "k1":
        return -d
    return 0.5 * d.square() if config.kl == "k2" else d.exp() - 1 - d


def _extremes(ratio: Tensor) -> tuple[Tensor, Tensor]:
    if not ratio.numel():
        return ratio.new_zeros(()), ratio.new_full((), torch.inf)
    return ratio.max(), ratio.min()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    config: PolicyLossConfig,
    token_count: int | None = None,
    sequence_count: int | None = None,
    sequence_lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of packed response tokens.

    Args:
        logprobs, old_logprobs: [T], of the policy as it is and as it was when the update began.
            Computed in fp32, or in fp64 when `logprobs` is that.
        advantages: [S], one a sequence.
        sequence_ids: [T] int64 into advantages, in non-decreasing order.
        ref_logprobs: [T], of the reference model; needed when beta > 0.
        rollout_logprobs: [T], of the generator; needed by a correction, and measured against
            `old_logprobs` as `logprob_mismatch`.
        config: the objective; `variant("dapo")` gives a published one.
        token_count: response tokens of the whole update; default T.
        sequence_count: sequences of it, for normalize "sequence" and "fixed"; default S.
        sequence_lengths: [S] response tokens of each whole sequence, for normalize "sequence";
            default what is here. Needed when a call sees parts of sequences.

    Returns:
        The loss, a scalar, differentiable once in logprobs and in nothing else; and statistics,
        scalars by TRL's names, `kl` only with ref_logprobs, `logprob_mismatch` and
        `correction_mean` only with rollout_logprobs.

    Raises:
        ValueError: shapes, devices, ids or counts that cannot be meant, or a missing input.
    """
    others = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    others["rollout_logprobs"] = rollout_logprobs
    check(logprobs, advantages, sequence_ids, others, config)
    logprobs = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    tokens, sequences = update_counts(
        token_count, sequence_count, sequence_lengths, advantages, len(logprobs)
    )
    starts = sequence_starts(sequence_ids, len(advantages))  # [S + 1]
    lengths = starts.diff() if sequence_lengths is None else sequence_lengths
    weights = _weights(lengths, tokens, sequences, config).to(logprobs.dtype)
    backend = choose("policy_loss", logprobs, native=logprobs.dtype == torch.float32)
    if backend == "reference":
        loss, sums = reference(
            logprobs, old_logprobs, advantages, sequence_ids, weights, ref_logprobs,
            rollout_logprobs, config,
        )  # fmt: skip
    else:
        loss, _, sums = _op(
            logprobs, old_logprobs.float(), advantages.float(), sequence_ids, starts, weights,
            _float(ref_logprobs), _float(rollout_logprobs), _settings(config), backend,
        )  # fmt: skip
    return loss, _named(sums, max(tokens, 1), ref_logprobs is not None, rollout_logprobs)


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()


def _weights(lengths: Tensor, tokens: int, sequences: int, config: PolicyLossConfig) -> Tensor:
    """What a token of each sequence counts, fp64 [S]; `lengths` [S] are those of the update."""
    if config.normalize == "sequence":
        return 1 / (lengths.clamp(min=1).double() * max(sequences, 1))
    each = 1 / max(tokens, 1)
    if config.normalize == "fixed":
        assert config.max_length is not None
        each = 1 / (max(sequences, 1) * config.max_length)
    return torch.full_like(lengths, each, dtype=torch.float64)


def _settings(config: PolicyLossConfig) -> list[float]:
    """PolicySettings of csrc/policy_loss.h, field by field; the Triton kernel takes the same."""
    return [
        config.ratio == "sequence",
        config.objective == "cispo",
        1 - config.clip_low,
        1 + config.clip_high,
        config.dual_clip or 0.0,
        config.beta,
        int(config.kl[1]),
        ("none", "truncate", "mask", "mask_sequence").index(config.correction),
        config.correction_low,
        config.correction_high,
    ]


def _named(sums: Tensor, tokens: int, ref: bool, rollout: Tensor | None) -> dict[str, Tensor]:
    stats = {
        name: value if name in _EXTREMES_AND_COUNTS else value / tokens
        for name, value in zip(STATS, sums.unbind(), strict=True)
    }
    if not ref:
        del stats["kl"]
    if rollout is None:
        del stats["logprob_mismatch"], stats["correction_mean"]
    return stats


@custom_op("rmr1::policy_loss", mutates_args=())
def _op(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    ids: Tensor,
    starts: Tensor,
    weights: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    settings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its slope in every log-probability [T], and the sums of STATS, fp64 [9]."""
    if backend == "triton":
        from rmr1.kernels import policy_loss_triton

        return policy_loss_triton.policy_loss(
            logprobs, old, advantages, ids, starts, weights, ref, rollout, settings
        )
    slope = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    loss, *sums = _C.policy_loss(
        logprobs.contiguous(),
        old.contiguous(),
        None if ref is None else ref.contiguous(),
        None if rollout is None else rollout.contiguous(),
        starts,
        advantages.contiguous(),
        weights,
        settings,
        slope,
    )
    return torch.tensor(loss), slope, torch.tensor(sums, dtype=torch.float64)


@_op.register_fake
def _(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    ids: Tensor,
    starts: Tensor,
    weights: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    settings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logprobs.new_empty((), dtype=torch.float32),
        torch.empty_like(logprobs),
        logprobs.new_empty(len(STATS), dtype=torch.float64),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])


@once_differentiable
def _differentiate(ctx: Any, on_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    return (on_loss * slope, *[None] * 9)


_op.register_autograd(_differentiate, setup_context=_save)
