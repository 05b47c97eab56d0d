"""A batch of prompts and responses, packed end to end without padding.

Only the hidden states that predict a response token reach the head: `predict_index` picks them.
Shapes: S sequences, T tokens in all, R response tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Responses:
    """The response tokens of a batch, or some of them, as a loss sees them; R of them."""

    sequence_ids: Tensor  # [R] int64, into the S sequences of the batch
    advantages: Tensor  # [S] fp32
    rollout_logprobs: Tensor | None  # [R] fp32, as in `Batch`
    old_logprobs: Tensor | None  # [R] fp32
    ref_logprobs: Tensor | None  # [R] fp32

    def rows(self, rows: slice) -> Responses:
        """Some of the tokens, as views."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            sequence_ids=self.sequence_ids[rows],
            rollout_logprobs=cut(self.rollout_logprobs),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences, each a prompt and its response.

    `rollout_logprobs`, `old_logprobs` and `ref_logprobs` belong to response tokens, in order:
    from the generator, from the policy before the update, and from the reference model.
    """

    token_ids: Tensor  # [T] int64
    lengths: tuple[int, ...]  # S lengths of prompt + response
    prompt_lengths: tuple[int, ...]  # S
    advantages: Tensor  # [S] fp32
    rollout_logprobs: Tensor | None = None  # [R] fp32
    old_logprobs: Tensor | None = None  # [R] fp32
    ref_logprobs: Tensor | None = None  # [R] fp32

    @property
    def response_lengths(self) -> list[int]:
        """Response tokens of each sequence, S numbers."""
        return [n - p for n, p in zip(self.lengths, self.prompt_lengths, strict=True)]

    @property
    def response_tokens(self) -> int:
        """R, the number of tokens that carry loss."""
        return sum(self.lengths) - sum(self.prompt_lengths)

    @property
    def positions(self) -> Tensor:
        """Position of every token within its sequence, [T]."""
        return torch.cat([torch.arange(n) for n in self.lengths]).to(self.token_ids.device)

    @property
    def predict_index(self) -> Tensor:
        """Where the hidden states stand that predict response tokens, [R] into T."""
        starts = _starts(self.lengths)[:-1]
        index = torch.cat(
            [
                torch.arange(start + prompt - 1, start + length - 1)
                for start, prompt, length in zip(
                    starts, self.prompt_lengths, self.lengths, strict=True
                )
            ]
        )
        return index.to(self.token_ids.device)

    @property
    def targets(self) -> Tensor:
        """The response tokens, [R]."""
        return self.token_ids[self.predict_index + 1]

    @property
    def responses(self) -> Responses:
        """What a loss sees."""
        counts = torch.tensor(self.response_lengths)
        sequences = torch.arange(len(self.lengths)).repeat_interleave(counts)
        return Responses(
            sequence_ids=sequences.to(self.token_ids.device),
            advantages=self.advantages,
            rollout_logprobs=self.rollout_logprobs,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
        )

    def with_logprobs(self, *, old: Tensor | None = None, ref: Tensor | None = None) -> Batch:
        """The same batch with the log-probabilities that the loss compares with, each [R]."""
        return replace(self, old_logprobs=old, ref_logprobs=ref)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""

        def move(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return replace(
            self,
            token_ids=self.token_ids.to(device),
            advantages=self.advantages.to(device),
            rollout_logprobs=move(self.rollout_logprobs),
            old_logprobs=move(self.old_logprobs),
            ref_logprobs=move(self.ref_logprobs),
        )

    def slice(self, first: int, last: int) -> Batch:
        """Sequences first..last-1, as views."""
        starts = _starts(self.lengths)
        responses = _starts(self.response_lengths)
        rows = slice(responses[first], responses[last])

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return Batch(
            token_ids=self.token_ids[starts[first] : starts[last]],
            lengths=self.lengths[first:last],
            prompt_lengths=self.prompt_lengths[first:last],
            advantages=self.advantages[first:last],
            rollout_logprobs=cut(self.rollout_logprobs),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
        )

    def split(self, parts: int) -> Iterator[Batch]:
        """Cut into `parts` runs of sequences whose counts differ by one at most."""
        total = len(self.lengths)
        if not 1 <= parts <= total:
            raise ValueError(
                f"a batch of {total} sequences cannot be cut into {parts} minibatches; lower"
                " minibatches or sample more"
            )
        for part in range(parts):
            yield self.slice(part * total // parts, (part + 1) * total // parts)

    def micro_batches(self, max_tokens: int) -> Iterator[Batch]:
        """Cut into runs of at most `max_tokens` tokens (one longer sequence stands alone)."""
        first, tokens = 0, 0
        for index, length in enumerate(self.lengths):
            if index > first and tokens + length > max_tokens:
                yield self.slice(first, index)
                first, tokens = index, 0
            tokens += length
        if first < len(self.lengths):
            yield self.slice(first, len(self.lengths))


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    advantages: Tensor | None = None,
    rollout_logprobs: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Pack prompts and responses pairwise, in order.

    ValueError for an empty prompt or response: there would be nothing to predict from, or nothing
    to predict; and for advantages or log-probabilities that do not fit the sequences.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; give one each")
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not response:
            raise ValueError(f"sequence {index} has an empty {'response' if prompt else 'prompt'}")
    if advantages is not None and advantages.shape != (len(prompts),):
        raise ValueError(f"{advantages.numel()} advantages for {len(prompts)} sequences")
    flat: list[int] = []
    for prompt, response in zip(prompts, responses, strict=True):
        flat.extend(prompt)
        flat.extend(response)
    logprobs = None
    if rollout_logprobs is not None:
        if [len(row) for row in rollout_logprobs] != [len(response) for response in responses]:
            raise ValueError("rollout_logprobs must give one number for each response token")
        logprobs = torch.tensor([value for row in rollout_logprobs for value in row])
    return Batch(
        token_ids=torch.tensor(flat, dtype=torch.int64),
        lengths=tuple(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)),
        prompt_lengths=tuple(len(prompt) for prompt in prompts),
        advantages=torch.zeros(len(prompts)) if advantages is None else advantages,
        rollout_logprobs=logprobs,
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    """Running sums, one longer than `lengths`."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts
