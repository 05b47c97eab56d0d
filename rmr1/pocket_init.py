"""Starting weights of the pocket model: attention heads that can already copy.

To judge is to look things up: what was asked, what the answer says, whether the two agree. A small
decoder finds the two-layer circuit for it (an induction head: Olsson et al. 2022,
arXiv:2209.11895) only after millions of tokens, and learns little else until then. So it is
wired into the starting weights, as weights of trained models are imitated by mimetic
initialisation (Trockman and Kolter 2023, arXiv:2305.09828); training is free to change all of it.

The residual stream is split: `IDENTITY` coordinates say which token stands here, the others start
empty. Half the heads of each wired layer work on them, head h on the h-th block of each part:

- layer 0 looks one token back and writes that token's identity into the empty part;
- layers 1 and 2 look for a place whose token before is the token here, and add the token that
  stands there: what followed last time follows again;
- the other heads of these layers look, faintly, for the same token as here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rmr1.engine.model import CausalLM, DecoderLayer, SelfAttention

# A dimension that turns less than this per token (radians) compares tokens at any distance here.
_STILL = 0.008
# Sizes found by hand: a repeated text of 60 random tokens is continued rightly at once.
_LOOK_BACK, _MATCH, _SAME, _WRITE = 5.0, 2.2, 1.3, 0.085
# What is not wired starts small, or its noise would drown the identities.
_REST = 0.05


@torch.no_grad()
def wire_copying(model: CausalLM) -> None:
    """Overwrite fresh weights of a decoder with biases on q and k.

    Raises:
        ValueError: the model has no biases on q and k, or grouped or an odd number of heads.
    """
    config = model.config
    dim, heads = config.head_dim, config.num_attention_heads
    if not config.qkv_bias or heads % 2 or heads != config.num_key_value_heads:
        raise ValueError(
            f"wire_copying needs biases on q and k and an even number of ungrouped heads, "
            f"got family {config.family!r} with {heads} heads."
        )
    wired = heads // 2
    identity = wired * dim
    embedding = model.model.embed_tokens.weight
    embedding[:, identity:] = 0
    embedding.mul_(math.sqrt(config.hidden_size / identity))
    turns = [config.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        layer.mlp.down_proj.weight.mul_(_REST)
        layer.self_attn.o_proj.weight.mul_(_REST)
        for head in range(heads if number <= 2 else 0):
            rows = slice(head * dim, (head + 1) * dim)
            here = torch.arange(dim) + head % wired * dim  # the block of the identity part
            if head < wired:
                _wire_head(layer.self_attn, number, rows, here, identity, turns)
            else:
                same = _comparison(turns, here, config.hidden_size, _SAME)
                layer.self_attn.q_proj.weight[rows] += same
                layer.self_attn.k_proj.weight[rows] += same


def _wire_head(
    attention: SelfAttention,
    number: int,
    rows: slice,
    here: Tensor,
    identity: int,
    turns: list[float],
) -> None:
    """One head of layer 0 (look one back) or of layers 1 and 2 (what followed last time)."""
    hidden = attention.q_proj.weight.shape[1]
    if number == 0:
        _look_one_back(turns, attention.q_proj, attention.k_proj, rows)
        target = here + identity
    else:
        before = here + identity
        attention.q_proj.weight[rows] = _comparison(turns, here, hidden, _MATCH)
        attention.k_proj.weight[rows] = _comparison(turns, before, hidden, _MATCH)
        target = here
    places = torch.arange(len(here))
    attention.v_proj.weight[rows] = 0
    attention.v_proj.weight[rows][places, here] = 1
    attention.o_proj.weight[:, rows] = 0
    attention.o_proj.weight[:, rows][target, places] = _WRITE


def _comparison(turns: list[float], block: Tensor, hidden: int, size: float) -> Tensor:
    """[D, H]: coordinates of `block` laid on the dimensions of a head that hardly turn."""
    half = len(turns)
    still = [i for i, turn in enumerate(turns) if turn < _STILL]
    weight = torch.zeros(2 * half, hidden)
    for source, place in enumerate([*still, *(i + half for i in still)]):
        weight[place, block[source]] = size
    return weight


def _look_one_back(
    turns: list[float], q_proj: torch.nn.Linear, k_proj: torch.nn.Linear, rows: slice
) -> None:
    """Constant q and k whose product, once rotated, is largest at a distance of one token."""
    q_proj.weight[rows] = 0
    k_proj.weight[rows] = 0
    half = len(turns)
    for i, turn in enumerate(turns[:5]):
        size = _LOOK_BACK * (1.0 if i < 2 else 0.6)
        k_proj.bias[rows.start + i] = size
        q_proj.bias[rows.start + i] = size * math.cos(turn)
        q_proj.bias[rows.start + i + half] = -size * math.sin(turn)
