"""Both stages in bf16 on a CPU: fp32 copies are trained, saved, and gone on from bit for bit."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rmr1.config import RlvrConfig, SftConfig
from rmr1.distill import distill
from rmr1.engine.tensor_files import read_tensors
from rmr1.rlvr import rlvr

CHANGES: dict[str, Any] = {"dtype": "bfloat16", "checkpoint_every": 1}


def metrics(config: RlvrConfig | SftConfig) -> list[dict[str, Any]]:
    text = (config.directory / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        {key: row[key] for key in row if not key.endswith(("_time", "_gb", "_per_second", "mfu"))}
        for row in rows
    ]


@pytest.mark.parametrize("stage", ["sft", "rlvr"])
def test_a_run_in_bf16(
    stage: str,
    sft_config: Callable[..., SftConfig],
    rlvr_config: Callable[..., RlvrConfig],
    tiny_model: Path,
) -> None:
    run: Callable[..., Path] = distill if stage == "sft" else rlvr
    make: Callable[..., Any] = sft_config if stage == "sft" else rlvr_config
    length = {"epochs": 1} if stage == "sft" else {"steps": 2}
    whole, parts = (make(name=name, **CHANGES, **length) for name in ("whole", "parts"))
    final = run(whole)
    rows = metrics(whole)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if not isinstance(v, str)), row
        assert row["skipped_updates"] == 0
        assert row["grad_norm"] > 1e-4

    weights = dict(read_tensors(final / "model.safetensors"))
    state = dict(read_tensors(final / "optimizer.safetensors"))
    start = dict(read_tensors(tiny_model / "model.safetensors"))
    finer = moved = 0
    for name, weight in weights.items():
        master = state[f"master.{name}"]
        assert weight.dtype == torch.bfloat16
        assert all(state[f"{key}.{name}"].dtype == torch.float32 for key in ("exp_avg", "master"))
        assert torch.equal(master.bfloat16(), weight), name
        finer += int((master != weight.float()).sum())
        moved += not torch.equal(weight, start[name].bfloat16())
    assert finer > 1000  # bits that bf16 does not have
    assert moved > len(weights) // 2

    def interrupt(step: int, total: int, figures: dict[str, float]) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(parts, on_step=interrupt)
    resumed = run(parts)
    assert metrics(parts) == rows
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (resumed / name).read_bytes() == (final / name).read_bytes(), name
