"""The first half of a GRPO step: which groups are drawn, which are kept, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.phases import Phases
from rmr1.engine.ranks import Ranks
from rmr1.engine.weights import load_model
from rmr1.group_sampling import Drawn, GroupSampler, Samples, Task
from rmr1.models import load_tokenizer

CPU = torch.device("cpu")
N = 2  # samples of a prompt


@dataclass
class Recorder:
    """In a generator's place: sample s of prompt [p] is the tokens p, s."""

    calls: list[tuple[list[list[int]], SamplingParams]] = field(default_factory=list)

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[list[Rollout]]:
        self.calls.append((prompts, params))
        return [
            [
                Rollout([p[0], s], [-0.5, -s - 1.0], "", "length" if p[0] % 2 else "stop")
                for s in range(params.n)
            ]
            for p in prompts
        ]


def tasks_of(*prompts: int) -> list[Task]:
    return [Task([prompt], f"about {prompt}") for prompt in prompts]


def teaches_above(limit: int) -> Any:
    """A reward that tells the samples of a prompt apart if its number is at least `limit`."""

    def reward(tasks: Sequence[Task], rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        for task, rollout in zip(tasks, rollouts, strict=True):
            assert task.token_ids[0] == rollout.token_ids[0]
            assert task.about == f"about {rollout.token_ids[0]}"
        right = [
            float(rollout.token_ids[1]) if task.token_ids[0] >= limit else 1.0
            for task, rollout in zip(tasks, rollouts, strict=True)
        ]
        # Lengths always differ: they do not make a group one that teaches.
        long = [-0.5 * rollout.token_ids[1] for rollout in rollouts]
        return {"right": torch.tensor(right), "length": torch.tensor(long)}

    return reward


def sampler(recorder: Recorder, *, prompts: int = 3, rounds: int = 0) -> GroupSampler:
    generator = cast(Generator, recorder)
    return GroupSampler(
        generator, SamplingParams(n=N, max_new_tokens=2), prompts, rounds, Ranks(), Phases(CPU)
    )


def draw(
    prompts: Sequence[int], teaching_from: int, *, wanted: int = 3, rounds: int = 0
) -> tuple[Drawn, Recorder, list[int]]:
    """What a step drew, whom it asked, and the prompts that it left."""
    recorder, stream = Recorder(), iter(tasks_of(*prompts))
    made = sampler(recorder, prompts=wanted, rounds=rounds)
    drawn = made.draw(stream, teaches_above(teaching_from), seed=7)
    return drawn, recorder, [task.token_ids[0] for task in stream]


def numbers(samples: Samples) -> list[int]:
    """The prompts, after a look at whether everything stands where it belongs."""
    found = [prompt[0] for prompt in samples.prompts]
    assert samples.token_ids == [[p, s] for p in found for s in range(N)]
    assert samples.logprobs == [[-0.5, -s - 1.0] for p in found for s in range(N)]
    assert samples.cut.tolist() == [bool(p % 2) for p in found for s in range(N)]
    assert samples.groups.tolist() == [i for i in range(len(found)) for _ in range(N)]
    assert samples.rewards.dtype == torch.float32
    assert samples.rewards.shape == (len(found) * N,)
    return found


def asked(recorder: Recorder) -> list[tuple[list[int], int]]:
    """Of each call the prompts, and the number in the step of the first one."""
    assert all(params.seed == 7 and params.n == N for _, params in recorder.calls)
    return [([p[0] for p in prompts], params.first_prompt) for prompts, params in recorder.calls]


def test_without_rounds_everything_that_was_drawn_is_learnt_from() -> None:
    drawn, recorder, left = draw(range(5), 100)
    assert asked(recorder) == [([0, 1, 2], 0)]
    assert numbers(drawn.samples) == numbers(drawn.chosen) == [0, 1, 2]
    assert not drawn.chosen.teaching.any()
    assert left == [3, 4]
    assert [task.token_ids[0] for task, _ in drawn.own] == [0, 0, 1, 1, 2, 2]
    assert [rollout.token_ids[1] for _, rollout in drawn.own] == [0, 1] * 3


def test_groups_of_equal_reward_give_way() -> None:
    """Of 0 to 9 only from 5 on they teach: 3, then 3 for nothing, then what is missing."""
    drawn, recorder, left = draw([0, 5, 1, 2, 6, 3, 7, 8, 9], 5, rounds=5)
    assert asked(recorder) == [([0, 5, 1], 0), ([2, 6], 3), ([3], 5), ([7], 6)]
    assert numbers(drawn.samples) == [0, 5, 1, 2, 6, 3, 7]
    assert drawn.samples.teaching.tolist() == [False, True, False, False, True, False, True]
    assert numbers(drawn.chosen) == [5, 6, 7]
    assert drawn.chosen.rewards.tolist() == [0.0, 0.5] * 3
    assert left == [8, 9]
    assert [task.token_ids[0] for task, _ in drawn.own[::N]] == [0, 5, 1, 2, 6, 3, 7]


def test_what_is_missing_after_all_rounds_is_filled_up() -> None:
    """By the first ones of equal reward; the order is that of the draws."""
    drawn, recorder, left = draw([0, 1, 5, 2, 3, 6, 4, 8], 5, wanted=3, rounds=1)
    assert asked(recorder) == [([0, 1, 5], 0), ([2, 3], 3)]
    assert numbers(drawn.chosen) == [0, 1, 5]
    assert left == [6, 4, 8]
    drawn, _, _ = draw([0, 1, 5, 2, 6, 3], 5, wanted=3, rounds=1)
    assert numbers(drawn.chosen) == [0, 5, 6]
    drawn, _, _ = draw([0, 1, 2, 3, 4, 0, 1, 2, 3], 5, wanted=3, rounds=2)
    assert numbers(drawn.chosen) == [0, 1, 2]
    assert len(drawn.samples.prompts) == 9


def test_where_everything_teaches_no_round_is_made() -> None:
    drawn, recorder, left = draw(range(5, 12), 5, rounds=4)
    assert asked(recorder) == [([5, 6, 7], 0)]
    assert numbers(drawn.chosen) == [5, 6, 7]
    assert left == [8, 9, 10, 11]


def test_a_stream_that_ends_ends_the_rounds() -> None:
    drawn, recorder, left = draw([0, 5, 1, 2], 5, rounds=4)
    assert asked(recorder) == [([0, 5, 1], 0), ([2], 3)]
    assert numbers(drawn.chosen) == [0, 5, 1]
    assert left == []
    drawn, recorder, _ = draw([0, 5], 5, rounds=4)  # fewer than are wanted
    assert asked(recorder) == [([0, 5], 0)]
    assert numbers(drawn.samples) == numbers(drawn.chosen) == [0, 5]


@pytest.mark.parametrize("shape", [(), (5,), (6, 1), (7,), (3, 2)])
def test_a_reward_gives_one_number_a_rollout(shape: tuple[int, ...]) -> None:
    made = sampler(Recorder())
    with pytest.raises(ValueError, match="it must have one number for each") as caught:
        made.draw(
            iter(tasks_of(0, 1, 2)), lambda tasks, rollouts: {"r": torch.zeros(shape)}, seed=0
        )
    assert f"shape {list(shape)} for 6 rollouts" in str(caught.value)


def test_rewards_are_kept_in_fp32() -> None:
    made = sampler(Recorder(), prompts=1)
    drawn = made.draw(
        iter(tasks_of(4)), lambda tasks, rollouts: {"r": torch.tensor([1, 0])}, seed=7
    )  # as somebody's own reward may count
    assert numbers(drawn.chosen) == [4]
    assert drawn.chosen.rewards.tolist() == [1.0, 0.0]


@pytest.fixture(scope="module")
def rewarded() -> Samples:
    """Four groups of 2; the second and the last one teach."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0, -1.0, 0.5, 0.25])
    tokens = [[p, s] for p in range(4) for s in range(N)]
    logprobs = [[-0.5, -s - 1.0] for _ in range(4) for s in range(N)]
    cut = torch.tensor([p % 2 == 1 for p in range(4) for _ in range(N)])
    return Samples([[p] for p in range(4)], tokens, logprobs, {"right": rewards}, cut)


def test_samples_by_group(rewarded: Samples) -> None:
    assert rewarded.teaching.tolist() == [False, True, False, True]
    assert numbers(rewarded) == [0, 1, 2, 3]
    some = rewarded.only([3, 1])
    assert numbers(some) == [3, 1]
    assert some.rewards.tolist() == [0.5, 0.25, 0.0, 1.0]
    assert some.teaching.tolist() == [True, True]
    both = some.and_these(rewarded.only([0]))
    assert numbers(both) == [3, 1, 0]
    assert both.rewards.tolist() == [0.5, 0.25, 0.0, 1.0, 1.0, 1.0]
    assert both.teaching.tolist() == [True, True, False]
    assert numbers(rewarded) == [0, 1, 2, 3]  # left as it was


def test_parts_of_the_prompts_draw_what_the_whole_draws(tiny_model: Path) -> None:
    """As the ranks of a job share them, and as rounds follow on each other: every bit."""
    model, tokenizer = load_model(tiny_model), load_tokenizer(tiny_model)
    prompts = [[3, 7, 8, 9], [3, 10], [3, 7, 8, 9], [12], [3, 4, 5, 6, 7, 8, 9, 10]]
    params = {"n": 3, "max_new_tokens": 6, "seed": 11}

    def generate(run: range) -> list[list[Rollout]]:
        generator = Generator(model, tokenizer, kv_memory_gb=0.1)
        sampling = SamplingParams(**params, first_prompt=run.start)  # type: ignore[arg-type]
        return generator.generate(prompts[run.start : run.stop], sampling)

    whole = generate(range(5))
    assert whole[0] != whole[2]  # the same prompt at another place draws anew
    for size in (2, 3, 7):
        shares = [Ranks(rank, size).share(5) for rank in range(size)]
        assert [rollouts for share in shares for rollouts in generate(share)] == whole
    assert generate(range(3, 5)) != whole[:2]
