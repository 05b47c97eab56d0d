"""The verifiable reward: +1 when the verdict names the better answer, -1 otherwise.

A judgment without a verdict earns -1 as well. A reward for the format made no significant
difference in the paper, so there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rmr1.data import Pair
from rmr1.verdict import Verdict


def correctness(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> Tensor:
    """Rewards [N] of N verdicts; `pairs` are in order, each repeated for its samples."""
    return torch.tensor(
        [
            1.0 if verdict.answer == pair.label else -1.0
            for verdict, pair in zip(verdicts, pairs, strict=True)
        ]
    )


def overlong(lengths: Sequence[int], limit: int, buffer: int) -> Tensor:
    """DAPO's soft punishment, [N]: 0 up to limit - buffer tokens, then down to -1 at the limit.

    Source: Yu et al. (arXiv 2503.14476), equation 13. `buffer` 0 punishes nobody.
    """
    over = torch.tensor(lengths, dtype=torch.float32) - (limit - buffer)
    return -(over / buffer).clamp(0, 1) if buffer else torch.zeros(len(lengths))
