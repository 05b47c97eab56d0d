"""The rollout benchmark: its cost model, its prompts, its rows and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rmr1 import bench
from rmr1.engine.model_config import ModelConfig
from rmr1.models import POCKET, load_tokenizer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_generate
    import harness

    threads = torch.get_num_threads()
    # Its own time is not what is tested here.
    monkeypatch.setattr(harness, "limits", lambda device, dtype: harness.Limits(1e11, 2e10))
    for name in ("VLLM_PYTHON", "LLAMA_PYTHON", "LLAMA_GGUF"):
        monkeypatch.delenv(f"RMR1_{name}", raising=False)
    yield bench_generate
    torch.set_num_threads(threads)


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generate_workloads

    return generate_workloads


def config(**more: Any) -> ModelConfig:
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    return ModelConfig(
        **{**sizes, **heads, "family": "llama", "max_position_embeddings": 64, **more}
    )


# --- The cost model ------------------------------------------------------------------------------


def test_the_least_by_hand(workloads: ModuleType) -> None:
    # A layer: q and o 8 x 8, k and v 8 x 4, three matrices 8 x 16: 192 + 384 = 576. Head: 80.
    # A token that sees another: 4 x 2 heads x 4 x 2 layers = 64 operations.
    # Keys and values of a token: 2 x 2 layers x 1 head x 4 numbers x 4 bytes = 64 bytes.
    shape = workloads.Shape(prompts=2, length=3, samples=2, new=4)
    work = workloads.least(config(), shape, torch.float32, "w")
    # 6 prompt tokens, 2 of them through the head, each prompt 1 + 2 + 3 pairs.
    assert work.prefill.flops == 2 * (1152 * 6 + 80 * 2) + 64 * 12
    assert work.prefill.bytes == 4 * 1232 + 6 * 64
    # 3 steps of 4 sequences; each sees 3 of the prompt and 1, 2, 3 of its own.
    assert work.decode.flops == 2 * 1232 * 12 + 64 * 4 * (9 + 6)
    # 3 x weights; the 2 prompts once a step, 4 x (1 + 2 + 3) own tokens read, 12 written.
    assert work.decode.bytes == 3 * 4 * 1232 + (3 * 6 + 24 + 12) * 64
    assert work.flops == work.prefill.flops + work.decode.flops
    assert work.bytes == work.prefill.bytes + work.decode.bytes


def test_the_bound_adds_the_phases(workloads: ModuleType, script: ModuleType) -> None:
    work = workloads.least(config(), workloads.Shape(2, 3, 2, 4), torch.float32, "w")
    limits = script.Limits(flops=1e3, bandwidth=1e3)
    assert work.prefill.flops > work.prefill.bytes
    assert work.bound(limits) == pytest.approx((work.prefill.flops + work.decode.flops) / 1e3)
    # With a memory this slow, decoding waits for it in every step.
    slow = script.Limits(flops=1e3, bandwidth=1.0)
    assert work.bound(slow) == work.bytes


def test_the_least_of_smollm2(workloads: ModuleType) -> None:
    smollm2 = config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    )  # fmt: skip
    work = workloads.least(smollm2, workloads.Shape(4, 512, 8, 128), torch.float32, "w")
    body, head, pair = 106_168_320, 28_311_552, 4 * 576 * 30
    pairs = 32 * (127 * 512 + 127 * 128 // 2)
    assert work.decode.flops == 2 * (body + head) * 32 * 127 + pair * pairs
    assert work.prefill.flops == 2 * (body * 2048 + head * 4) + pair * 4 * 512 * 513 // 2
    # One new token is prefill alone.
    one = workloads.least(smollm2, workloads.Shape(4, 512, 8, 1), torch.float32, "w")
    assert (one.decode.flops, one.decode.bytes) == (0, 0)
    half = workloads.least(smollm2, workloads.Shape(4, 512, 8, 128), torch.bfloat16, "w")
    assert (half.flops, 2 * half.bytes) == (work.flops, work.bytes)


def test_samples_share_their_prompt(workloads: ModuleType) -> None:
    shapes = [workloads.Shape(1, 50, n, 2) for n in (1, 8)]
    one, eight = (workloads.least(config(), shape, torch.float32, "w") for shape in shapes)
    assert one.prefill == eight.prefill
    # One step: the weights and the prompt once in both, and 7 more tokens read and written.
    assert eight.decode.bytes - one.decode.bytes == 7 * 2 * 64


# --- Workloads and prompts -----------------------------------------------------------------------


def test_which_workloads_run(workloads: ModuleType) -> None:
    found = workloads.shapes_of(["headline", "2x16x4x8", "lengths"])
    assert found[:2] == [
        (workloads.Shape(4, 512, 8, 128), True),
        (workloads.Shape(2, 16, 4, 8), True),
    ]
    assert [(shape.length, everyone) for shape, everyone in found[2:]] == [
        (length, False) for length in (128, 512, 1024, 2048, 4096)
    ]
    for wrong in ("tail", "4x512x8", "0x512x8x128", "4x512x8x128x1"):
        with pytest.raises(
            ValueError, match=f"^no workload is called '{wrong}'; choose from headline"
        ):
            workloads.shapes_of([wrong])


def test_prompts_have_their_length_and_are_used_once(workloads: ModuleType) -> None:
    tokenizer = load_tokenizer(POCKET)
    shape = workloads.Shape(3, 40, 2, 8)
    texts = workloads.texts(None)
    sets = workloads.prompt_sets(texts, tokenizer, shape, 3)
    prompts = [tuple(prompt) for one in sets for prompt in one]
    assert [len(one) for one in sets] == [3, 3, 3]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({prompt[:16] for prompt in prompts}) == 9  # a block of a paged cache
    assert workloads.prompt_sets(texts, tokenizer, shape, 3) == sets
    with pytest.raises(ValueError, match="the texts are too few for 3 sets of 3 prompts of 40"):
        workloads.prompt_sets(texts[:3], tokenizer, shape, 3)


def test_who_runs_what(script: ModuleType) -> None:
    import argparse

    options = argparse.Namespace(
        quick=False, device="cpu", vllm_python="v", llama_python=None, providers=script.PROVIDERS
    )
    headline = script.Shape(4, 512, 8, 128)
    assert list(script.providers(options, headline, True)) == [
        "transformers", "transformers-paged", "vllm", "rmr1",
    ]  # fmt: skip
    small, large = script.Shape(4, 128, 1, 64), script.Shape(256, 128, 1, 64)
    assert list(script.providers(options, small, False)) == ["transformers", "rmr1"]
    assert list(script.providers(options, large, False)) == ["rmr1"]
    options.llama_python = "l"
    assert script.providers(options, headline, True)["llama.cpp"] == "l"
    options.quick = True
    assert list(script.providers(options, headline, True)) == ["transformers", "rmr1"]
    options.quick, options.providers = False, ["vllm", "rmr1"]
    assert list(script.providers(options, headline, True)) == ["vllm", "rmr1"]


# --- Rows ----------------------------------------------------------------------------------------


def results(totals: list[float], profile: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "version": "1",
            "peak_memory_mb": 100.0 + total,
            "runs": [{"first": 1.0, "decode": total - 1, "total": total, "profile": profile}],
        }
        for total in totals
    ]


def test_rows(script: ModuleType, workloads: ModuleType) -> None:
    import argparse

    options = argparse.Namespace(device="cpu", dtype="float32")
    limits = script.Limits(1e4, 1e4)
    shape = script.Shape(2, 3, 2, 4)
    work = workloads.least(config(), shape, torch.float32, "w")
    found = {
        "transformers": results([8.0, 12.0, 9.0], {}),
        "rmr1": results([4.0, 4.0, 3.0], {"attention": 1.0, "head": 0.5}),
    }
    theirs, ours, *parts = script.rows_of(shape, work, found, options, limits)
    assert (theirs["provider"], ours["provider"]) == ("transformers generate", "rmr1")
    assert (theirs["x_yardstick"], theirs["x_rmr1"]) == (1.0, 3.0)  # of 2, 3 and 3
    assert (ours["x_yardstick"], ours["x_rmr1"]) == (pytest.approx(1 / 3), 1.0)
    assert ours["share"] == pytest.approx(work.bound(limits) / 4.0)
    assert ours["tokens_per_s"] == 16 / 4.0
    assert ours["prefill_tokens_per_s"] == 6 / 1.0
    assert ours["decode_tokens_per_s"] == 12 / 3.0
    assert ours["decode_share"] == pytest.approx(work.decode.bound(limits) / 3.0)
    assert ours["peak_memory_mb"] == 104.0
    assert [(one["provider"], one["median"], one["share"]) for one in parts] == [
        ("rmr1: attention", 1.0, 0.25),
        ("rmr1: head", 0.5, 0.125),
    ]
    # Alone, it is measured against the machine, so that a slowdown shows.
    (alone,) = script.rows_of(shape, work, {"rmr1": results([4.0], {})}, options, limits)
    assert alone["yardstick"] == "GEMM and copy rates"
    assert alone["x_yardstick"] == pytest.approx(1 / alone["share"])
    rows = [{"benchmark": "generate", **one} for one in (theirs, ours, *parts, alone)]
    assert "attention" in bench.page(rows)
    slower = {**rows[-1], "x_yardstick": 2 * alone["x_yardstick"]}
    assert [one.slower for one in bench.changes([slower], [rows[-1]])] == [True]


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_writes_whole_rows(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "deep" / "bench_generate.json"
    call = ["bench_generate.py", "--quick", "--samples", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*call, "--threads", "1"])
    assert script.main() == 0
    out, err = capsys.readouterr()
    assert "x rmr1" in out
    assert err.count(" s, ") == 2  # two providers, two samples of each
    rows = json.loads(output.read_text())
    wanted = """workload provider version torch unit median p20 p80 device threads flops bytes bound
        share yardstick x_yardstick limit_flops limit_bandwidth weights x_rmr1 tokens_per_s
        first_token_s prefill_tokens_per_s prefill_share decode_tokens_per_s decode_share
        peak_memory_mb"""
    whole = [one for one in rows if "where the time goes" not in one["workload"]]
    assert [one["provider"] for one in whole] == ["transformers generate", "rmr1"]
    for one in whole:
        assert set(one) == set(wanted.split())
        assert one["median"] > one["first_token_s"] > 0
        assert one["share"] == pytest.approx(one["bound"] / one["median"])
        assert 50 < one["peak_memory_mb"] < 5000
        assert one["threads"] == 1
    assert bench.page([{"benchmark": "generate", **one} for one in rows]).count("<circle") == len(
        rows
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--vllm-python", "/nowhere/python"], "--vllm-python /nowhere/python is no program; name"),
        (["--llama-python", "/nowhere/python"], "--llama-python /nowhere/python is no program;"),
        (["--llama-python", sys.executable], "--llama-python needs the model as a GGUF file too;"),
        (["--llama-gguf", "/nowhere.gguf"], "--llama-gguf /nowhere.gguf is no file"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--workloads", "tail"], "no workload is called 'tail'; choose from"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    told: str,
) -> None:
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", "--output", str(output), *more])
    assert script.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.split(": ", 1)[1].startswith(told)
    assert not output.exists()


def test_a_peer_that_fails_is_left_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    def call(python: str, peers: Path, job: dict[str, Any]) -> dict[str, Any]:
        if job["provider"] == "vllm":
            raise script.ProviderFailed("vllm failed (exit code 1): No module named 'vllm'")
        return results([2.0], {})[0]

    monkeypatch.setattr(script, "call", call)
    options = argparse.Namespace(
        quick=False, samples=2, threads=1, device="cpu", dtype="float32", llama_gguf=None
    )
    runs = {"transformers": "python", "vllm": "python", "rmr1": "python"}
    shape, texts = script.Shape(1, 8, 1, 2), ["one two three four five six seven eight"] * 9
    found = script.in_turn(shape, runs, options, POCKET, texts)
    assert {name: len(all_) for name, all_ in found.items()} == {"transformers": 2, "rmr1": 2}
    err = capsys.readouterr().err
    assert (
        "No module named 'vllm'; it is left out of 1 x 8 tokens x 1 samples x 2 new tokens" in err
    )
    assert err.count("vllm failed") == 1


def test_a_process_that_fails_says_why(script: ModuleType) -> None:
    with pytest.raises(
        script.ProviderFailed, match=r"^x failed \(exit code 1\): ValueError: no provider"
    ):
        script.call(sys.executable, script.PEERS, {"provider": "x"})


def test_a_profile_counts_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generate_peers

    assert generate_peers._since({}, {"head": 2.0}) == {"head": 2.0}
    before, after = {"head": 2.0}, {"head": 5.0, "draw": 1.0}
    assert generate_peers._since(before, after) == {"head": 3.0, "draw": 1.0}
    # A larger cache begins a new count.
    assert generate_peers._since(before, {"head": 1.5}) == {"head": 1.5}


def test_a_peers_environment_needs_nothing_of_the_project() -> None:
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]);"
        " runpy.run_path(sys.argv[1] + '/generate_peers.py'); print(*sys.modules)"
    )
    call = [sys.executable, "-c", code, str(BENCHMARKS)]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    assert not {"rmr1", "torch", "transformers"} & set(done.stdout.split())
