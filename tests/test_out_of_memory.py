"""Out of memory is one sentence with the setting to lower; other errors pass as they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmr1.cli import main
from rmr1.config import RlvrConfig, SftConfig, to_toml
from rmr1.engine.out_of_memory import advising
from rmr1.engine.scorer import Scorer
from rmr1.rlvr import rlvr

# As torch 2.11 words it.
GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of"
    " which 1.25 GiB is free. Including non-PyTorch memory, this process has 77.84 GiB memory in"
    " use. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by"
    " PyTorch but unallocated. If reserved but unallocated memory is large try setting"
    " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation"
    " for Memory Management"
)


def told(error: Exception) -> MemoryError:
    with pytest.raises(MemoryError) as caught, advising("lower a_setting"):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


def test_a_gpu_says_how_much_was_wanted_and_is_free() -> None:
    assert str(told(torch.OutOfMemoryError(GPU))) == (
        "out of GPU memory (Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of"
        " which 1.25 GiB is free); lower a_setting"
    )


def test_a_short_message_of_a_gpu_does_too() -> None:
    message = str(told(torch.OutOfMemoryError("CUDA out of memory.")))
    assert message.startswith("out of GPU memory")
    assert message.endswith("; lower a_setting")


def test_the_real_error_of_a_cpu() -> None:
    with pytest.raises(MemoryError) as caught, advising("lower a_setting"):
        torch.empty(1 << 58, dtype=torch.uint8)
    message = str(caught.value)
    assert message.startswith("out of memory (")
    assert message.endswith("; lower a_setting")
    assert "\n" not in message
    assert str(1 << 58) in message  # how much was wanted
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        RuntimeError(""),
        ValueError("can't allocate memory, but of another kind"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, advising("lower a_setting"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; lower a_setting"),
        (MemoryError("std::bad_alloc"), "out of memory; lower a_setting"),
        (MemoryError("Unable to allocate 9 GiB"), "out of memory (Unable to allocate 9 GiB); "),
    ],
)
def test_errors_of_python_numpy_and_our_own_code(error: MemoryError, message: str) -> None:
    assert str(told(error)).startswith(message)


def test_the_first_advice_stays() -> None:
    with pytest.raises(MemoryError, match=r"^out of memory; lower one$"), advising("lower two"):  # noqa: SIM117
        with advising("lower one"):
            raise MemoryError


# A product whose C++ needs as much memory again as its input has, which the process may not have.
NATIVE = """
import resource, torch
from rmr1.engine.out_of_memory import advising
from rmr1.kernels.linear import linear

torch.set_num_threads(1)
x, w = torch.zeros(1 << 20, 256), torch.zeros(1, 256)
out = torch.empty(1 << 20, 1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 28)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with advising("lower a_setting"):
        linear(x, w, out=out)
except MemoryError as error:
    print(repr(error.__cause__), "|", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_real_error_of_native_code() -> None:
    command = [sys.executable, "-c", NATIVE]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "MemoryError('std::bad_alloc') | out of memory; lower a_setting"


def test_without_an_error_nothing_happens() -> None:
    with advising("lower a_setting"):
        pass


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(GPU)


@pytest.mark.parametrize("verb", ["sft", "rlvr"])
def test_the_command_line_says_which_setting_to_lower(
    verb: str,
    sft_config: Callable[..., SftConfig],
    rlvr_config: Callable[..., RlvrConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make: dict[str, Callable[..., Any]] = {"sft": sft_config, "rlvr": rlvr_config}
    file = tmp_path / "run.toml"
    file.write_text(to_toml(make[verb](max_micro_tokens=77)))
    monkeypatch.setattr(Scorer, "forward", exhausted)
    assert main([verb, str(file)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rmr1:")]
    assert "out of GPU memory (Tried to allocate 2.50 GiB. " in line
    assert "lower max_micro_tokens (now 77)" in line
    assert "Traceback" not in line


def test_a_generator_that_runs_out_names_its_cache(
    rlvr_config: Callable[..., RlvrConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmr1.engine.generator.Generator.generate", exhausted)
    with pytest.raises(MemoryError, match=r"out of GPU memory .*; lower rollout\.kv_memory_gb"):
        rlvr(rlvr_config())
