"""A step of generation on a CPU, in one call into C++ (csrc/decoder.cpp): no Python per op.

It reads the model's own parameters where they lie. The same step as `torch_step.py`, for plain fp32
models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmr1 import _C
from rmr1.engine.kv_cache import PagedCache
from rmr1.engine.model import CausalLM, Decoder, DecoderLayer, Mlp, RMSNorm, SelfAttention
from rmr1.engine.scheduler import Step
from rmr1.kernels.dispatch import choose
from rmr1.kernels.rope import inverse_frequencies, rope_tables

_PLAIN = {
    *(CausalLM, Decoder, DecoderLayer, Mlp, RMSNorm, SelfAttention),
    *(nn.Embedding, nn.Linear, nn.ModuleList),
}


class NativeStep:
    """Hidden states of a `Step`'s wanted tokens."""

    PARTS = ("norms", "attention projections", "attention", "mlp")

    @staticmethod
    def suits(model: CausalLM) -> bool:
        """Whether this can compute the model: a plain one, fp32, CPU, no other kernels forced."""
        weights, modules = list(model.parameters()), list(model.modules())
        return (
            # Subclasses (LoRA), own forwards and hooks compute something else.
            all(type(module) in _PLAIN and "forward" not in vars(module) for module in modules)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
            and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
            and all(w.is_contiguous() for w in weights)
            and choose("decoder", weights[0], native=True) == "native"
        )

    def __init__(self, model: CausalLM, cache: PagedCache) -> None:
        config = model.config
        self._cache = cache
        self._hidden = torch.empty(0, config.hidden_size, dtype=torch.float32, device="cpu")
        weights: list[Tensor | None] = [model.model.embed_tokens.weight, model.model.norm.weight]
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            weights += _weights(layer)
        sizes = [
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        ]
        arrays = [None if w is None else w.detach() for w in weights]
        self._decoder = _C.Decoder(sizes, config.rms_norm_eps, arrays)
        self._frequencies = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )
        self._attention_factor = config.rope_scaling.attention_factor
        self._cos = self._sin = torch.empty(0, config.head_dim // 2, device="cpu")

    def __call__(self, step: Step) -> Tensor:
        """[W, H], after the final norm; valid until the next call."""
        self._grow_tables(int(step.positions.max()) + 1)
        have, count = len(self._hidden), len(step.wanted)
        if count > have:
            self._hidden = self._hidden.new_empty(max(count, 2 * have), self._hidden.shape[1])
        hidden = self._hidden[:count]
        self._cache.copy(step.copies)
        self._decoder.run(
            step.tokens,
            step.positions,
            step.slots,
            step.tables,
            step.contexts,
            step.starts,
            self._cos,
            self._sin,
            self._cache.keys,
            self._cache.values,
            step.wanted,
            hidden,
            torch.get_num_threads(),
        )
        return hidden

    def seconds(self) -> dict[str, float]:
        """Where the time went since the start, by part of the layers."""
        return dict(zip(self.PARTS, self._decoder.seconds(), strict=True))

    def _grow_tables(self, positions: int) -> None:
        have = len(self._cos)
        if positions > have:
            wanted = torch.arange(max(positions, 2 * have, 256), device="cpu")
            tables = rope_tables(wanted, self._frequencies, self._attention_factor, torch.float32)
            self._cos, self._sin = (table.squeeze(1).contiguous() for table in tables)


def _weights(layer: DecoderLayer) -> list[Tensor | None]:
    """In the order of DecoderLayer in csrc/decoder.h."""
    attention, mlp = layer.self_attn, layer.mlp
    weights: list[Tensor | None] = [layer.input_layernorm.weight]
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        weights += [linear.weight, linear.bias]
    for norm in (attention.q_norm, attention.k_norm):
        weights.append(None if norm is None else norm.weight)
    weights += [attention.o_proj.weight, attention.o_proj.bias]
    weights.append(layer.post_attention_layernorm.weight)
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        weights += [linear.weight, linear.bias]
    return weights
