"""How flash-attn is called, and when: by functions that do what its documentation says, since it
runs on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels import dispatch, paged_attention_flash
from rmr1.kernels.dispatch import use
from rmr1.kernels.paged_attention import paged_attention


def arguments(contexts: list[int], counts: list[int], block_size: int) -> list[Tensor]:
    """Of `paged_attention`, with a contiguous cache."""
    q = torch.randn(sum(counts), 6, 8)
    tables = torch.randperm(2 * len(contexts), dtype=torch.int32).view(-1, 2)
    caches = torch.randn(2, tables.numel(), block_size, 2, 8)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return [q, *caches, tables, torch.tensor(contexts).int(), starts]


def varlen(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
) -> Tensor:
    """flash_attn_varlen_func: contexts as starts of the keys, though these are paged."""
    contexts = key_starts.diff()
    assert causal
    assert key_starts.dtype == torch.int32
    assert max_seqlen_q > 1  # else it takes the rows for the sequences
    assert contexts.max() <= max_seqlen_k
    with use("reference"):
        return paged_attention(
            q, keys, values, block_table, contexts, starts,
            longest_query=max_seqlen_q, scale=softmax_scale,
        )  # fmt: skip


def with_kvcache(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """flash_attn_with_kvcache: q [S, 1, N, D]."""
    assert causal
    assert q.shape[1] == 1
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    with use("reference"):
        return paged_attention(
            q[:, 0], keys, values, block_table, cache_seqlens, starts,
            longest_query=1, scale=softmax_scale,
        )[:, None]  # fmt: skip


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 1], [1, 6, 1]])
def test_how_it_is_called(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_flash, "functions", lambda: (with_kvcache, varlen))
    args = arguments([300, 6, 0], counts, 256)
    longest = max(counts)
    out = paged_attention_flash.attend(*args, longest_query=longest, scale=0.3)
    with use("reference"):
        wanted = paged_attention(*args, longest_query=longest, scale=0.3)
    assert torch.equal(out, wanted)
    assert wanted.abs().max() > 0.1


class Described:
    """What `suits` asks of a tensor."""

    def __init__(self, shape: list[int], dtype: torch.dtype, device: str = "cuda") -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)

    def stride(self, axis: int) -> int:
        return 1

    def __len__(self) -> int:
        return self.shape[0]


@pytest.mark.parametrize(
    ("dtype", "block_size", "dim", "device", "chip", "fits"),
    [
        (torch.bfloat16, 256, 128, "cuda", (9, 0), True),
        (torch.float16, 512, 64, "cuda", (8, 0), True),
        (torch.bfloat16, 16, 128, "cuda", (9, 0), False),
        (torch.float32, 256, 128, "cuda", (9, 0), False),
        (torch.bfloat16, 256, 20, "cuda", (9, 0), False),
        (torch.bfloat16, 256, 264, "cuda", (9, 0), False),
        (torch.bfloat16, 256, 128, "cuda", (7, 5), False),
        (torch.bfloat16, 256, 128, "cpu", (9, 0), False),
    ],
)
def test_what_suits_it(
    dtype: torch.dtype,
    block_size: int,
    dim: int,
    device: str,
    chip: tuple[int, int],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_attention_flash, "functions", lambda: (with_kvcache, varlen))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: chip)
    monkeypatch.setattr(torch.version, "hip", None)
    q: Any = Described([3, 28, dim], dtype, device)
    cache: Any = Described([7, block_size, 4, dim], dtype, device)
    assert paged_attention_flash.suits(q, cache) == fits
    monkeypatch.setattr(paged_attention_flash, "functions", lambda: None)
    assert not paged_attention_flash.suits(q, cache)


def test_it_is_chosen_unasked_and_not_when_triton_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments([5], [1], 4)
    args[4] = torch.tensor([5]).int()
    chosen = torch.ones(())
    monkeypatch.delenv("RMR1_KERNELS", raising=False)
    monkeypatch.setattr(paged_attention_flash, "suits", lambda *_: True)
    monkeypatch.setattr(paged_attention_flash, "attend", lambda *_, **__: chosen)
    with use("triton"):
        assert paged_attention(*args, longest_query=1) is not chosen
    monkeypatch.setattr(dispatch, "_unasked", lambda *_: "triton")  # as on a GPU
    assert paged_attention(*args, longest_query=1) is chosen
    monkeypatch.setenv("RMR1_KERNELS", "triton")
    assert paged_attention(*args, longest_query=1) is not chosen
