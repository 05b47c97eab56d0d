"""Which weights a generator computes with: whatever it has cached is valid for these alone.

Whoever writes to a parameter in a way that torch notices is found by the parameters' version
counters, at every step. DeepSpeed and others write through `.data`, past the counters; so at the
beginning of every call the contents themselves are compared, by a checksum of every tensor: once
through the weights, about what a step of decoding reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rmr1 import _C

# Words of a GPU's tensor that are summed at a time: with five vectors of as many, in 40 MB.
_PIECE = 1 << 21


def checksum(tensor: Tensor) -> int:
    """64 bits that another content, or the same words in other places, would change; the same on
    every device. What is not contiguous is copied first.
    """
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.device.type == "cpu":
        return _C.checksum(raw, torch.get_num_threads())
    return _torch_checksum(raw)


def _torch_checksum(raw: Tensor) -> int:
    """csrc/checksum.cpp in plain torch, where int32 wraps as uint32 does: raw is [bytes] uint8.

    Sums stay on a GPU until the end, the one place that waits for it.
    """
    count = raw.numel() // 4
    low = torch.arange(min(count, _PIECE), dtype=torch.int32, device=raw.device)
    high = low * _int32(0x9E3779B2) + 1
    low.mul_(2).add_(1)
    sums = torch.zeros(2, dtype=torch.int32, device=raw.device)
    for first in range(0, count, _PIECE):
        piece = raw[4 * first : 4 * min(count, first + _PIECE)]
        if piece.storage_offset() % 4:  # a view into a flat buffer: no place for whole words
            piece = piece.clone()
        words = piece.view(torch.int32)
        mixed = (words >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(words)
        sums[0] += torch.mul(words, low[: len(words)]).sum(dtype=torch.int32)
        sums[1] += mixed.mul_(high[: len(words)]).sum(dtype=torch.int32)
        low += 2 * _PIECE  # on to the next piece's places
        high += _int32(0x9E3779B2 * _PIECE)
    below, above = (x & 0xFFFFFFFF for x in sums.tolist())
    rest = int.from_bytes(bytes(raw[4 * count :].tolist()), "big")
    return ((above << 32 | below) + rest * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)


def _int32(x: int) -> int:
    """The int32 of the same lowest 32 bits."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


class WeightsVersion:
    """Counts the changes of a model's weights that it notices or is told of."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.number = 0
        self._marks = self._read_marks()
        self._sums: list[int] | None = None  # read when they are first asked for

    def _read_marks(self) -> list[tuple[int, int]]:
        # Inference tensors have no counter; the checksum finds their changes.
        return [
            (p.data_ptr(), -1 if p.is_inference() else p._version) for p in self._model.parameters()
        ]

    def touched(self) -> bool:
        """Whether torch knows of a write, or of other memory; then the number is a new one."""
        if self._read_marks() == self._marks:
            return False
        self.bump()
        return True

    def changed(self) -> bool:
        """Whether the weights differ from those of the last look, however they were written."""
        if self.touched():
            return True
        sums, before = self._read_sums(), self._sums
        self._sums = sums
        if before is None or sums == before:
            return False
        self.number += 1
        return True

    def bump(self) -> None:
        """The weights have changed: the caller says so."""
        self._marks, self._sums = self._read_marks(), self._read_sums()
        self.number += 1

    def _read_sums(self) -> list[int]:
        return [checksum(parameter) for parameter in self._model.parameters()]


@torch.no_grad()
def copy_weights(
    model: nn.Module, source: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> None:
    """Copy whole tensors into a model's parameters, one at a time, and verify each by checksum.

    `source` may be a generator that gathers a sharded tensor when it is asked for the next one. A
    mapping is checked before anything is copied; what such a generator lacks is seen at its end.

    Raises:
        ValueError: names that the model lacks or the source does, other shapes, or a copy that does
            not hold what the source held. Some tensors may have been copied by then, but none of
            a mapping that does not fit.
    """
    targets = dict(model.named_parameters())
    if isinstance(source, Mapping):
        check_source(model, source)
        source = source.items()
    copied: dict[str, Tensor] = {}
    for name, tensor in source:
        target = _target(targets, copied, name, tensor)
        if target is not None:
            copied[name] = target
            _copy(name, target, tensor)
    _check_complete(targets, copied)


def check_source(model: nn.Module, source: Mapping[str, Tensor]) -> None:
    """Raise ValueError where `copy_weights` would, for names and shapes."""
    targets = dict(model.named_parameters())
    for name, tensor in source.items():
        _target(targets, source, name, tensor)
    _check_complete(targets, source)


def _copy(name: str, target: nn.Parameter, tensor: Tensor) -> None:
    if _same_memory(target, tensor):
        return
    if target.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        tensor = tensor.clone()  # another view of the same memory: not read while it is written
    target.copy_(tensor)
    if checksum(target) != checksum(tensor.to(target.device, target.dtype)):
        raise ValueError(
            f"sync: {name} differs from its source after the copy; something writes to the weights"
            " while they are being copied."
        )


def _target(
    targets: dict[str, nn.Parameter], source: Mapping[str, Tensor], name: str, tensor: Tensor
) -> nn.Parameter | None:
    target = targets.get(name)
    if target is None and name == "lm_head.weight":
        # Hugging Face lists a tied head under both of its names.
        embedding = source.get("model.embed_tokens.weight")
        if embedding is not None and checksum(embedding) != checksum(tensor):
            raise ValueError(
                "sync: the source's lm_head.weight is not its embedding, and the model's head is"
                " tied to it; load a model whose config says tie_word_embeddings = false."
            )
        return None
    if target is None or target.shape != tensor.shape:
        wanted = "has no such parameter" if target is None else f"needs {list(target.shape)}"
        raise ValueError(f"sync: {name} is {list(tensor.shape)}, and the model {wanted}.")
    return target


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.stride(), a.dtype) == (b.data_ptr(), b.stride(), b.dtype)


def _check_complete(targets: dict[str, nn.Parameter], names: Iterable[str]) -> None:
    missing = sorted(set(targets) - set(names))
    if missing:
        some = ", ".join(missing[:4])
        raise ValueError(f"sync: the source lacks {len(missing)} parameters, among them {some}.")
