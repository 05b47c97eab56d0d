"""What a model is: the part of Hugging Face's config.json that `CausalLM` needs, checked.

An option that would change the computation and is not supported is an error, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from rmr1.engine.config_json import (
    check_size,
    end_token_ids,
    flag,
    names,
    positive,
    short,
    size,
    token_id,
)
from rmr1.kernels.rope import RopeKind, RopeScaling, inverse_frequencies

Family = Literal["llama", "qwen2", "qwen3"]

# family -> the class that transformers loads it with
ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
# transformers fills these in where a config.json leaves them out.
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a model. `from_dict` reads a config.json, `to_dict` writes one."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model config: num_attention_heads ({self.num_attention_heads}) must be a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim must be even for RoPE, got {self.head_dim}.")
        _check_rope(self.head_dim, self.rope_theta, self.rope_scaling)

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 always has biases on q, k and v; the other families where attention_bias says."""
        return self.family == "qwen2" or self.attention_bias

    @property
    def o_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.family != "qwen2" and self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalizes each head of q and k before the rotation."""
        return self.family == "qwen3"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the dictionary of a config.json, of transformers 4 or 5.

        Raises:
            ValueError: an unknown architecture (the known ones are listed), a missing or
                impossible size, or an option this project does not compute.
        """
        family = _family(raw)
        _refuse_unsupported(raw, family)
        hidden, heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
        head_dim = raw.get("head_dim")
        if head_dim is None:
            head_dim = 128 if family == "qwen3" else hidden // heads
        positions = size(raw, "max_position_embeddings", _DEFAULT_MAX_POSITIONS[family])
        theta, scaling = _rope(raw, positions)
        kv_heads = raw.get("num_key_value_heads")
        return cls(
            family=family,
            vocab_size=size(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=size(raw, "intermediate_size"),
            num_hidden_layers=size(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=positive(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            attention_bias=family != "qwen2" and flag(raw, "attention_bias"),
            mlp_bias=family == "llama" and flag(raw, "mlp_bias"),
            initializer_range=positive(raw, "initializer_range", 0.02, or_zero=True),
            bos_token_id=token_id(raw, "bos_token_id"),
            eos_token_id=end_token_ids(raw),
            pad_token_id=token_id(raw, "pad_token_id"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the dictionary of a config.json that transformers 4, 5 and vLLM read."""
        written: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (
                list(self.eos_token_id)
                if isinstance(self.eos_token_id, tuple)
                else self.eos_token_id
            ),
            "pad_token_id": self.pad_token_id,
        }
        if self.family != "qwen2":
            written["attention_bias"] = self.attention_bias
        if self.family == "llama":
            written["mlp_bias"] = self.mlp_bias
        else:
            written["use_sliding_window"] = False
        scaling = _scaling_to_dict(self.rope_scaling)
        # Both spellings: transformers 4 and vLLM read the first two, transformers 5 the third.
        written["rope_theta"] = self.rope_theta
        written["rope_scaling"] = scaling
        written["rope_parameters"] = {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": self.rope_theta,
        }
        return written


def _family(raw: Mapping[str, Any]) -> Family:
    architectures, model_type = names(raw, "architectures"), raw.get("model_type")
    known = ", ".join(f"{name} ({cls})" for name, cls in ARCHITECTURES.items())
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(
            f"model config: unknown architecture {short(model_type)} "
            f"({', '.join(architectures) or 'no `architectures` entry'}); "
            f"the known ones are {known}."
        )
    if architectures and ARCHITECTURES[model_type] not in architectures:
        raise ValueError(
            f"model config: {', '.join(architectures)} is not a causal language model "
            f"that this project computes; the known ones are {known}."
        )
    return cast(Family, model_type)


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    """Raise for options that would change the result and are not computed here."""
    supported = f"supported are {', '.join(ARCHITECTURES)} models without it"
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"model config: hidden_act must be silu, got {short(raw['hidden_act'])}.")
    if raw.get("quantization_config"):
        raise ValueError(
            f"model config: quantized weights (quantization_config) are not read; {supported}."
        )
    layer_types = names(raw, "layer_types")
    if family != "llama" and flag(raw, "use_sliding_window"):
        slides = "sliding_attention" in layer_types or (
            not layer_types
            and size(raw, "max_window_layers", 28, least=0) < size(raw, "num_hidden_layers")
        )
        positions = size(raw, "max_position_embeddings", _DEFAULT_MAX_POSITIONS[family])
        windowed = slides and raw.get("sliding_window", 4096) is not None
        # A window as long as the longest sequence hides nothing.
        if windowed and (window := size(raw, "sliding_window", 4096)) < positions:
            raise ValueError(
                f"model config: sliding-window attention (sliding_window = {window}) is not "
                f"computed; {supported} (set use_sliding_window to false if sequences stay "
                f"shorter than the window)."
            )
    partial = _rope_options(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(
            f"model config: partial_rotary_factor = {short(partial)} is not computed; {supported}."
        )


def _rope_options(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return rope_scaling (transformers 4) or rope_parameters (5), whichever is there."""
    options = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(options, Mapping) or any(isinstance(v, Mapping) for v in options.values()):
        raise ValueError(
            f"model config: rope_scaling / rope_parameters must be one flat object, "
            f"got {short(options)}."
        )
    return options


def _rope(raw: Mapping[str, Any], positions: int) -> tuple[float, RopeScaling]:
    """Read RoPE's base (theta) and scaling."""
    options = _rope_options(raw)
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"model config: rope type {short(kind)} is unknown; the known ones are "
            f"{', '.join(ROPE_KINDS)}."
        )
    theta = positive(options, "rope_theta", positive(raw, "rope_theta", 10_000.0))
    if kind == "default":
        return theta, RopeScaling()
    original = raw.get("original_max_position_embeddings") or options.get(
        "original_max_position_embeddings", positions
    )
    check_size("original_max_position_embeddings", original)
    if kind == "yarn":
        factor = positive(options, "factor", positions / original)
        return theta, RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=positive(options, "beta_fast", 32.0),
            beta_slow=positive(options, "beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(options, factor),
            truncate=flag(options, "truncate", default=True),
        )
    factor = positive(options, "factor")
    if kind == "llama3":
        low, high = positive(options, "low_freq_factor"), positive(options, "high_freq_factor")
        if low >= high:
            raise ValueError(
                f"model config: high_freq_factor must be above low_freq_factor ({low}), got {high}."
            )
        return theta, RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return theta, RopeScaling(kind=cast(RopeKind, kind), factor=factor)


def _yarn_attention_factor(options: Mapping[str, Any], factor: float) -> float:
    """Yarn warms attention up: cos and sin are multiplied by this (its paper's sqrt(1/t))."""
    if options.get("attention_factor") is not None:
        return positive(options, "attention_factor")

    def temper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = (
        positive(options, name, 0.0, or_zero=True) for name in ("mscale", "mscale_all_dim")
    )
    if over and under:
        return temper(over) / temper(under)
    return temper(1.0)


def _check_rope(head_dim: int, theta: float, scaling: RopeScaling) -> None:
    """Raise for values that are possible one by one and overflow together: all would be NaN."""
    try:
        with torch.device("cpu"):  # whatever the caller builds models on
            frequencies = inverse_frequencies(head_dim, theta, scaling)
        finite = bool(frequencies.isfinite().all()) and math.isfinite(scaling.attention_factor)
    except (ArithmeticError, ValueError):  # yarn's logarithms
        finite = False
    if not finite:
        raise ValueError(
            f"model config: rope_theta = {theta} with rope_scaling = {_scaling_to_dict(scaling)} "
            f"gives frequencies that are not finite; take both from the model's own config.json."
        )


def _scaling_to_dict(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "default":
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        written["low_freq_factor"] = scaling.low_freq_factor
        written["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        written["beta_fast"], written["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        written["attention_factor"] = scaling.attention_factor
        written["truncate"] = scaling.truncate
    return written
