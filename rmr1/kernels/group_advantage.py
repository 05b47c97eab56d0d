"""Group advantage: how much better each sample did than the other samples of its prompt.

    A_i = R_i - mean(R)                      baseline "mean"   (GRPO)
    A_i = R_i - mean of the others           baseline "loo"    (RLOO; = (R_i - mean) n / (n - 1))
    A_i / (std(R) + eps)                     scale "std"       (unbiased std; "none": Dr.GRPO)

A group of one, and a group of equal rewards, has advantage exactly 0.
Source: DeepSeekMath (arXiv 2402.03300) for GRPO, Ahmadian et al. (arXiv 2402.14740) for RLOO,
Liu et al. (arXiv 2503.20783) for the version without std.

Shapes: N samples, P groups, T packed tokens of the samples.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.library import custom_op

from rmr1 import _C
from rmr1.kernels.dispatch import choose

EPS = 1e-4  # TRL's value

Scale = Literal["std", "none"]
Baseline = Literal["mean", "loo"]


def reference(rewards: Tensor, group_ids: Tensor, scale: Scale, baseline: Baseline) -> Tensor:
    """The op in plain torch: [N] and [N] -> [N]."""
    # P is at most N, and how many groups there really are would break a traced graph.
    groups = len(rewards)
    index = (group_ids != group_ids.roll(1)).cumsum(0)  # counts the first sample, whose
    index = index - index[:1]  # neighbour is the last one, as a change unless there is one group
    count = _group_sum(torch.ones_like(rewards), index, groups)  # [P], 0 past the last group
    mean = _group_sum(rewards, index, groups) / count
    centred = rewards - mean[index]
    variance = _group_sum(centred.square(), index, groups) / (count - 1).clamp(min=1)
    # Rounding in the mean must not turn a group of equal rewards into a direction.
    low = rewards.new_full((groups,), torch.inf).scatter_reduce(0, index, rewards, "amin")
    high = rewards.new_full((groups,), -torch.inf).scatter_reduce(0, index, rewards, "amax")
    centred = torch.where((low == high)[index], 0.0, centred)
    if baseline == "loo":
        centred = centred * (count / (count - 1).clamp(min=1))[index]
    return centred if scale == "none" else centred / (variance.sqrt() + EPS)[index]


def _group_sum(values: Tensor, index: Tensor, groups: int) -> Tensor:
    return values.new_zeros(groups).index_add(0, index, values)  # [P]


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: Scale = "std",
    baseline: Baseline = "mean",
    token_counts: Tensor | None = None,
) -> Tensor:
    """Advantages of samples within their groups.

    Args:
        rewards: [N] float.
        group_ids: [N] int64 in non-decreasing order: a group's samples stand together.
        scale: "std" divides by the group's standard deviation.
        baseline: "mean" of the group, or "loo": of the others.
        token_counts: [N] int64, how many packed tokens each sample has; then every token gets the
            advantage of its sample, in the same launch.

    Returns:
        [N] fp32, or with `token_counts` [T] fp32 with T their sum. No gradient.

    Raises:
        ValueError: shapes, order, devices, counts or options that cannot be meant, or a reward
            that is not finite.
    """
    _check(rewards, group_ids, token_counts, scale, baseline)
    rewards = rewards.detach().float()
    backend = choose("group_advantages", rewards, native=True)
    total = None if token_counts is None else int(token_counts.sum())
    if backend == "reference":
        if not torch.compiler.is_compiling():
            _check_values(rewards, group_ids, token_counts)
        advantages = reference(rewards, group_ids, scale, baseline)
        if token_counts is None:
            return advantages
        return advantages.repeat_interleave(token_counts, output_size=total)
    return _op(rewards, group_ids, scale == "std", baseline == "loo", token_counts, total, backend)


@custom_op("rmr1::group_advantages", mutates_args=())
def _op(
    rewards: Tensor,
    group_ids: Tensor,
    divide_by_std: bool,
    leave_one_out: bool,
    token_counts: Tensor | None,
    total: int | None,
    backend: str,
) -> Tensor:
    """`total` is the number of tokens, None without token_counts."""
    _check_values(rewards, group_ids, token_counts)
    _, sizes = torch.unique_consecutive(group_ids, return_counts=True)
    offsets = _offsets(sizes)  # [P + 1]
    tokens = None if token_counts is None else _offsets(token_counts)  # [N + 1]
    out = rewards.new_empty(len(rewards) if total is None else total)
    rewards = rewards.contiguous()
    if backend == "triton":
        from rmr1.kernels import group_advantage_triton

        group_advantage_triton.group_advantages(
            rewards, offsets, divide_by_std, leave_one_out, tokens, out, EPS
        )
    else:
        _C.group_advantages(rewards, offsets, divide_by_std, leave_one_out, tokens, out, EPS)
    return out


@_op.register_fake
def _(
    rewards: Tensor,
    group_ids: Tensor,
    divide_by_std: bool,
    leave_one_out: bool,
    token_counts: Tensor | None,
    total: int | None,
    backend: str,
) -> Tensor:
    return rewards.new_empty(len(rewards) if total is None else total)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _check(
    rewards: Tensor, group_ids: Tensor, token_counts: Tensor | None, scale: str, baseline: str
) -> None:
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards and group_ids must be two vectors of one length, got shapes"
            f" {tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    for name, value, known in (
        ("scale", scale, get_args(Scale)),
        ("baseline", baseline, get_args(Baseline)),
    ):
        if value not in known:
            raise ValueError(f'{name} must be "{known[0]}" or "{known[1]}", got {value!r}')
    for name, ids in (("group_ids", group_ids), ("token_counts", token_counts)):
        if ids is None:
            continue
        if ids.dtype != torch.int64 or ids.shape != rewards.shape:
            raise ValueError(
                f"{name} must be {len(rewards)} integers (int64), got {ids.dtype} of shape"
                f" {tuple(ids.shape)}"
            )
        if ids.device != rewards.device:
            raise ValueError(f"{name} must be on {rewards.device}, got {ids.device}")


def _check_values(rewards: Tensor, group_ids: Tensor, token_counts: Tensor | None) -> None:
    """Inside the op: a look at the values would break a traced graph."""
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards must be finite, got NaN or inf")
    if bool((group_ids[1:] < group_ids[:-1]).any()):
        raise ValueError("group_ids must not decrease: keep a group's samples together")
    if token_counts is not None and bool((token_counts < 0).any()):
        raise ValueError(f"token_counts must not be negative, got {int(token_counts.min())}")
