"""What the policy loss refuses, and where its sequences begin.

Shapes: T packed response tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from rmr1.kernels.policy_loss_config import PolicyLossConfig


def check(
    logprobs: Tensor,
    advantages: Tensor,
    ids: Tensor,
    others: dict[str, Tensor | None],
    config: PolicyLossConfig,
) -> None:
    """Refuse what cannot be meant, as far as it shows without a look at the values."""
    if logprobs.ndim != 1 or not logprobs.is_floating_point():
        raise ValueError(
            f"logprobs must be a floating vector [T], got {logprobs.dtype} of shape"
            f" {tuple(logprobs.shape)}"
        )
    for name, value in {**others, "sequence_ids": ids}.items():
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(
                f"{name} must have the shape of logprobs {tuple(logprobs.shape)}, got"
                f" {tuple(value.shape)}"
            )
        if value is not None and value.device != logprobs.device:
            raise ValueError(f"{name} must be on {logprobs.device}, got {value.device}")
    if advantages.ndim != 1 or advantages.device != logprobs.device:
        raise ValueError(
            f"advantages must be a vector [S] on {logprobs.device}, got shape"
            f" {tuple(advantages.shape)} on {advantages.device}"
        )
    for name, value in {**others, "advantages": advantages}.items():
        if value is not None and not value.is_floating_point():
            raise ValueError(f"{name} must be floating, got {value.dtype}")
    if ids.dtype != torch.int64:
        raise ValueError(f"sequence_ids must be int64, got {ids.dtype}")
    if config.beta > 0 and others["ref_logprobs"] is None:
        raise ValueError("ref_logprobs is needed when beta > 0; give it or set beta to 0")
    if config.correction != "none" and others["rollout_logprobs"] is None:
        raise ValueError(
            f"rollout_logprobs is needed by correction {config.correction!r}; give it or set"
            " correction to none"
        )


def update_counts(
    tokens: int | None,
    sequences: int | None,
    lengths: Tensor | None,
    advantages: Tensor,
    here: int,
) -> tuple[int, int]:
    """Tokens and sequences of the whole update, by default what is here: `here` tokens.

    ValueError for counts or lengths that no such update has.
    """
    tokens = here if tokens is None else tokens
    sequences = len(advantages) if sequences is None else sequences
    for name, count in (("token_count", tokens), ("sequence_count", sequences)):
        if count < 0 or (count == 0 and here > 0):
            raise ValueError(f"{name} must be above 0, got {count}")
    if lengths is not None and (
        lengths.shape != advantages.shape
        or lengths.device != advantages.device
        or lengths.dtype != torch.int64
    ):
        raise ValueError(
            f"sequence_lengths must be int64 of the shape of advantages"
            f" {tuple(advantages.shape)} on {advantages.device}, got {lengths.dtype} of shape"
            f" {tuple(lengths.shape)} on {lengths.device}"
        )
    return tokens, sequences


def sequence_starts(ids: Tensor, sequences: int) -> Tensor:
    """Where each sequence begins, and where the last one ends, int64 [S + 1].

    ValueError for ids out of order or out of range.
    """
    # In a traced graph the look at the values has to be an op; outside of one that only costs.
    return _op(ids, sequences) if torch.compiler.is_compiling() else _starts(ids, sequences)


@custom_op("rmr1::sequence_starts", mutates_args=())
def _op(ids: Tensor, sequences: int) -> Tensor:
    return _starts(ids, sequences)


@_op.register_fake
def _(ids: Tensor, sequences: int) -> Tensor:
    return ids.new_empty(sequences + 1)


def _starts(ids: Tensor, sequences: int) -> Tensor:
    if ids.numel():
        falls = (ids[1:] < ids[:-1]).any().long()
        falls, low, high = torch.stack([falls, ids[0], ids[-1]]).tolist()  # one wait for the GPU
        if falls:
            raise ValueError(
                "sequence_ids must not decrease: the tokens of a sequence stand together"
            )
        if low < 0 or high >= sequences:
            raise ValueError(
                f"sequence_ids must lie in 0..{sequences - 1} (one per advantage), got"
                f" {low}..{high}"
            )
    # A bincount would look at the ids again, and wait for the GPU to do so.
    return torch.searchsorted(ids.contiguous(), torch.arange(sequences + 1, device=ids.device))
