"""Which implementation of an op runs: one rule for all ops, and a way to force one for a test.

Unasked, CUDA and ROCm tensors go to Triton, CPU tensors to the native kernels where an op has them
(fp64: to the reference), other devices to the reference. `RMR1_KERNELS=reference|native|triton` or
`with use("reference"):` forces one; what cannot run then raises. A CUDA tensor never falls back to
the reference unasked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["reference", "native", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_forced: ContextVar[Backend | None] = ContextVar("rmr1_kernels", default=None)
# The same for torch.compile, which cannot read a context variable but sees a global change.
_forced_in_trace: Backend | None = None


@contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Force one implementation inside the block; it wins over RMR1_KERNELS.

    ValueError when `backend` is none of reference, native, triton. What is forced is taken when an
    op is called; its backward, wherever it runs, uses the same.
    """
    global _forced_in_trace
    token, before = _forced.set(_known(backend, "use()")), _forced_in_trace
    _forced_in_trace = backend
    try:
        yield
    finally:
        _forced_in_trace = before
        _forced.reset(token)


def choose(op: str, x: Tensor, *, native: bool, triton: bool = True) -> Backend:
    """The implementation that runs `op` on `x`; `native` and `triton` say which ones it has."""
    forced = _forced_in_trace if torch.compiler.is_compiling() else _forced.get()
    if forced is None and (named := os.environ.get("RMR1_KERNELS")):
        forced = _known(named, "RMR1_KERNELS")
    if forced is None:
        return _unasked(op, x, native, triton)
    if forced == "native" and not (native and x.device.type == "cpu"):
        why = (
            f"it has no native kernel for {x.dtype}"
            if x.device.type == "cpu"
            else "native runs on the CPU"
        )
        raise ValueError(f"{op}: the native kernels were forced, but {why}; got {x.device}.")
    if forced == "triton":
        _refuse_without_triton(op, x, triton)
    return forced


def forced() -> bool:
    """Whether somebody has chosen the kernels: `use`, or RMR1_KERNELS."""
    return _forced.get() is not None or bool(os.environ.get("RMR1_KERNELS"))


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _known(name: str, where: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{where}: the kernels are {', '.join(BACKENDS)}, got {name!r}.")
    return name  # type: ignore[return-value]


def _unasked(op: str, x: Tensor, native: bool, triton: bool) -> Backend:
    if x.device.type == "cuda":
        if not triton or x.dtype == torch.float64:
            raise ValueError(
                f"{op}: there is no Triton kernel for {x.dtype}; cast the tensor, or ask for the"
                " slow reference with RMR1_KERNELS=reference."
            )
        return "triton"
    return "native" if native and x.device.type == "cpu" else "reference"


def _refuse_without_triton(op: str, x: Tensor, triton: bool) -> None:
    if not triton or x.dtype == torch.float64:
        raise ValueError(f"{op}: Triton was forced, but there is no kernel for {x.dtype}.")
    if x.device.type == "cuda":
        return
    if not interpreted():
        raise ValueError(
            f"{op}: Triton was forced, but the tensors are on {x.device}; move them to a GPU, or"
            " set TRITON_INTERPRET=1 before the start to run the kernels in the interpreter."
        )
    if x.dtype != torch.float32:  # the interpreter's dot multiplies the bit patterns of bf16
        raise ValueError(f"{op}: Triton's interpreter is right in float32 only, got {x.dtype}.")
