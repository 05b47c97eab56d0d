"""Decoder-only language models (Llama, Qwen2, Qwen3) over packed tokens, without padding.

The model computes hidden states; attention is handed in, so that training (packed sequences) and
generation (a KV cache) share every line here. Parameter names are Hugging Face's.

Shapes: T tokens, H hidden size, N query heads, K key/value heads, D head size, I MLP size, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rmr1.engine.model_config import ModelConfig
from rmr1.engine.optim_config import Recompute
from rmr1.engine.recompute import again, anew
from rmr1.kernels.rmsnorm import add_rmsnorm, rmsnorm
from rmr1.kernels.rope import inverse_frequencies, rope, rope_tables
from rmr1.kernels.swiglu import swiglu

__all__ = ["Attend", "CausalLM", "ModelConfig"]

# (layer, q [T, N, D], k [T, K, D], v [T, K, D]) -> [T, N, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """The learned weight of one norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return rmsnorm(x, self.weight, self.eps)

    def after_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + added, and x + added: [..., H] each."""
        return add_rmsnorm(x, added, self.weight, self.eps)

    def anew(self, normed: Tensor, x: Tensor) -> AbstractContextManager[None]:
        """A block in which the norm of x is computed again for the backward pass, not saved."""
        # ZeRO-3 gathers the weight for the backward of this module, not for that of the next one.
        sharded = hasattr(self.weight, "ds_id")
        return anew(None if sharded else normed, self.forward, x)


class SelfAttention(nn.Module):
    """Projections, q/k norm (Qwen3) and rotation around the `attend` of the caller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.layer, self.head_dim = layer, dim
        self.q_proj = nn.Linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.o_bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, H]; cos, sin [T, 1, D/2] -> [T, H]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, N, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(self.layer, rope(q, cos, sin), rope(k, cos, sin), v)
        return self.o_proj(mixed.flatten(-2))


class Mlp(nn.Module):
    """The gated feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate, up = self.gate_proj(x), self.up_proj(x)  # [T, I]
        product = swiglu(gate, up)
        with anew(product, swiglu, gate, up, nested=True):
            del gate, up  # without a gradient nobody needs them any more
            return self.down_proj(product)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)
        self.recompute: Recompute = "elementwise"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, H] -> [T, H]."""
        if self.recompute == "layer":
            return again(self._forward, x, cos, sin, attend)
        return self._forward(x, cos, sin, attend)

    def _forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        normed = self.input_layernorm(x)
        with self._saving(self.input_layernorm, normed, x):
            mixed = self.self_attn(normed, cos, sin, attend)
        normed, x = self.post_attention_layernorm.after_sum(x, mixed)
        with self._saving(self.post_attention_layernorm, normed, x):
            added = again(self.mlp, normed) if self.recompute == "mlp" else self.mlp(normed)
        return x + added

    def _saving(self, norm: RMSNorm, normed: Tensor, x: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self.recompute == "none" else norm.anew(normed, x)


class Decoder(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder with its language-model head.

    Built with random weights (normal, `config.initializer_range`); `load_model` reads trained ones.
    A tied head has no parameter of its own: `lm_head_weight` is then the embedding.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # Made on first use and no buffer: that would follow `.to(torch.bfloat16)`.
        self._frequencies: Tensor | None = None
        self.register_load_state_dict_pre_hook(_drop_tied_head)
        self.init_weights()

    def recompute(self, kind: Recompute, layers: int | None = None) -> None:
        """Let the backward pass compute part of the first `layers` layers anew (default: all).

        The others keep all. A model that nobody configures is "elementwise" in all layers.
        """
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            layer.recompute = kind if layers is None or index < layers else "none"

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H]."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from N(0, initializer_range), set biases to 0 and norms to 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            token_ids: [T] int64, packed.
            positions: [T] int64, each token's place in its own sequence. Past the trained length a
                model whose rope is `dynamic` has no frequencies: see `RopeScaling`.
            attend: mixes tokens, see `Attend`; it decides who sees whom.

        Returns:
            [T, H] in the dtype of the weights. Multiply by `lm_head_weight` for logits, or hand
            both to `token_logprobs`.
        """
        config = self.config
        x = self.model.embed_tokens(token_ids)
        if config.rope_scaling.kind == "dynamic":
            positions = _within(positions, config.max_position_embeddings)
        if self._frequencies is None or self._frequencies.device != x.device:
            self._frequencies = inverse_frequencies(
                config.head_dim, config.rope_theta, config.rope_scaling
            ).to(x.device)
        cos, sin = rope_tables(
            positions, self._frequencies, config.rope_scaling.attention_factor, x.dtype
        )
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend)
        return self.model.norm(x)


def _within(positions: Tensor, trained: int) -> Tensor:
    """Positions of a `dynamic` model: what is past the trained length is an error on a CPU, and NaN
    elsewhere, where looking at it would make the host wait for the device.
    """
    if positions.device.type != "cpu":
        return _nan_from(positions, trained)
    if positions.numel() and (last := int(positions.max())) >= trained:
        raise ValueError(
            f"position {last} is past max_position_embeddings = {trained} and the model's rope "
            f"type is `dynamic`, whose frequencies there depend on the final length; shorten the "
            f"sequences or set rope_scaling to `yarn` or `linear` in config.json."
        )
    return positions


def _nan_from(positions: Tensor, trained: int) -> Tensor:
    return positions.to(torch.float32).masked_fill(positions >= trained, torch.nan)


def _drop_tied_head(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Accept Hugging Face's state dicts, which list a tied head under both of its names."""
    if isinstance(module, CausalLM) and module.lm_head is None:
        state.pop(f"{prefix}lm_head.weight", None)
