"""The first half of a GRPO step: sample a group of responses to each prompt, and reward them.

Each rank samples and rewards its run of the prompts; afterwards all ranks know all samples. With
dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) groups whose samples are all as right as one
another, which teach nothing, give way to those of new prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from rmr1.engine.generator import Generator, Rollout, SamplingParams
from rmr1.engine.out_of_memory import advising
from rmr1.engine.phases import Phases
from rmr1.engine.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and whatever the reward has to know about it."""

    token_ids: list[int]
    about: Any


# Of N rollouts, each with the task that it is an answer to: the parts of their rewards by name, [N]
# each. They are summed. The first says how right a sample is: groups that differ only in the others
# (a length) do not count as ones that teach. The names are always the same, with N = 0 too.
Reward = Callable[[Sequence[Task], Sequence[Rollout]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Samples:
    """P groups of G samples, those of a prompt side by side: N = P x G."""

    prompts: list[list[int]]  # P
    token_ids: list[list[int]]  # N
    logprobs: list[list[float]]  # N, as the generator drew them
    parts: dict[str, Tensor]  # of the rewards, [N] fp32 each
    cut: Tensor  # [N] bool, ended by the cap of their length

    @property
    def groups(self) -> Tensor:
        """The prompt of each sample, [N] int64."""
        prompts = len(self.prompts)
        return torch.arange(prompts).repeat_interleave(len(self.token_ids) // prompts)

    @property
    def rewards(self) -> Tensor:
        """The sum of the parts, [N] fp32."""
        return torch.stack(list(self.parts.values())).sum(dim=0)

    @property
    def teaching(self) -> Tensor:
        """Whether some samples of a group are more right than others, [P] bool."""
        return _differ(next(iter(self.parts.values())), len(self.prompts))

    @property
    def rewarded_alike(self) -> Tensor:
        """Whether all samples of a group have the same reward, [P] bool."""
        return ~_differ(self.rewards, len(self.prompts))

    def only(self, prompts: Sequence[int]) -> Samples:
        """Some of the groups."""
        each = len(self.token_ids) // len(self.prompts)
        rows = [prompt * each + sample for prompt in prompts for sample in range(each)]
        return Samples(
            [self.prompts[prompt] for prompt in prompts],
            [self.token_ids[row] for row in rows],
            [self.logprobs[row] for row in rows],
            {name: part[rows] for name, part in self.parts.items()},
            self.cut[rows],
        )

    def and_these(self, more: Samples) -> Samples:
        """These groups, then others."""
        return Samples(
            self.prompts + more.prompts,
            self.token_ids + more.token_ids,
            self.logprobs + more.logprobs,
            {name: torch.cat([part, more.parts[name]]) for name, part in self.parts.items()},
            torch.cat([self.cut, more.cut]),
        )


def _differ(values: Tensor, prompts: int) -> Tensor:
    groups = values.view(prompts, -1)
    return (groups != groups[:, :1]).any(dim=1)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was sampled in a step, what of it the policy learns from, and this rank's rollouts."""

    samples: Samples
    chosen: Samples
    own: list[tuple[Task, Rollout]]


@dataclass(frozen=True, slots=True)
class GroupSampler:
    """Samples `prompts` groups a step; `rounds` times more where groups teach nothing."""

    generator: Generator
    sampling: SamplingParams
    prompts: int
    rounds: int
    ranks: Ranks
    phases: Phases

    def draw(self, tasks: Iterator[Task], reward: Reward, *, seed: int) -> Drawn:
        """Take prompts from `tasks`, the same on every rank, and sample and reward them.

        After all rounds, groups that teach nothing fill what is missing.
        """
        samples, own = self._round(list(islice(tasks, self.prompts)), reward, seed, first=0)
        for _ in range(self.rounds):
            missing = self.prompts - int(samples.teaching.sum())
            fresh = list(islice(tasks, missing))
            if not fresh:
                break
            more, own_more = self._round(fresh, reward, seed, first=len(samples.prompts))
            samples, own = samples.and_these(more), own + own_more
        # A stable sort: what teaches comes first, then the rest, both as they were drawn.
        order = torch.sort((~samples.teaching).int(), stable=True).indices
        chosen = sorted(order[: self.prompts].tolist())
        return Drawn(samples, samples.only(chosen), own)

    def _round(
        self, tasks: list[Task], reward: Reward, seed: int, *, first: int
    ) -> tuple[Samples, list[tuple[Task, Rollout]]]:
        """Groups for these tasks, of which `first` came before in the step."""
        share = self.ranks.share(len(tasks))
        mine = tasks[share.start : share.stop]
        # A sample's noise depends on its prompt's number in the step, not on who draws it.
        sampling = replace(self.sampling, seed=seed, first_prompt=first + share.start)
        with self.phases("rollout"), advising("lower rollout.kv_memory_gb"):
            prompts = [task.token_ids for task in mine]
            rollouts = list(chain(*self.generator.generate(prompts, sampling)))
        with self.phases("reward"):
            answered = [task for task in mine for _ in range(sampling.n)]
            parts = reward(answered, rollouts)
            for name, part in parts.items():
                if part.shape != (len(rollouts),):
                    raise ValueError(
                        f"reward {name!r} is a tensor of shape {list(part.shape)} for"
                        f" {len(rollouts)} rollouts; it must have one number for each"
                    )
        everything = self._exchange([task.token_ids for task in tasks], rollouts, parts)
        return everything, list(zip(answered, rollouts, strict=True))

    def _exchange(
        self, prompts: list[list[int]], rollouts: list[Rollout], parts: dict[str, Tensor]
    ) -> Samples:
        """The samples of all ranks."""
        cut = torch.tensor([one.finish_reason == "length" for one in rollouts], dtype=torch.bool)
        token_ids = [one.token_ids for one in rollouts]
        logprobs = [one.logprobs for one in rollouts]
        if self.ranks.size > 1:
            gather = self.ranks.gather
            lengths = gather(torch.tensor([len(row) for row in token_ids], dtype=torch.int64))
            tokens = gather(torch.tensor(list(chain(*token_ids)), dtype=torch.int64))
            values = gather(torch.tensor(list(chain(*logprobs)), dtype=torch.float32))
            sizes = lengths.tolist()
            token_ids = [run.tolist() for run in tokens.split(sizes)]
            logprobs = [run.tolist() for run in values.split(sizes)]
            cut = gather(cut.to(torch.int64)).bool()
        found = {name: self.ranks.gather(part.float()) for name, part in parts.items()}
        return Samples(prompts, token_ids, logprobs, found, cut)
