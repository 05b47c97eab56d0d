"""What is said of a Triton kernel beside its code: launch configurations for `triton.autotune`, and
the types that the compile gate (rmr1/kernels/compile_gate.py) compiles it for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from rmr1.kernels.dispatch import interpreted as in_interpreter

# What an entry names besides the kernel's own constants.
_OPTIONS = ("num_warps", "num_stages")


def configs(*entries: dict[str, int], interpreted: dict[str, int]) -> list[triton.Config]:
    """One configuration an entry; in the interpreter, which cannot time anything, the one that is
    named for it.
    """
    if in_interpreter():
        return [triton.Config(interpreted)]
    return [_config(entry) for entry in entries]


def _config(entry: dict[str, int]) -> triton.Config:
    options: dict[str, Any] = {name: entry[name] for name in _OPTIONS if name in entry}
    constants = {name: value for name, value in entry.items() if name not in _OPTIONS}
    return triton.Config(constants, **options)


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel with the types of its arguments.

    `types` maps argument names to Triton's type names ("*bf16", "i32"); what it does not name is a
    constant, from `constants` or from the configuration. `aligned` are multiples of 16 bytes or
    elements.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    matmul: bool = False
    streams: bool = True
    # For a kernel without configurations to choose from.
    warps: int = 4
