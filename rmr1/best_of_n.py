"""The best of n answers from comparisons of two: by round robin, or by knockout.

A judge is asked in batches: `compare` gets all pairs of a round at once and says of each pair
(i, j) "A" (i is better), "B" (j is), "tie", or None where no verdict could be read. A round robin
is one batch of n (n - 1) / 2 pairs. A knockout is n - 1 pairs in as many rounds as n halves; it
finds the best at a fraction of the cost, and says less about the rest.

Who is shown first is drawn by lot. In a round robin everybody is shown first in half of the own
comparisons (give or take one), so a judge that only goes by position makes everybody equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any, Literal

from rmr1.answers import Answers
from rmr1.data import Message
from rmr1.engine.sampling import SamplingParams
from rmr1.judge import Answer, Judge, Placement, judge_pairs, pair_of, placements_of, vote
from rmr1.prompts import Prompt

Method = Literal["round_robin", "knockout"]
Compare = Callable[[Sequence[tuple[int, int]]], Sequence[Answer | None]]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Candidates by place. `order` lists them, best first; `places[i]` is candidate i's place.

    Candidates of one place are equal: in `order` they stand as they were drawn by lot. `wins[i]`
    counts won comparisons, a comparison without a winner as half a win for either in a round
    robin. `undecided` are the compared pairs that had none: ties and unreadable verdicts.
    """

    order: tuple[int, ...]
    places: tuple[int, ...]
    wins: tuple[float, ...]
    comparisons: int
    undecided: tuple[tuple[int, int], ...]

    @property
    def best(self) -> int:
        """The first in `order`."""
        return self.order[0]

    def to_json(self, answers: Sequence[str]) -> dict[str, Any]:
        """The answers with place and wins, best first, and what was compared."""
        ranked = [
            {"place": self.places[i], "wins": self.wins[i], "index": i, "answer": answers[i]}
            for i in self.order
        ]
        return {
            "best": self.best,
            "ranking": ranked,
            "tied": [list(group) for group in self.tied],
            "comparisons": self.comparisons,
            "undecided": len(self.undecided),
        }

    @property
    def tied(self) -> tuple[tuple[int, ...], ...]:
        """Groups of candidates that share a place, best first."""
        groups = [tuple(i for i in self.order if self.places[i] == place)
                  for place in sorted(set(self.places))]  # fmt: skip
        return tuple(group for group in groups if len(group) > 1)


def ranked(method: Method, candidates: int, compare: Compare, *, seed: int = 0) -> Ranking:
    """By the tournament of that name."""
    tournament = round_robin if method == "round_robin" else knockout
    return tournament(candidates, compare, seed=seed)


def go_on(
    method: Method,
    candidates: int,
    verdicts: Mapping[tuple[int, int], Answer | None],
    *,
    seed: int = 0,
) -> Ranking | tuple[tuple[int, int], ...]:
    """The ranking, or the comparisons that it still needs, for who judges many tournaments at once.

    A tournament is plain code that cannot wait. What it asks for depends on its seed and on what it
    was told, so it is run anew with the verdicts there are until it asks for others.
    """

    def told(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
        unknown = tuple(pair for pair in pairs if pair not in verdicts)
        if unknown:
            raise _Unknown(unknown)
        return [verdicts[pair] for pair in pairs]

    try:
        return ranked(method, candidates, told, seed=seed)
    except _Unknown as asked:
        return asked.pairs


class _Unknown(Exception):
    def __init__(self, pairs: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.pairs = pairs


def round_robin(candidates: int, compare: Compare, *, seed: int = 0) -> Ranking:
    """Everybody against everybody, once: the most wins rank first.

    Equal wins are decided by the comparisons among the equal, and if these are level too, the
    candidates share a place. ValueError without candidates.
    """
    lot = _lots(candidates, seed)
    pairs = []
    for i, j in combinations(range(candidates), 2):
        # On a circle in the order of the lots, each is shown first against the half that follows.
        ahead = (lot[j] - lot[i]) % candidates
        first = lot[i] < lot[j] if 2 * ahead == candidates else 2 * ahead < candidates
        pairs.append((i, j) if first else (j, i))
    won = dict(zip(pairs, _asked(compare, pairs), strict=True))
    wins = _points(range(candidates), won)
    keys = []
    for i in range(candidates):
        equal = [j for j in range(candidates) if wins[j] == wins[i]]
        keys.append((-wins[i], -_points(equal, won)[i]))
    return Ranking(
        order=tuple(sorted(range(candidates), key=lambda i: (keys[i], lot[i]))),
        places=tuple(1 + sum(other < key for other in keys) for key in keys),
        wins=tuple(wins[i] for i in range(candidates)),
        comparisons=len(pairs),
        undecided=tuple(pair for pair in pairs if won[pair] not in ("A", "B")),
    )


def knockout(candidates: int, compare: Compare, *, seed: int = 0) -> Ranking:
    """Winners go on until one is left: n - 1 comparisons, a round of them at a time.

    The bracket is drawn by lot. Where n is no power of two some candidates have a bye in the first
    round, so nobody has two. Where a comparison names no winner the lot decides. Who loses in the
    same round shares a place. ValueError without candidates.
    """
    lot = _lots(candidates, seed)
    left = sorted(range(candidates), key=lot.__getitem__)
    wins, lost_in = [0.0] * candidates, [0] * candidates  # 0: in none
    undecided: list[tuple[int, int]] = []
    rounds = comparisons = 0
    while len(left) > 1:
        rounds += 1
        byes = (1 << (len(left) - 1).bit_length()) - len(left)
        playing = left[byes:]
        random = Random(f"{seed}/{rounds}")
        drawn = zip(playing[::2], playing[1::2], strict=True)
        pairs = [(j, i) if random.random() < 0.5 else (i, j) for i, j in drawn]
        comparisons += len(pairs)
        through = []
        for (i, j), said in zip(pairs, _asked(compare, pairs), strict=True):
            if said not in ("A", "B"):
                undecided.append((i, j))
                winner = min(i, j, key=lot.__getitem__)
            else:
                winner = i if said == "A" else j
                wins[winner] += 1
            lost_in[j if winner == i else i] = rounds
            through.append(winner)
        left = left[:byes] + through
    stayed = [lost if lost else rounds + 1 for lost in lost_in]
    return Ranking(
        order=tuple(sorted(range(candidates), key=lambda i: (-stayed[i], lot[i]))),
        places=tuple(1 + sum(other > own for other in stayed) for own in stayed),
        wins=tuple(wins),
        comparisons=comparisons,
        undecided=tuple(undecided),
    )


def comparer(
    model: Answers,
    asked: str | Sequence[Message],
    answers: Sequence[str],
    *,
    prompt: Prompt,
    sampling: SamplingParams,
    placements: Sequence[Placement] = ("ab",),
) -> Compare:
    """`compare` by a judge: a batch of pairs becomes one batch of prompts.

    `sampling.n` votes are taken in each placement and the majority counts, equal numbers being a
    tie: with both placements, a judge that goes by position alone says tie. ValueError when a
    prompt is too long for the model.
    """

    def compare(pairs: Sequence[tuple[int, int]]) -> list[Answer | None]:
        shown = [pair_of(asked, answers[i], answers[j]) for i, j in pairs]
        samples = judge_pairs(model, shown, prompt=prompt, sampling=sampling, placements=placements)
        each = sampling.n * len(placements)
        return [vote(samples[at : at + each]).verdict for at in range(0, len(samples), each)]

    return compare


def rank(
    judge: Judge,
    asked: str | Sequence[Message],
    answers: Sequence[str],
    *,
    method: Method = "round_robin",
    votes: int = 1,
    swap: bool = False,
    seed: int = 0,
) -> Ranking:
    """Order several answers to a prompt with a judge; see `Judge.compare` for votes and swap.

    Raises:
        ValueError: fewer than two answers, a malformed argument, a prompt too long for the model.
    """
    if len(answers) < 2:
        raise ValueError(f"a ranking needs at least two answers, got {len(answers)}")
    compare = comparer(
        judge.model,
        asked,
        answers,
        prompt=judge.prompt,
        sampling=judge.sampling(votes),
        placements=placements_of(swap=swap),
    )
    return ranked(method, len(answers), compare, seed=seed)


def _lots(candidates: int, seed: int) -> list[int]:
    """A place in a random order for each candidate."""
    if candidates < 1:
        raise ValueError(f"there must be at least one candidate, got {candidates}")
    lots = list(range(candidates))
    Random(f"{seed}/bracket").shuffle(lots)
    return lots


def _asked(compare: Compare, pairs: Sequence[tuple[int, int]]) -> Sequence[Answer | None]:
    said = compare(pairs) if pairs else []
    if len(said) != len(pairs):
        raise ValueError(f"compare must answer each of {len(pairs)} pairs, got {len(said)} answers")
    return said


def _points(among: Sequence[int], won: dict[tuple[int, int], Answer | None]) -> dict[int, float]:
    """Wins of each, in the comparisons between them."""
    points = dict.fromkeys(among, 0.0)
    for (i, j), said in won.items():
        if i in points and j in points:
            points[i] += {"A": 1.0, "B": 0.0}.get(said or "", 0.5)
            points[j] += {"A": 0.0, "B": 1.0}.get(said or "", 0.5)
    return points
