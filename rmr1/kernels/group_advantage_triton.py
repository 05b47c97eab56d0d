"""Group advantages on a GPU, in Triton: a program a group, tokens included.

Shapes: N samples, P groups, T packed tokens.
"""

# mypy: allow-untyped-defs
# (a kernel's arguments are pointers and numbers, typed where it is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rmr1.kernels.tuning import Case

# Tokens written at a time.
TOKENS = 512


@triton.jit
def _kernel(
    rewards, offsets, token_offsets, out, eps,
    STD: tl.constexpr, LOO: tl.constexpr, PER_TOKEN: tl.constexpr,
    SAMPLES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The samples of one group, at most SAMPLES of them."""
    begin = tl.load(offsets + tl.program_id(0))
    end = tl.load(offsets + tl.program_id(0) + 1)
    at = begin + tl.arange(0, SAMPLES)
    live = at < end
    reward = tl.load(rewards + at, mask=live, other=0.0)
    count = (end - begin).to(tl.float32)
    centred = tl.where(live, reward - tl.sum(reward) / count, 0.0)
    others = tl.maximum(count - 1.0, 1.0)
    # Rounding in the mean must not turn a group of equal rewards into a direction.
    low = tl.min(tl.where(live, reward, float("inf")))
    high = tl.max(tl.where(live, reward, float("-inf")))
    factor = tl.where(low == high, 0.0, 1.0)
    if LOO:
        factor *= count / others
    if STD:
        factor /= tl.sqrt(tl.sum(centred * centred) / others) + eps
    advantage = centred * factor
    if PER_TOKEN:
        for sample in range(begin, end):
            one = tl.sum(tl.where(at == sample, advantage, 0.0))
            first = tl.load(token_offsets + sample)
            last = tl.load(token_offsets + sample + 1)
            for start in range(first, last, TOKENS):
                token = start + tl.arange(0, TOKENS)
                tl.store(out + token, tl.zeros((TOKENS,), tl.float32) + one, mask=token < last)
    else:
        tl.store(out + at, advantage, mask=live)


def group_advantages(
    rewards: Tensor,
    offsets: Tensor,
    divide_by_std: bool,
    leave_one_out: bool,
    token_offsets: Tensor | None,
    out: Tensor,
    eps: float,
) -> None:
    """Write the advantages into `out`; offsets [P + 1], token_offsets [N + 1]."""
    groups = len(offsets) - 1
    if not groups:
        return
    largest = int((offsets[1:] - offsets[:-1]).max())
    _kernel[(groups,)](
        rewards, offsets, offsets if token_offsets is None else token_offsets, out, eps,
        STD=divide_by_std, LOO=leave_one_out, PER_TOKEN=token_offsets is not None,
        SAMPLES=triton.next_power_of_2(largest), TOKENS=TOKENS,
    )  # fmt: skip


CASES = [
    Case(
        f"group_advantage {name}",
        _kernel,
        {
            "rewards": "*fp32",
            "offsets": "*i64",
            "token_offsets": "*i64",
            "out": "*fp32",
            "eps": "fp32",
        },
        {"STD": True, "LOO": True, "PER_TOKEN": per_token, "SAMPLES": 16, "TOKENS": TOKENS},
        ("rewards", "offsets", "token_offsets", "out"),
        # A group has a handful of rewards, at any address: there is nothing to stream.
        streams=False,
    )
    for name, per_token in (("by sample", False), ("by token", True))
]
