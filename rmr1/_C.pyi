"""What csrc/bindings.cpp offers to Python."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple, final

import numpy as np
from torch import Tensor

Array = np.ndarray

class FormatError(IntEnum):
    OK = 0
    UNCLOSED_THINK = 1
    UNCLOSED_TAG = 2
    UNOPENED_TAG = 3
    NO_TYPE = 4
    UNKNOWN_TYPE = 5
    NO_SOLUTION = 6
    NO_RUBRIC = 7
    NO_RUBRIC_ITEMS = 8
    NO_WEIGHT = 9
    NO_JUSTIFY = 10
    NO_EVAL = 11
    NO_ANSWER = 12
    BAD_ANSWER = 13
    EMPTY_SECTION = 14
    REPEATED_SECTION = 15
    REPEATED_ANSWER = 16
    OUT_OF_ORDER = 17
    MISPLACED_SECTION = 18
    TEXT_AFTER_ANSWER = 19

class Span(NamedTuple):
    start: int
    end: int

class RubricItem(NamedTuple):
    span: Span
    weight: float | None

@final
class Verdict:
    def __init__(
        self,
        answer: Literal["A", "B", "tie"] | None = None,
        task_type: Literal["chat", "reasoning"] | None = None,
        solution: Span | None = None,
        rubric: Span | None = None,
        justify: Span | None = None,
        evaluation: Span | None = None,
        answer_span: Span | None = None,
        quotes_a: tuple[Span, ...] = (),
        quotes_b: tuple[Span, ...] = (),
        summaries_a: tuple[Span, ...] = (),
        summaries_b: tuple[Span, ...] = (),
        rubric_items: tuple[RubricItem, ...] = (),
        error: FormatError = FormatError.OK,
    ) -> None: ...
    @property
    def answer(self) -> Literal["A", "B", "tie"] | None: ...
    @property
    def task_type(self) -> Literal["chat", "reasoning"] | None: ...
    @property
    def solution(self) -> Span | None: ...
    @property
    def rubric(self) -> Span | None: ...
    @property
    def justify(self) -> Span | None: ...
    @property
    def evaluation(self) -> Span | None: ...
    @property
    def answer_span(self) -> Span | None: ...
    @property
    def quotes_a(self) -> tuple[Span, ...]: ...
    @property
    def quotes_b(self) -> tuple[Span, ...]: ...
    @property
    def summaries_a(self) -> tuple[Span, ...]: ...
    @property
    def summaries_b(self) -> tuple[Span, ...]: ...
    @property
    def rubric_items(self) -> tuple[RubricItem, ...]: ...
    @property
    def error(self) -> FormatError: ...
    @property
    def well_formed(self) -> bool: ...

def parse_verdict(text: str, rule: str, allow_tie: bool) -> Verdict: ...
def parse_verdicts(
    texts: tuple[str, ...], threads: int, rule: str, allow_tie: bool
) -> list[Verdict]: ...

# --- CPU kernels. Arrays are CPU tensors, float32 and contiguous unless said otherwise. ------------

def isa() -> Literal["baseline", "avx2", "avx512"]:
    """The instruction set that the kernels use."""

def force_isa(name: str) -> bool:
    """For tests: use this instruction set, or the "best" one. False if the machine lacks it."""

def logit_stats(
    z: Tensor,
    first: int,
    targets: Tensor,
    peak: Tensor,
    sum: Tensor,
    dot: Tensor | None,
    target: Tensor,
    threads: int,
) -> None:
    """Add a tile of logits [R, C] (rows at any stride) to running statistics; csrc/token_logprob.h."""

def logit_gradient(
    z: Tensor,
    first: int,
    targets: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    on_logprob: Tensor | None,
    on_entropy: Tensor | None,
    threads: int,
) -> None:
    """Overwrite a tile of logits [R, C] with the gradient of the loss; csrc/token_logprob.h."""

def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    ref: Tensor | None,
    rollout: Tensor | None,
    offsets: Tensor,
    advantages: Tensor,
    weights: Tensor,
    settings: list[float],
    slope: Tensor,
) -> tuple[float, ...]:
    """Loss and nine sums; writes the slope [T]; csrc/policy_loss.h."""

def group_advantages(
    rewards: Tensor,
    offsets: Tensor,
    divide_by_std: bool,
    leave_one_out: bool,
    token_offsets: Tensor | None,
    out: Tensor,
    eps: float,
) -> None:
    """Write the advantages of samples or tokens into `out`; csrc/group_advantage.h."""

def swiglu(gate: Tensor, up: Tensor, out: Tensor, threads: int) -> None:
    """Write silu(gate) * up, [R, I] each; csrc/swiglu.h."""

def swiglu_backward(
    on_out: Tensor, gate: Tensor, up: Tensor, on_gate: Tensor, on_up: Tensor, threads: int
) -> None:
    """Write the gradients of gate and up, [R, I] each; csrc/swiglu.h."""

def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor,
    groups: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    threads: int,
) -> None:
    """Write attention, [T, N, D], and its log-sum-exp, [T, N]; csrc/packed_attention.h."""

def packed_attention_backward(
    on_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    groups: Tensor,
    scale: float,
    on_q: Tensor,
    on_k: Tensor,
    on_v: Tensor,
    threads: int,
) -> None:
    """Write the gradients of q, k and v; csrc/packed_attention.h."""

def rmsnorm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    sum: Tensor | None,
    y: Tensor,
    scale: Tensor | None,
    eps: float,
    threads: int,
) -> None:
    """Write the norm of x [R, H], or of x + added and that sum too; csrc/rmsnorm.h."""

def rmsnorm_backward(
    on_y: Tensor,
    on_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    on_x: Tensor,
    on_weight: Tensor,
    threads: int,
) -> None:
    """Write the gradient of x and partial sums [P, H] of the weight's; csrc/rmsnorm.h."""

def rope(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, back: bool, threads: int) -> None:
    """Turn x [T, N, D] into y; csrc/rope.h."""

def sample(
    logits: Array,
    keys: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    tokens: Array,
    logprobs: Array,
    sampled_logprobs: Array,
    threads: int,
) -> None:
    """Draw a token a row of logits [B, V] (rows at any stride); csrc/sample.h."""

def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, threads: int) -> None:
    """Write x [M, K] weight [N, K]^T + bias into out [M, N]; csrc/linear.h."""

def kv_store(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    threads: int,
) -> None:
    """Write keys and values [T, K, D] into a layer's cache; csrc/kv_store.h."""

def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    query_starts: Tensor,
    out: Tensor,
    scale: float,
    threads: int,
) -> None:
    """Attention of q [T, N, D] over a layer's paged cache into `out`; csrc/paged_attention.h."""

def checksum(bytes: Tensor, threads: int) -> int:
    """Of uint8 [N], 64 bits; csrc/checksum.h."""

class Decoder:
    """All layers of a decoder for a step's tokens, over a paged cache; csrc/decoder.h."""

    def __init__(self, sizes: list[int], eps: float, weights: list[Tensor | None]) -> None: ...
    def run(
        self,
        tokens: Array,
        positions: Array,
        slots: Array,
        block_tables: Array,
        context_lengths: Array,
        query_starts: Array,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        wanted: Array,
        hidden: Tensor,
        threads: int,
    ) -> None:
        """Write the hidden states of the wanted tokens [W] into `hidden` [W, H]."""

    def seconds(self) -> list[float]:
        """Spent so far on norms, attention's projections, attention, MLPs."""
