"""The ops under DistributedDataParallel: the gradients of two ranks are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

DDP = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import rmr1
from rmr1.kernels.policy_loss import PolicyLossConfig

class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 17, bias=False)
    def forward(self, x, words):
        return rmr1.token_logprobs(self.body(x).tanh(), self.head.weight, words)

def gradients(module, rows, scale):
    torch.manual_seed(1)
    x, words = torch.randn(12, 8)[rows], torch.randint(0, 17, (12,))[rows]
    ids, rewards = torch.arange(4).repeat_interleave(3), torch.tensor([1.0, -1, -1, 1])
    advantages = rmr1.group_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    logprobs = module(x, words)
    first = int(ids[rows][0])
    loss, _ = rmr1.policy_loss(
        logprobs, logprobs.detach() + 0.1, advantages[first:], ids[rows] - first,
        config=PolicyLossConfig(beta=0), token_count=12,
    )
    (scale * loss).backward()
    return [p.grad for p in module.parameters()]

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(0)
alone = Head()
wrapped = DistributedDataParallel(Head())
wrapped.module.load_state_dict(alone.state_dict())
wanted = gradients(alone, slice(0, 12), 1.0)
# DDP takes the mean over ranks; each loss is divided by the tokens of both.
found = gradients(wrapped, slice(0, 9) if rank == 0 else slice(9, 12), 2.0)
for a, b in zip(found, wanted, strict=True):
    assert b.abs().max() > 1e-3
    torch.testing.assert_close(a, b)
print("same")
# Threads of gloo that outlive the interpreter would abort it.
dist.barrier()
dist.destroy_process_group()
"""


def test_gradients_of_two_processes_are_those_of_the_joined_batch(tmp_path: Path) -> None:
    """Nine tokens on one rank and three on the other, divided by the twelve of both."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err[-2000:]
            assert "same" in out
    finally:
        for process in processes:
            process.kill()
