"""The compile gate: every Triton kernel passes it, and it fails what it is there to fail.

In processes of their own: this one may run the kernels in the interpreter.
"""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(*args: str, timeout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, timeout=timeout
    )


PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@pytest.mark.parametrize(
    "chips",
    [("sm_90", "gfx942"), pytest.param(("sm_80", "sm_100"), marks=pytest.mark.slow)],
)
def test_every_kernel_passes_in_its_first_configuration(chips: tuple[str, ...]) -> None:
    done = run("-m", "rmr1.kernels.compile_gate", "--quick", "--chips", *chips, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "none fails" in done.stderr
    for chip in PRODUCTS:
        rows = [line for line in done.stdout.splitlines() if f"| {chip} |" in line]
        assert any(PRODUCTS[chip] in line for line in rows) == (chip in chips)


@pytest.mark.slow
def test_every_kernel_passes_in_every_configuration() -> None:
    done = run("-m", "rmr1.kernels.compile_gate", timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]


FAULTY = """
from dataclasses import replace
from rmr1.kernels import compile_gate as gate  # before triton: it turns the interpreter off
import triton
case = next(c for c in gate.cases("token_logprob") if c.matmul)
big = triton.Config({"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_H": 64}, num_warps=8, num_stages=3)
faults = gate._compile(case, big, gate.CHIPS[1]).faults()
assert faults and "spills" in faults[0], faults
without = triton.Config({"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 32}, num_warps=4, num_stages=2)
faults = gate._compile(case, without, gate.CHIPS[1]).faults()
assert any("no HGMMA" in fault for fault in faults), faults
unaligned = replace(case, aligned=())
faults = gate._compile(unaligned, case.kernel.configs[0], gate.CHIPS[0]).faults()
assert any("128-bit" in fault for fault in faults), faults
deep = triton.Config({"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 128}, num_warps=8, num_stages=5)
faults = gate._compile(case, deep, gate.CHIPS[3]).faults()
assert any("shared memory" in fault for fault in faults), faults
"""


def test_it_fails_spills_no_tensor_cores_narrow_loads_and_too_much_shared_memory() -> None:
    done = run("-c", FAULTY, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
