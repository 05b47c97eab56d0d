"""A batch of prompts and responses, packed end to end without padding.

What several responses answer lies there once: a group is a prompt and, after it, its responses.
Only the hidden states that predict a response token reach the head: `predict_index` picks them.

Shapes: S sequences (a prompt with one response each), T tokens in all, R response tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Token counts of a prompt and of the responses behind it."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """All of them, the prompt once."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a whole update, over its micro-batches and ranks: what losses are divided by."""

    tokens: int  # of responses
    sequences: int


@dataclass(frozen=True, slots=True)
class Responses:
    """The response tokens of a batch, or some of them, as a loss sees them; R of them."""

    sequence_ids: Tensor  # [R] int64, into the S sequences of the batch
    lengths: Tensor  # [S] int64, response tokens of each whole sequence
    advantages: Tensor  # [S] fp32
    rollout_logprobs: Tensor | None  # [R] fp32, as in `Batch`
    old_logprobs: Tensor | None  # [R] fp32
    ref_logprobs: Tensor | None  # [R] fp32

    def rows(self, rows: slice) -> Responses:
        """Some of the tokens, as views."""
        return replace(
            self,
            sequence_ids=self.sequence_ids[rows],
            rollout_logprobs=_cut(self.rollout_logprobs, rows),
            old_logprobs=_cut(self.old_logprobs, rows),
            ref_logprobs=_cut(self.ref_logprobs, rows),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed groups, in which every response is a sequence with its prompt.

    `rollout_logprobs`, `old_logprobs` and `ref_logprobs` belong to response tokens, in order:
    from the generator, from the policy before the update, and from the reference model.
    """

    token_ids: Tensor  # [T] int64: of each group its prompt, then its responses
    groups: tuple[Group, ...]
    advantages: Tensor  # [S] fp32
    rollout_logprobs: Tensor | None = None  # [R] fp32
    old_logprobs: Tensor | None = None  # [R] fp32
    ref_logprobs: Tensor | None = None  # [R] fp32

    @property
    def tokens(self) -> int:
        """T, shared prompts counted once."""
        return sum(group.tokens for group in self.groups)

    @property
    def prompt_lengths(self) -> list[int]:
        """Prompt tokens of each sequence, S numbers."""
        return [group.prompt for group in self.groups for _ in group.responses]

    @property
    def response_lengths(self) -> list[int]:
        """Response tokens of each sequence, S numbers."""
        return [count for group in self.groups for count in group.responses]

    @property
    def response_tokens(self) -> int:
        """R, the number of tokens that carry loss."""
        return sum(self.response_lengths)

    @property
    def counts(self) -> Counts:
        """Of this batch, where it is a whole update."""
        return Counts(self.response_tokens, len(self.response_lengths))

    @property
    def positions(self) -> Tensor:
        """Position of every token within its sequence, [T]."""
        runs = []
        for group in self.groups:
            runs.append(torch.arange(group.prompt))
            runs += [torch.arange(group.prompt, group.prompt + n) for n in group.responses]
        return torch.cat(runs).to(self.token_ids.device)

    @property
    def predict_index(self) -> Tensor:
        """Where the hidden states stand that predict response tokens, [R] into T.

        The first token of every response is predicted at the end of its prompt.
        """
        runs = []
        for prompt_end, start, count in self._places():
            runs += [torch.tensor([prompt_end - 1]), torch.arange(start, start + count - 1)]
        return torch.cat(runs).to(self.token_ids.device)

    @property
    def targets(self) -> Tensor:
        """The response tokens, [R]."""
        runs = [self.token_ids[start : start + count] for _, start, count in self._places()]
        return torch.cat(runs)

    @property
    def responses(self) -> Responses:
        """What a loss sees."""
        lengths = torch.tensor(self.response_lengths)
        sequences = torch.arange(len(lengths)).repeat_interleave(lengths)
        return Responses(
            sequence_ids=sequences.to(self.token_ids.device),
            lengths=lengths.to(self.token_ids.device),
            advantages=self.advantages,
            rollout_logprobs=self.rollout_logprobs,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
        )

    def with_logprobs(self, *, old: Tensor | None = None, ref: Tensor | None = None) -> Batch:
        """The same batch with the log-probabilities that the loss compares with, each [R]."""
        return replace(self, old_logprobs=old, ref_logprobs=ref)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, as a file can hold it."""
        given = {
            "token_ids": self.token_ids,
            "prompt_lengths": torch.tensor([group.prompt for group in self.groups]),
            "samples": torch.tensor([len(group.responses) for group in self.groups]),
            "response_lengths": torch.tensor(self.response_lengths),
            "advantages": self.advantages,
            "rollout_logprobs": self.rollout_logprobs,
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
        }
        # One tensor may stand under two names, which files of safetensors do not take.
        return {name: value.clone() for name, value in given.items() if value is not None}

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
        """Sequences first .. last - 1, each with its prompt."""
        lengths = self.response_lengths
        rows = slice(sum(lengths[:first]), sum(lengths[:last]))
        groups, pieces = [], []
        sequence = token = 0  # where the group begins
        for group in self.groups:
            n = len(group.responses)
            a, b = max(first - sequence, 0), min(last - sequence, n)
            if a < b:
                start = token + group.prompt + sum(group.responses[:a])
                end = start + sum(group.responses[a:b])
                pieces += [(token, token + group.prompt), (start, end)]
                groups.append(Group(group.prompt, group.responses[a:b]))
            sequence, token = sequence + n, token + group.tokens
        return Batch(
            token_ids=_gather(self.token_ids, pieces),
            groups=tuple(groups),
            advantages=self.advantages[first:last],
            rollout_logprobs=_cut(self.rollout_logprobs, rows),
            old_logprobs=_cut(self.old_logprobs, rows),
            ref_logprobs=_cut(self.ref_logprobs, rows),
        )

    def split(self, parts: int) -> Iterator[Batch]:
        """Cut into `parts` runs of sequences whose counts differ by one at most."""
        total = len(self.response_lengths)
        if not 1 <= parts <= total:
            raise ValueError(
                f"a batch of {total} sequences cannot be cut into {parts} minibatches; lower"
                " minibatches or sample more"
            )
        for part in range(parts):
            yield self.slice(part * total // parts, (part + 1) * total // parts)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Of each sequence the end of its prompt, and the start and the length of its response."""
        token = 0
        for group in self.groups:
            prompt_end = token = token + group.prompt
            for count in group.responses:
                yield prompt_end, token, count
                token += count


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    samples: int = 1,
    advantages: Tensor | None = None,
    rollout_logprobs: Sequence[Sequence[float]] | None = None,
) -> Batch:
    """Pack prompts and the `samples` responses to each: the first ones belong to the first prompt.

    ValueError for an empty prompt or response: there would be nothing to predict from, or nothing
    to predict; and for counts, advantages or log-probabilities that do not fit.
    """
    if len(prompts) * samples != len(responses):
        each = "one each" if samples == 1 else f"{samples} each"
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; give {each}")
    for index, response in enumerate(responses):
        prompt = prompts[index // samples]
        if not prompt or not response:
            raise ValueError(f"sequence {index} has an empty {'response' if prompt else 'prompt'}")
    if advantages is not None and advantages.shape != (len(responses),):
        raise ValueError(f"{advantages.numel()} advantages for {len(responses)} sequences")
    groups, flat = [], list[int]()
    for index, prompt in enumerate(prompts):
        own = responses[index * samples : (index + 1) * samples]
        groups.append(Group(len(prompt), tuple(len(response) for response in own)))
        for run in (prompt, *own):
            flat.extend(run)
    logprobs = None
    if rollout_logprobs is not None:
        if [len(row) for row in rollout_logprobs] != [len(response) for response in responses]:
            raise ValueError("rollout_logprobs must give one number for each response token")
        logprobs = torch.tensor([value for row in rollout_logprobs for value in row])
    return Batch(
        token_ids=torch.tensor(flat, dtype=torch.int64),
        groups=tuple(groups),
        advantages=torch.zeros(len(responses)) if advantages is None else advantages,
        rollout_logprobs=logprobs,
    )


def _cut(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _gather(tokens: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
    """Runs of tokens one after the other; a view where they lie so already."""
    if all(end == start for (_, end), (start, _) in pairwise(pieces)):
        return tokens[pieces[0][0] : pieces[-1][1]]
    return torch.cat([tokens[start:end] for start, end in pieces])
