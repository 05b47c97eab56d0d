"""How a batch is cut into micro-batches of about equal size, the same number for every rank.

Under ZeRO all ranks gather weights and reduce gradients together, so they need as many passes as
one another, and the largest micro-batch of a row of them is what all wait for.

A run is (first, last) of the batch's sequences. Runs keep the order of the batch, so the samples of
a prompt stay together wherever they can, and share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rmr1.engine.packing import Group

Run = tuple[int, int]


def shares(groups: Sequence[Group], max_tokens: int, ranks: int = 1) -> list[list[Run | None]]:
    """Of each rank its runs, in order, of at most `max_tokens` tokens (or one longer sequence).

    They are consecutive, of as little difference in tokens as there can be, and equally many for
    every rank: where there are fewer sequences than that, the last ranks have None.
    """
    count = -(-len(_fill(groups, max_tokens)) // ranks) * ranks
    runs: list[Run | None] = [*_even(groups, max_tokens, count)]
    runs += [None] * (-len(runs) % ranks)
    each = len(runs) // ranks
    return [runs[rank * each : (rank + 1) * each] for rank in range(ranks)]


def _even(groups: Sequence[Group], max_tokens: int, count: int) -> list[Run]:
    """`count` runs whose largest is as small as can be; fewer where there are fewer sequences."""
    low, high = 1, max_tokens
    while low < high:  # the smallest cap that needs no more than `count` runs
        cap = (low + high) // 2
        low, high = (low, cap) if len(_fill(groups, cap)) <= count else (cap + 1, high)
    runs = _fill(groups, high)
    while len(runs) < count:
        cuttable = [index for index, (first, last) in enumerate(runs) if last - first > 1]
        if not cuttable:
            break
        index = max(cuttable, key=lambda one: runs[one][1] - runs[one][0])
        first, last = runs[index]
        middle = (first + last) // 2
        runs[index : index + 1] = [(first, middle), (middle, last)]
    return runs


def _fill(groups: Sequence[Group], max_tokens: int) -> list[Run]:
    """As few runs of at most `max_tokens` tokens as there can be, filled from the front.

    A group that is cut has its prompt in every part.
    """
    runs: list[Run] = []
    first = sequence = tokens = 0
    for group in groups:
        missing = group.prompt  # this run has no token of the prompt yet
        for response in group.responses:
            if sequence > first and tokens + missing + response > max_tokens:
                runs.append((first, sequence))
                first, tokens, missing = sequence, 0, group.prompt
            tokens += missing + response
            missing = 0
            sequence += 1
    if first < sequence:
        runs.append((first, sequence))
    return runs
