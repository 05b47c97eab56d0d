"""What Triton's own intermediate code and the launches say of faults that no small test can reach:
offsets past 2^31, grids past 65,535, fp64 by accident, and autotuning that runs a kernel twice.

The code is made without a GPU in a process of its own, since this one may run the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rmr1.kernels.dispatch import interpreted, use
from rmr1.kernels.group_advantage import group_advantages
from rmr1.kernels.policy_loss import PolicyLossConfig, policy_loss
from rmr1.kernels.rmsnorm import add_rmsnorm
from rmr1.kernels.rope import rope
from rmr1.kernels.swiglu import swiglu
from rmr1.kernels.token_logprob import token_logprobs
from rmr1.kernels.token_loss import token_loss

SCRIPT = """
import json, sys
from rmr1.kernels import compile_gate as gate  # before triton: it turns the interpreter off
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from rmr1.kernels.tuning import Case

@triton.jit
def wraps(x, out, H, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), tl.program_id(0) + 2):
        tl.store(out + row * H + column, tl.load(x + tl.program_id(1) * H + column) * 2.0)

@triton.jit
def doubles(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(tl.float64) * 2.0)

types = {"x": "*fp32", "out": "*fp32", "H": "i32"}
bad = [Case(one.__name__, one, {n: t for n, t in types.items() if n in one.arg_names},
            {"BLOCK": 64}, ()) for one in (wraps, doubles)]
found = {}
target = gate.CHIPS[1].target
for case in gate.cases() + bad:
    config = getattr(case.kernel, "configs", [triton.Config({})])[0]
    kernel = case.kernel.fn if hasattr(case.kernel, "configs") else case.kernel
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {**case.constants, **config.kwargs})
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": config.num_warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = source.make_ir(target, options, backend.get_codegen_implementation(options),
                          backend.get_module_map(), context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    found[case.name] = str(stages["ttir"](code, {}))
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Triton's intermediate code of every kernel, and of two that are wrong on purpose."""
    folder = tmp_path_factory.mktemp("ttir")
    (folder / "make.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(folder / "make.py"), str(folder / "codes.json")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "codes.json").read_text())


# Arguments that count rows or words: a program's number times one of them is the number of a row.
COUNTS = {"share", "each"}


def products_that_wrap(code: str) -> Iterator[str]:
    """32-bit products of something that grows with the program (or a loop) and a size, such as row
    times row length: what passes 2^31 in a large batch.

    Follows the values from line to line. A difference of two that grow stays within a tile.
    """
    grows: set[str] = set()
    sizes: set[str] = set()
    for line in code.splitlines():
        if "tt.func" in line:
            sizes = set(re.findall(r"(%\w+): i32", line)) - {f"%{name}" for name in COUNTS}
            continue
        if loop := re.search(r"scf\.for (%\w+) =", line):
            grows.add(loop[1])
        if not (found := re.match(r"\s*(%\w+)(?::\d+)? = (\S+)(.*)", line)):
            continue
        name, operation, rest = found.groups()
        used = set(re.findall(r"%\w+", rest.split(" loc(")[0]))
        growing = used & grows
        narrow = re.search(r": (tensor<\w+xi32>|i32)", rest)
        if operation == "arith.muli" and narrow and growing and used & sizes:
            yield line.strip()
        relative = operation == "arith.subi" and growing == used
        if operation == "tt.get_program_id" or (growing and not relative):
            grows.add(name)
        elif used & sizes:
            sizes.add(name)


def test_int32_offsets(codes: dict[str, str]) -> None:
    """T * V passes 2^31 at 14,122 tokens of 152,064 words, T * H within a batch."""
    assert len(list(products_that_wrap(codes["wraps"]))) == 2
    assert len(codes) > 20
    found = {name: list(products_that_wrap(code)) for name, code in codes.items()}
    del found["wraps"]
    assert {name: lines for name, lines in found.items() if lines} == {}
    # Where rows are many and long, a 64-bit product is there instead.
    for op in ("token_logprob forward bf16", "rmsnorm backward bf16 H=8192", "rope bf16"):
        assert re.search(r"arith\.muli .*: (tensor<\w+xi64>|i64)", codes[op])


def test_no_fp64_in_a_kernel(codes: dict[str, str]) -> None:
    """A Python float such as eps or 1 / temperature must arrive as fp32."""
    assert "f64" in codes["doubles"]
    for name, code in codes.items():
        assert name == "doubles" or not re.search(r"\bf64\b|xf64\b", code), name


# --- Launches, in the interpreter ----------------------------------------------------------------

ROWS = 70_000


def ops(rows: int) -> dict[str, tuple[list[Tensor], Callable[..., Any]]]:
    """Every op with inputs of `rows` rows, floating ones first."""
    torch.manual_seed(0)
    x, wide, w = torch.randn(rows, 4), torch.randn(rows, 8), torch.randn(70, 4)
    y, ids = torch.randint(0, 70, (rows,)), torch.arange(rows)
    config = PolicyLossConfig(beta=0.1, ratio="sequence", correction="mask_sequence")
    # Two samples a group.
    counts = torch.ones(rows, dtype=torch.int64)
    table = torch.randn(rows, 1, 2)
    return {
        "token_logprobs": (
            [x, w], lambda x, w: sum(token_logprobs(x, w, y, return_entropy=True))
        ),
        # Its slope is never 0, which matters where nothing is run and p is whatever was there.
        "token_loss": (
            [x, w],
            lambda x, w: token_loss(x, w, y, lambda p, _: (2 * p + p.sin()).sum())[0],
        ),
        "policy_loss": (
            [wide[:, 0]],
            lambda new: policy_loss(
                new, wide[:, 1], wide[:, 2], ids,
                ref_logprobs=wide[:, 3], rollout_logprobs=wide[:, 1], config=config,
            )[0],
        ),
        "group_advantages": (
            [], lambda: group_advantages(wide[:, 0], ids // 2, token_counts=counts)
        ),
        "rmsnorm": ([x, x + 1, w[0]], lambda x, a, w: add_rmsnorm(x, a, w, 1e-5)[0]),
        "rope": ([wide.view(rows, 2, 4)], lambda x: rope(x, table, table)),
        "swiglu": ([x, x + 1], swiglu),
    }  # fmt: skip


OPS = list(ops(1))
Launch = Callable[..., None]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Launch, Any], Launch]], None]:
    """Puts something in the place of every launch."""
    if not interpreted():
        pytest.skip("launches are watched in the interpreter")
    from triton.runtime.interpreter import GridExecutor

    real = GridExecutor.__call__

    def replace(wrapped: Callable[[Launch, Any], Launch]) -> None:
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            wrapped(lambda: real(self, *args, **kwargs), (self.grid, args, kwargs))

        monkeypatch.setattr(GridExecutor, "__call__", call)

    return replace


def outcome(name: str, rows: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What an op and its backward give; its inputs before and after."""
    inputs, function = ops(rows)[name]
    before = [one.clone() for one in inputs]
    leaves = [one.detach().requires_grad_() for one in inputs]
    with use("triton"):
        out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else ()
    return [out.detach(), *grads], before, inputs


@pytest.mark.parametrize("name", OPS)
def test_grid_dimension_y(name: str, launches: Any) -> None:
    """CUDA takes 2^31 programs in x, but 65,535 in y and z: all kernels launch in x alone. Nothing
    is run: 70,000 rows would take minutes.
    """
    grids = []

    def note(_: Launch, launch: Any) -> None:
        grid, _, kwargs = launch
        grids.append(grid(kwargs) if callable(grid) else grid)

    launches(note)
    outcome(name, ROWS)
    assert len(grids) >= 1 + (name != "group_advantages" and name != "policy_loss")
    assert all(len(grid) == 1 or set(grid[1:]) == {1} for grid in grids)
    assert max(grid[0] for grid in grids) < 2**31
    if name in ("rope", "group_advantages"):  # a program a row, or a group of two
        assert max(grid[0] for grid in grids) >= ROWS // 2


@pytest.mark.parametrize("name", OPS)
def test_autotuned_kernels_do_not_write_their_inputs(name: str, launches: Any) -> None:
    """Autotuning launches a kernel again and again on the same buffers. Whatever it adds in place,
    or changes in an input, is then wrong in the first call and right in all later ones.
    """
    once, _, _ = outcome(name, 9)
    count = 0

    def thrice(launch: Launch, _: Any) -> None:
        nonlocal count
        for _ in range(3):
            launch()
            count += 1

    launches(thrice)
    again, before, after = outcome(name, 9)
    assert count >= 3
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_watch_sees_a_kernel_that_adds_in_place(launches: Any, tmp_path: Path) -> None:
    (tmp_path / "adds.py").write_text(
        "import triton, triton.language as tl\n@triton.jit\ndef adds(x):\n"
        "    tl.store(x, tl.load(x) + 1.0)\n"
    )
    scope: dict[str, Any] = {}
    code = (tmp_path / "adds.py").read_text()
    exec(compile(code, str(tmp_path / "adds.py"), "exec"), scope)
    launches(lambda launch, _: [launch(), launch()])
    x = torch.zeros(1)
    scope["adds"][(1,)](x)
    assert x.item() == 2.0
