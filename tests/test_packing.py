"""Packed batches against plain loops over their sequences."""

from __future__ import annotations

import pytest
import torch

from rmr1.engine.balance import _fill
from rmr1.engine.packing import Batch, Group, pack

PROMPTS = [[1, 2, 3], [4], [5, 6], [1, 2, 3], [7, 8, 9, 10]]
RESPONSES = [[11, 12], [13, 14, 15], [16], [17, 18, 19, 20], [21]]
ADVANTAGES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
# The value of a log-probability names its token, so that a shift shows.
LOGPROBS = [[-float(token) for token in row] for row in RESPONSES]


def batch() -> Batch:
    made = pack(PROMPTS, RESPONSES, advantages=ADVANTAGES, rollout_logprobs=LOGPROBS)
    assert made.rollout_logprobs is not None
    return made.with_logprobs(old=made.rollout_logprobs * 2, ref=made.rollout_logprobs * 3)


def test_fields_against_plain_loops() -> None:
    made = batch()
    tokens, positions, predict, targets, owners = [], [], [], [], []
    for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for position, token in enumerate(prompt + response):
            if position >= len(prompt):
                predict.append(len(tokens) - 1)
                targets.append(token)
                owners.append(index)
            tokens.append(token)
            positions.append(position)
    assert made.token_ids.tolist() == tokens
    assert made.positions.tolist() == positions
    assert made.predict_index.tolist() == predict
    assert made.targets.tolist() == targets
    assert made.responses.sequence_ids.tolist() == owners
    assert made.prompt_lengths == [3, 1, 2, 3, 4]
    assert made.tokens == len(tokens) == 24
    assert made.response_lengths == [2, 3, 1, 4, 1]
    assert made.response_tokens == 11
    # The token before each target belongs to the same sequence: position 0 is never a target.
    assert all(made.positions[index + 1] == made.positions[index] + 1 for index in predict)
    assert made.rollout_logprobs is not None
    assert made.rollout_logprobs.tolist() == [-float(token) for token in targets]


def check_part(part: Batch, first: int, last: int) -> None:
    """A part is what packing its sequences alone gives."""
    alone = pack(PROMPTS[first:last], RESPONSES[first:last], advantages=ADVANTAGES[first:last])
    assert part.groups == alone.groups
    for name in ("token_ids", "advantages", "positions", "predict_index", "targets"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    assert torch.equal(part.responses.sequence_ids, alone.responses.sequence_ids)
    for factor, values in (
        (1, part.rollout_logprobs),
        (2, part.old_logprobs),
        (3, part.ref_logprobs),
    ):
        assert values is not None
        assert values.tolist() == [-float(token) * factor for token in alone.targets]


def test_every_slice_is_the_batch_of_its_sequences() -> None:
    made = batch()
    for first in range(5):
        for last in range(first + 1, 6):
            check_part(made.slice(first, last), first, last)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_split_covers_all_in_order_and_evenly(parts: int) -> None:
    first = 0
    sizes = []
    for part in batch().split(parts):
        check_part(part, first, first + len(part.groups))
        sizes.append(len(part.groups))
        first += len(part.groups)
    assert first == 5
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("parts", [0, 6])
def test_split_into_too_many_parts_is_an_error(parts: int) -> None:
    with pytest.raises(ValueError, match=f"5 sequences cannot be cut into {parts}"):
        list(batch().split(parts))


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1, [1, 1, 1, 1, 1]), (9, [2, 1, 1, 1]), (12, [3, 2]), (24, [5]), (7, [1, 2, 1, 1])],
)
def test_micro_batches_fill_up_to_the_limit(limit: int, sizes: list[int]) -> None:
    first = 0
    found = [batch().slice(*run) for run in _fill(batch().groups, limit)]
    assert [len(part.groups) for part in found] == sizes
    for part in found:
        assert part.tokens <= limit or len(part.groups) == 1
        check_part(part, first, first + len(part.groups))
        first += len(part.groups)


# --- Groups --------------------------------------------------------------------------------------

SHARED = [[1, 2, 3], [4, 5]]
SAMPLES = [[11, 12], [13], [14, 15, 16], [21], [22, 23], [24]]


def shared() -> Batch:
    made = pack(
        SHARED,
        SAMPLES,
        samples=3,
        advantages=torch.arange(6.0),
        rollout_logprobs=[[-float(token) for token in row] for row in SAMPLES],
    )
    assert made.rollout_logprobs is not None
    return made.with_logprobs(old=made.rollout_logprobs * 2, ref=made.rollout_logprobs * 3)


def test_a_prompt_lies_there_once() -> None:
    made = shared()
    assert made.groups == (Group(3, (2, 1, 3)), Group(2, (1, 2, 1)))
    assert made.token_ids.tolist() == [1, 2, 3, 11, 12, 13, 14, 15, 16, 4, 5, 21, 22, 23, 24]
    assert made.positions.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 2, 3, 2]
    assert made.predict_index.tolist() == [2, 3, 2, 2, 6, 7, 10, 10, 12, 10]
    assert made.targets.tolist() == [token for row in SAMPLES for token in row]
    assert made.responses.sequence_ids.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 5]
    assert made.tokens == 15
    assert made.response_tokens == 10
    assert made.prompt_lengths == [3, 3, 3, 2, 2, 2]


def check_shared_part(part: Batch, first: int, last: int) -> None:
    """Every sequence of a part is prompt and response, and brings its own figures."""
    prompts = [SHARED[index // 3] for index in range(first, last)]
    tokens, positions = part.token_ids, part.positions
    assert part.prompt_lengths == [len(prompt) for prompt in prompts]
    assert part.targets.tolist() == [token for row in SAMPLES[first:last] for token in row]
    assert part.advantages.tolist() == list(range(first, last))
    token = sequence = 0
    for group in part.groups:
        expected = prompts[sequence]
        assert tokens[token : token + group.prompt].tolist() == expected
        token += group.prompt
        for count in group.responses:
            assert tokens[token : token + count].tolist() == SAMPLES[first + sequence]
            assert positions[token].item() == len(expected)
            token, sequence = token + count, sequence + 1
    assert token == part.tokens == len(tokens)
    assert sequence == last - first
    predicted = [SAMPLES[index] for index in range(first, last)]
    before = [[prompt[-1], *row[:-1]] for prompt, row in zip(prompts, predicted, strict=True)]
    assert tokens[part.predict_index].tolist() == [one for row in before for one in row]
    for factor, values in (
        (1, part.rollout_logprobs),
        (2, part.old_logprobs),
        (3, part.ref_logprobs),
    ):
        assert values is not None
        assert values.tolist() == [-float(token) * factor for token in part.targets]


def test_every_slice_of_groups_has_its_prompts() -> None:
    made = shared()
    for first in range(6):
        for last in range(first + 1, 7):
            check_shared_part(made.slice(first, last), first, last)


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, [1] * 6), (6, [2, 1, 3]), (9, [3, 3]), (14, [5, 1]), (15, [6])]
)
def test_micro_batches_count_a_prompt_once(limit: int, sizes: list[int]) -> None:
    first = 0
    found = [shared().slice(*run) for run in _fill(shared().groups, limit)]
    assert [len(part.response_lengths) for part in found] == sizes
    for part in found:
        count = len(part.response_lengths)
        assert part.tokens <= limit or count == 1
        check_shared_part(part, first, first + count)
        first += count


def test_whole_groups_are_views() -> None:
    made = shared()
    for part in (made.slice(0, 6), made.slice(3, 6), made.slice(0, 2)):
        assert (
            part.token_ids.untyped_storage().data_ptr()
            == made.token_ids.untyped_storage().data_ptr()
        )


def test_batch_without_extras() -> None:
    made = pack(PROMPTS, RESPONSES)
    assert made.advantages.tolist() == [0.0] * 5
    assert made.slice(1, 3).rollout_logprobs is None


@pytest.mark.parametrize(
    ("prompts", "responses", "words"),
    [
        ([[1]], [], "1 prompts but 0 responses; give one each"),
        ([[1], []], [[2], [3]], "sequence 1 has an empty prompt"),
        ([[1], [2]], [[], [3]], "sequence 0 has an empty response"),
    ],
)
def test_bad_input_is_named(
    prompts: list[list[int]], responses: list[list[int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pack(prompts, responses)


def test_figures_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="2 advantages for 5 sequences"):
        pack(PROMPTS, RESPONSES, advantages=torch.zeros(2))
    for rows in (LOGPROBS[:4], [*LOGPROBS[:2], [-1.0, -2.0], *LOGPROBS[3:]], LOGPROBS[::-1]):
        with pytest.raises(ValueError, match="one number for each response token"):
            pack(PROMPTS, RESPONSES, rollout_logprobs=rows)
