"""Named tensors in safetensors files of bounded size, written and read one at a time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 1024**3


def write_tensors(
    named: Iterable[tuple[str, Tensor]],
    path_of: Callable[[int], Path],
    *,
    max_bytes: int = SHARD_BYTES,
) -> list[dict[str, int]]:
    """Write tensors, in order, to files of at most `max_bytes` (or one tensor).

    At most one file's tensors are held at a time. `path_of` says where file number 0, 1, ... goes.

    Returns:
        Of each file the names in it with their bytes; one empty file where there are no tensors.

    Raises:
        OSError: the disk is full or not writable.
    """
    files: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if held and size + tensor.nbytes > max_bytes:
            files.append(_write(path_of(len(files)), held))
            held, size = {}, 0
        kept = tensor.detach().cpu().contiguous()
        # Gathered tensors are gone when the next one comes.
        held[name] = kept.clone() if kept.data_ptr() == tensor.data_ptr() else kept
        size += tensor.nbytes
    files.append(_write(path_of(len(files)), held))
    return files


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, f"cannot write tensors ({error})", str(path)) from error
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, one at a time. OSError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - the reader is no dict
                yield name, reader.get_tensor(name)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
