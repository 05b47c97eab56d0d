"""Compiles every Triton kernel ahead of time for four GPUs, and reads from the binaries whether
they are what they should be. No GPU is needed.

    python -m rmr1.kernels.compile_gate [--only token_logprob] [--quick] [--write docs/kernels.md]

Each kernel is compiled in every configuration that autotuning may choose, with the alignment that
torch's allocations have. A binary fails when it spills registers, uses more shared memory than the
chip has, multiplies matrices without tensor cores, computes in fp64, or streams in loads of less
than 128 bits. What this cannot see: wrong results, races, and speed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

# Whoever runs the interpreter compiles nothing.
os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmr1.kernels.tuning import Case

# Every file with Triton kernels; each has CASES.
MODULES = (
    "group_advantage_triton",
    "kv_store_triton",
    "paged_attention_triton",
    "policy_loss_triton",
    "rmsnorm_triton",
    "rope_triton",
    "sample_triton",
    "swiglu_triton",
    "token_logprob_triton",
    "token_loss_triton",
)
BEGIN, END = "<!-- compile gate: begin -->", "<!-- compile gate: end -->"


@dataclass(frozen=True, slots=True)
class Chip:
    """A GPU to compile for: its shared memory per program, and its matrix instruction."""

    name: str
    target: GPUTarget
    shared_bytes: int
    matrix: str


CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, "HMMA"),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, "HGMMA"),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, "UTCHMMA"),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
)


@dataclass(frozen=True, slots=True)
class Binary:
    """What a compiled kernel turned out to be."""

    case: Case
    config: str
    chip: Chip
    registers: int
    spills: int
    shared: int
    matrix: int
    doubles: int
    wide_loads: int

    def faults(self) -> list[str]:
        """Why this binary must not be shipped; empty when it may."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > self.chip.shared_bytes:
            found.append(f"{self.shared} bytes of shared memory, {self.chip.shared_bytes} there")
        if self.case.matmul and not self.matrix:
            found.append(f"no {self.chip.matrix}")
        if self.doubles:
            found.append(f"{self.doubles} fp64 instructions")
        if self.case.streams and not self.wide_loads:
            found.append("no 128-bit load")
        return [f"{self.case.name} ({self.config}) on {self.chip.name}: {one}" for one in found]


def cases(only: str = "") -> list[Case]:
    """The cases of every module whose name holds `only`."""
    modules = [import_module(f"rmr1.kernels.{name}") for name in MODULES if only in name]
    return [case for module in modules for case in module.CASES]


def compile_all(
    chosen: list[Case], *, quick: bool = False, chips: Sequence[Chip] = CHIPS
) -> Iterator[Binary]:
    """Compile each case for each chip, in each of its configurations; `quick`: in the first, and in
    fp32 only what has no bf16.
    """
    names = {case.name for case in chosen}
    for case in chosen:
        if quick and "fp32" in case.name and case.name.replace("fp32", "bf16") in names:
            continue
        configs = getattr(case.kernel, "configs", [triton.Config({}, num_warps=case.warps)])
        for config in configs[:1] if quick else configs:
            for chip in chips:
                yield _compile(case, config, chip)


def _compile(case: Case, config: triton.Config, chip: Chip) -> Binary:
    kernel = case.kernel.fn if hasattr(case.kernel, "configs") else case.kernel
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={**case.constants, **config.kwargs},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=chip.target, options=options)
    text = " ".join(f"{name.lower()}={value}" for name, value in config.kwargs.items())
    shown = f"{text} warps={config.num_warps} stages={config.num_stages}".strip()
    read = _read_nvidia if chip.target.backend == "cuda" else _read_amd
    # The instructions of sm_90 and sm_100 take 64 rows or more. A kernel with fewer, which a
    # constant ROWS says, multiplies with those that sm_80 has too.
    if chip.target.backend == "cuda" and case.constants.get("ROWS", 64) < 64:
        chip = replace(chip, matrix="HMMA")
    return Binary(case, shown, chip, *read(compiled, chip))


def _read_nvidia(compiled: Any, chip: Chip) -> tuple[int, int, int, int, int, int]:
    """From the cubin, with the disassembler of the triton wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(tool), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = _number(r"REG:(\d+)", usage)
    spills = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    wide = r"\b(?:LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG)"
    return (
        registers,
        spills,
        compiled.metadata.shared,
        _count(rf"\b{chip.matrix}", sass),
        _count(r"\b(?:DADD|DMUL|DFMA|DMNMX|DSETP)\b", sass),
        _count(wide, sass),
    )


def _read_amd(compiled: Any, chip: Chip) -> tuple[int, int, int, int, int, int]:
    """From the assembly, where the compiler wrote its own account."""
    text = compiled.asm["amdgcn"]
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    spills += _number(r"\.sgpr_spill_count:\s+(\d+)", text)
    return (
        _number(r"\.vgpr_count:\s+(\d+)", text),
        spills,
        compiled.metadata.shared,
        _count(chip.matrix, text),
        _count(r"\bv_\w+_f64\b", text),
        _count(r"\b(?:global|buffer)_load_dwordx4\b", text),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"the tools no longer print {pattern}"
    return int(found[1])


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def table(binaries: list[Binary]) -> str:
    """A Markdown table, one row a binary."""
    head = (
        "| kernel | configuration | chip | registers | spills | shared | matrix | 128-bit loads |"
    )
    rows = [
        f"| {b.case.name} | {b.config} | {b.chip.name} | {b.registers} | {b.spills} |"
        f" {b.shared / 1024:.0f} KB | {f'{b.matrix} {b.chip.matrix}' if b.case.matmul else '-'} |"
        f" {b.wide_loads} |"
        for b in binaries
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def main() -> int:
    """`python -m rmr1.kernels.compile_gate`; exit code 1 when a binary fails."""
    parser = argparse.ArgumentParser(
        prog="python -m rmr1.kernels.compile_gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="modules whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="one configuration a kernel, in bf16")
    parser.add_argument(
        "--chips", nargs="+", choices=[chip.name for chip in CHIPS], help="targets (default: all)"
    )
    parser.add_argument("--write", type=Path, help="Markdown file whose marked part is replaced")
    args = parser.parse_args()
    binaries = []
    chips = [chip for chip in CHIPS if not args.chips or chip.name in args.chips]
    for binary in compile_all(cases(args.only), quick=args.quick, chips=chips):
        binaries.append(binary)
        print(f"{binary.case.name} {binary.config} {binary.chip.name}", file=sys.stderr)
    text = table(binaries)
    if args.write:
        page = args.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    else:
        print(text)
    faults = [fault for binary in binaries for fault in binary.faults()]
    print("\n".join(faults) or f"{len(binaries)} binaries, none fails", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
