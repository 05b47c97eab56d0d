"""What to draw (`SamplingParams`), and the keys of the noise it is drawn with.

Noise is counter-based: a token's noise is a hash of a key and the token's id, and the key a hash of
(seed, prompt index, sample index, position), where the prompt index is the prompt's place in the
call and the position is the number of tokens drawn before. So a sequence's draws do not depend on
which other sequences share its batch, on memory or on order. The same prompt at another place of
the list draws other numbers; two calls with the same seed draw the same ones, so a trainer changes
the seed every step. The draw itself is the op `rmr1/kernels/sample.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How `Generator.generate` continues a prompt. Immutable; a bad value is a ValueError.

    `n` samples per prompt; `temperature` 0 is greedy. `top_k` (0: off), `top_p` (1: off) and
    `min_p` (0: off) are applied in this order, each on the distribution at `temperature`; `min_p`
    drops tokens less likely than `min_p` times the likeliest. At most `max_new_tokens` tokens are
    drawn; a string of `stop` or a token of `stop_token_ids` (besides the model's own end tokens)
    ends a sample earlier. With `ignore_eos` the model's own end tokens do not, for benchmarks.
    `seed` fixes every draw. `first_prompt` is the number of the call's first prompt, where it has
    a part of a larger call's prompts and is to draw what that would have drawn.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    first_prompt: int = 0

    def __post_init__(self) -> None:
        for name, low in (("n", 1), ("max_new_tokens", 1), ("top_k", 0), ("first_prompt", 0)):
            value = getattr(self, name)
            if not _is_int(value) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if not _is_int(self.seed):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        # The draw is in fp32, where what is too small would be 0 and what is too large infinite.
        if self.temperature != 0 and not 1e-30 <= self.temperature <= 1e30:
            raise ValueError(f"temperature must be 0, or 1e-30 to 1e30, got {self.temperature!r}")
        if not 1e-30 <= self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        if self.top_k >= 1 << 31:
            raise ValueError(f"top_k must be below 2^31, got {self.top_k!r}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p!r}")
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), list | tuple):
                raise ValueError(f"{name} must be a tuple, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must hold non-empty strings, got {self.stop!r}")
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must hold token ids, got {self.stop_token_ids!r}")


def one_each(
    params: SamplingParams | list[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    """Parameters of each of so many prompts; ValueError where there are others."""
    if isinstance(params, list | tuple):
        if len(params) != prompts:
            raise ValueError(
                f"params is a list of {len(params)}, and there are {prompts} prompts; give one"
                " SamplingParams for all, or one each"
            )
        return list(params)
    if params is None and prompts:
        raise ValueError("params is missing: prompts need a SamplingParams")
    return [params] * prompts if params is not None else []


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# SplitMix64 (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number generators").
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """Its finaliser, bijective on 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def sequence_key(seed: int, prompt: int, sample: int) -> int:
    """The key of a sequence's noise, 64 bits, from its seed, prompt index and sample index."""
    key = _mix((seed + _GOLDEN) & _MASK)
    key = _mix(((key ^ prompt) + _GOLDEN) & _MASK)
    return _mix(((key ^ sample) + _GOLDEN) & _MASK)


def token_keys(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The key of each sequence's next draw: keys [B] uint64, positions [B] -> [B] int64."""
    x = keys + (positions + 1).astype(np.uint64) * np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)
