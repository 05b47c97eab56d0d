"""Which weights a generator computes with: whatever it has cached is valid for these alone.

Whoever writes to a parameter in a way that torch notices is found by the parameters' version
counters. DeepSpeed and others write through `.data`, past the counters; so before anything cached
in an earlier call is used again, the contents themselves are compared, by a checksum a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

# What a tensor's bytes are summed as, by their size.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bits, read as integers, modulo 2^64: equal for equal contents."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


class WeightsVersion:
    """Counts the changes of a model's weights that it notices or is told of."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.number = 0
        self._marks = self._read_marks()
        self._sums: list[int] | None = None

    def _read_marks(self) -> list[tuple[int, int]]:
        # Inference tensors have no counter; the checksum finds their changes.
        return [
            (p.data_ptr(), -1 if p.is_inference() else p._version) for p in self._model.parameters()
        ]

    def touched(self) -> bool:
        """Whether torch knows of a write, or of other memory; then the number is a new one."""
        marks = self._read_marks()
        if marks == self._marks:
            return False
        self._marks, self._sums = marks, None
        self.number += 1
        return True

    def remember(self) -> None:
        """Take the checksums of now, for `changed` to compare with."""
        self._sums = self._read_sums()

    def changed(self) -> bool:
        """Whether the weights differ from those at `remember`, however they were written."""
        if self.touched():
            return True
        if self._sums == self._read_sums():
            return False
        self._sums = None
        self.number += 1
        return True

    def bump(self) -> None:
        """The weights have changed: the caller says so."""
        self._marks, self._sums = self._read_marks(), None
        self.number += 1

    def _read_sums(self) -> list[int]:
        return [checksum(parameter) for parameter in self._model.parameters()]


@torch.no_grad()
def copy_weights(
    model: nn.Module, source: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> int:
    """Copy whole tensors into a model's parameters, one at a time, and verify each by checksum.

    `source` may be a generator that gathers a sharded tensor when it is asked for the next one.

    Returns:
        The number of tensors copied.

    Raises:
        ValueError: names that the model lacks or the source does, other shapes, or a copy that does
            not hold what the source held.
    """
    targets = dict(model.named_parameters())
    missing = set(targets)
    for name, tensor in source.items() if isinstance(source, Mapping) else source:
        target = targets.get(name)
        if target is None and name == "lm_head.weight":
            continue  # Hugging Face lists a tied head under both of its names
        if target is None or target.shape != tensor.shape:
            wanted = "no such parameter" if target is None else list(target.shape)
            raise ValueError(f"sync: {name} is {list(tensor.shape)} and the generator's {wanted}.")
        missing.discard(name)
        if target.data_ptr() == tensor.data_ptr():
            continue
        target.copy_(tensor)
        if checksum(target) != checksum(tensor.to(target.device, target.dtype)):
            raise ValueError(
                f"sync: {name} differs from its source after the copy; something writes to the"
                " weights while they are being copied."
            )
    if missing:
        some = ", ".join(sorted(missing)[:4])
        raise ValueError(f"sync: the source lacks {len(missing)} parameters, among them {some}.")
    return len(targets)
