"""A model spread over ranks by ZeRO, against one process: losses, state, resuming, NaN.

What the ranks run is `RANK`; gloo joins them on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANK = """
import json, sys
import torch
from rmr1.distill import nll
from rmr1.engine.checkpoint import Progress, restore_trainer, save_checkpoint
from rmr1.engine.launch import launched
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.optim_config import OptimConfig, ZeroConfig
from rmr1.engine.packing import pack
from rmr1.engine.ranks import Ranks, joined
from rmr1.engine.trainer import NotFinite, Trainer
from rmr1.engine.weights import load_model
from pathlib import Path

given = json.loads(sys.argv[1])
model, folder = Path(given["model"]), Path(given["folder"])
torch.set_num_threads(1)
config = OptimConfig(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, schedule="linear", max_skipped=2
)
zero = ZeroConfig(stage=given["stage"], offload_optimizer=given["offload"])
# Five sequences of unlike lengths: over three ranks two micro-batches each, one of them empty.
batch = pack([[3, 7, 9], [3, 11]], [[4, 5, 6, 1], [20, 1], [4], [7, 1], [9, 9, 9, 1], [5]],
             samples=3)


def trainer(ranks, path=model):
    loaded = load_model(path, dtype=given["dtype"])
    return Trainer(loaded, config, total_updates=12, max_micro_tokens=8, ranks=ranks, zero=zero)


def figures(stats):
    return [stats.loss, stats.entropy, stats.grad_norm, stats.learning_rate]


def not_a_number(logprobs, responses, counts):
    return logprobs.sum() * float("nan"), {}


with joined(launched(), torch.device("cpu")) as ranks:
    made = trainer(ranks)
    rows = [figures(made.update(batch, nll, per_token=n % 2 == 0)) for n in range(3)]
    scored = made.score(batch).tolist()
    progress = Progress(3, made.updates, 0)
    saved = save_checkpoint(folder, made, progress, tokenizer_from=model)
    rows += [figures(made.update(batch, nll, per_token=True)) for n in range(3)]
    again = trainer(ranks, saved)
    restore_trainer(saved, again)
    resumed = [figures(again.update(batch, nll, per_token=True)) for n in range(3)]
    before = [value.clone() for _, value in again.updater.weights()]
    skipped = again.update(batch, not_a_number, per_token=True)
    after = [value.clone() for _, value in again.updater.weights()]
    try:
        again.update(batch, not_a_number, per_token=True)
        stopped = False
    except NotFinite as error:
        stopped = error.batch is batch
    moved = figures(again.update(batch, nll, per_token=True))
    print(json.dumps({
        "rank": ranks.rank, "rows": rows, "scored": scored, "resumed": resumed, "moved": moved,
        "skipped": skipped.grad_norm, "stopped": stopped,
        "kept": all(map(torch.equal, before, after)),
    }))
"""


def outcome(
    run: Callable[..., Any], ranks: int, folder: Path, model: Path, **given: Any
) -> list[dict[str, Any]]:
    """What each rank printed."""
    job = {"stage": 2, "offload": False, "dtype": "float32"} | given
    job |= {"model": str(model), "folder": str(folder)}
    ended = run([sys.executable, "-c", RANK, json.dumps(job)], ranks)
    for status, _, err in ended:
        assert status == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same in this process: no launcher, no DeepSpeed."""
    import subprocess

    job = {"stage": 2, "offload": False, "dtype": "float32", "model": str(tiny_model)}
    job |= {"folder": str(tmp_path_factory.mktemp("alone"))}
    command = [sys.executable, "-c", RANK, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name in ("rows", "resumed"):
        for row, expected in zip(found[name], alone[name], strict=True):
            assert row == pytest.approx(expected, abs=1e-5, rel=1e-5), name
    assert found["scored"] == pytest.approx(alone["scored"], abs=1e-5)
    assert found["resumed"] == found["rows"][3:]  # the same ranks: the same bits
    assert found["skipped"] > 1e30 or found["skipped"] != found["skipped"]
    assert found["kept"]
    assert found["stopped"]
    assert found["moved"] == pytest.approx(alone["moved"], abs=1e-5, rel=1e-5)


def test_alone_it_learns_and_skips(alone: dict[str, Any]) -> None:
    assert alone["rows"][5][0] < alone["rows"][0][0] - 0.1
    assert alone["rows"][0][2] > 0.5  # the gradient is clipped
    check(alone, alone)


@pytest.mark.parametrize(
    ("stage", "ranks", "offload"),
    [
        pytest.param(1, 2, False, marks=pytest.mark.slow),
        pytest.param(2, 3, False, marks=pytest.mark.slow),
        (3, 2, False),
        pytest.param(1, 3, False, marks=pytest.mark.slow),
        pytest.param(2, 2, True, marks=pytest.mark.slow),
        pytest.param(3, 2, True, marks=pytest.mark.slow),
        pytest.param(3, 3, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_do_as_one_process(
    stage: int, ranks: int, offload: bool, alone: dict[str, Any], tiny_model: Path,
    tmp_path: Path, run_ranks: Callable[..., Any],
) -> None:  # fmt: skip
    found = outcome(run_ranks, ranks, tmp_path, tiny_model, stage=stage, offload=offload)
    assert [one["rank"] for one in found] == list(range(ranks))
    for one in found:
        check(one, alone)
        assert one["rows"] == found[0]["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_trained_through_fp32(
    stage: int, tiny_model: Path, tmp_path: Path, run_ranks: Callable[..., Any]
) -> None:
    from rmr1.engine.tensor_files import read_tensors

    found = outcome(run_ranks, 2, tmp_path, tiny_model, stage=stage, dtype="bfloat16")
    assert found[0]["resumed"] == found[0]["rows"][3:]
    assert found[0]["rows"] == found[1]["rows"]
    assert found[0]["rows"][5][0] < found[0]["rows"][0][0] - 0.1
    state = dict(read_tensors(tmp_path / "step-000003/optimizer.safetensors"))
    weights = dict(read_tensors(tmp_path / "step-000003/model.safetensors"))
    for name, weight in weights.items():
        master = state[f"master.{name}"]
        assert str(weight.dtype) == "torch.bfloat16"
        assert str(master.dtype) == "torch.float32"
        assert (master.to(weight.dtype) == weight).all()
