"""The model with its fused head in one module, for which ZeRO-3 gathers the head's weight."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmr1.engine.packing import pack
from rmr1.engine.scorer import Scorer
from rmr1.engine.weights import load_model

PROMPTS, RESPONSES = [[3, 7, 9], [3, 11]], [[4, 5, 6, 1], [20, 1]]


def test_log_probabilities_and_the_loss_made_of_them(tiny_model: Path) -> None:
    scorer = Scorer(load_model(tiny_model))
    batch = pack(PROMPTS, RESPONSES)
    logprobs, entropy = scorer(batch, 0.7)
    assert logprobs.shape == entropy.shape == (6,)
    assert (logprobs < 0).all()
    expected = torch.autograd.grad(-logprobs.sum(), list(scorer.parameters()))
    value, same = scorer(batch, 0.7, lambda part, rows: -part.sum())
    assert torch.allclose(value, -logprobs.sum())
    assert torch.allclose(same, entropy, atol=1e-6)
    for a, b in zip(torch.autograd.grad(value, list(scorer.parameters())), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# What each of two ranks runs: gradients of the sharded model against those of a whole one.
ZERO3 = """
import json, os, sys
import torch, deepspeed
from deepspeed.utils import safe_get_full_grad
from rmr1.engine.model import CausalLM, ModelConfig
from rmr1.engine.packing import pack
from rmr1.engine.scorer import Scorer

given = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
alone = Scorer(CausalLM(ModelConfig.from_dict(given["model"])))
sharded = Scorer(CausalLM(ModelConfig.from_dict(given["model"])))
sharded.load_state_dict(alone.state_dict())
# As in rmr1/engine/zero.py: else it compiles an op, under a lock that a killed rank leaves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
engine, *_ = deepspeed.initialize(model=sharded, config={
    "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
})
batch = pack(given["prompts"], given["responses"])
# The bug: outside of a forward the weight is not there.
assert sharded.model.lm_head_weight.numel() == 0
# In one case the loss comes with the forward, in the other afterwards.
loss = (lambda part, rows: -part.sum()) if given["with_forward"] else None
value = engine(batch, 1.0, loss)[0]
wanted = alone(batch, 1.0)[0]
if loss is None:
    assert torch.allclose(value, wanted, atol=1e-5), (value, wanted)
    value = -value.sum()
engine.backward(value)
(-wanted.sum()).backward()
for (name, a), b in zip(sharded.named_parameters(), alone.parameters(), strict=True):
    assert b.grad.abs().max() > 1e-4, name
    torch.testing.assert_close(safe_get_full_grad(a).cpu(), b.grad, atol=1e-5, rtol=1e-4, msg=name)
print("same")
# Threads of gloo that outlive the interpreter would abort it.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("tied", "with_forward"), [(True, True), pytest.param(False, False, marks=pytest.mark.slow)]
)
def test_zero3_gathers_the_head(
    tiny_model: Path, tmp_path: Path, tied: bool, with_forward: bool
) -> None:
    """Touching `lm_head.weight` outside its module would skip the gather."""
    model = json.loads((tiny_model / "config.json").read_text())
    model["tie_word_embeddings"] = tied
    given = {"model": model, "prompts": PROMPTS, "responses": RESPONSES}
    given["with_forward"] = with_forward
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ZERO3, json.dumps(given)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
                 "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err[-3000:]
            assert "same" in out
    finally:
        for process in processes:
            process.kill()
