"""What ranks exchange: alone, and three of them joined by gloo; and one that never comes."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rmr1.engine.ranks import Ranks, joined

Run = Callable[..., list[tuple[int, str, str]]]
Start = Callable[..., list[subprocess.Popen[str]]]


def test_alone_every_word_is_its_own() -> None:
    with joined(None, torch.device("cpu")) as ranks:
        assert ranks == Ranks()
    assert ranks.first
    values = torch.tensor([[1.5, -0.0], [math.nan, 2.0]])
    gathered = ranks.gather(values)
    assert torch.equal(gathered.view(torch.int32), values.view(torch.int32))
    assert ranks.gather(torch.empty(0, dtype=torch.int64)).dtype == torch.int64
    figures = {"loss": 1.5, "ratio_max": 3.0, "ratio_min": -1.0}
    assert ranks.reduce(figures) == figures
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.from_first(-7) == -7
    ranks.wait()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 8, 100])
def test_shares_cover_everything_once(size: int, count: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [one for share in shares for one in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def own(rank: int) -> dict[str, Any]:
    """What a rank brings, of lengths 3, 0 and 5."""
    count, noise = (3, 0, 5)[rank], torch.Generator().manual_seed(rank)
    return {
        "bits": torch.randint(-(2**31), 2**31 - 1, (count,), generator=noise, dtype=torch.int32),
        "matrix": torch.randn(count, 4, generator=noise),
        "numbers": torch.randint(-(2**62), 2**62, (count,), generator=noise),
        "figures": {"tokens": 1.5 + rank, "a_max": -2.0 - rank, "b_min": 5.0 - rank, "nan": 0.1},
    }


THREE = f"""
import json
from typing import Any
import torch
from rmr1.engine.launch import launched
from rmr1.engine.ranks import joined

{inspect.getsource(own)}
torch.set_num_threads(1)
with joined(launched(), torch.device("cpu")) as ranks:
    mine = own(ranks.rank)
    found = {{"rank": ranks.rank, "first": ranks.first, "share": list(ranks.share(7))}}
    # Any bits, also those of numbers that are none.
    found["bits"] = ranks.gather(mine["bits"].view(torch.float32)).view(torch.int32).tolist()
    matrix = ranks.gather(mine["matrix"])
    found["matrix"] = matrix.view(torch.int32).tolist()
    numbers = ranks.gather(mine["numbers"])
    found["numbers"] = numbers.tolist()
    found["dtypes"] = [str(matrix.dtype), str(numbers.dtype)]
    found["nothing"] = list(ranks.gather(torch.empty(0, 2)).shape)
    figures = mine["figures"] | {{"nan": float("nan") if ranks.rank == 1 else 0.0}}
    found["reduced"] = ranks.reduce(figures)
    found["any"] = [ranks.any(ranks.rank == 1), ranks.any(False), ranks.any(True)]
    found["first_says"] = ranks.from_first(10 + ranks.rank), ranks.from_first(-ranks.rank - 2**40)
    ranks.wait()
print(json.dumps(found))
"""


def test_three_ranks_exchange_tensors_bit_for_bit(run_ranks: Run) -> None:
    ended = run_ranks([sys.executable, "-c", THREE], 3)
    for status, _, err in ended:
        assert status == 0, err[-3000:]
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in ended]
    brought = [own(rank) for rank in range(3)]
    assert [one.pop("rank") for one in found] == [0, 1, 2]
    assert [one.pop("first") for one in found] == [True, False, False]
    assert [row for one in found for row in one.pop("share")] == list(range(7))
    for one in found:
        assert one["bits"] == torch.cat([each["bits"] for each in brought]).tolist()
        matrix = torch.cat([each["matrix"] for each in brought])
        assert one["matrix"] == matrix.view(torch.int32).tolist()
        assert one["numbers"] == torch.cat([each["numbers"] for each in brought]).tolist()
        assert one["dtypes"] == ["torch.float32", "torch.int64"]
        assert one["nothing"] == [0, 2]
        assert math.isnan(one["reduced"].pop("nan"))
        assert one["reduced"] == {"tokens": 7.5, "a_max": -2.0, "b_min": 3.0}
        assert one["any"] == [True, False, True]
        assert one["first_says"] == [10, -(2**40)]


LONELY = """
import sys
from datetime import timedelta
import torch
from rmr1.engine import ranks
from rmr1.engine.launch import launched

ranks.JOIN = timedelta(seconds=3)
try:
    with ranks.joined(launched(), torch.device("cpu")):
        print("joined")
except ValueError as error:
    print(error)
    sys.exit(2)
"""


def test_a_rank_that_never_comes_is_missed(start_ranks: Start) -> None:
    """Two jobs, of which one rank each was started: the one that listens, and the other."""
    lonely = []
    for rank in (0, 1):
        (process,) = start_ranks(
            [sys.executable, "-c", LONELY], 1, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)
        )
        lonely.append(process)
    for rank, process in enumerate(lonely):
        out, err = process.communicate(timeout=120)  # 3 s, and torch's start
        assert process.returncode == 2, err[-3000:]
        told = out.splitlines()
        assert len(told) == 1, told
        assert told[0].startswith(f"rank {rank} of 2 waited 3 s for the others at 127.0.0.1:")
        assert "see why not all of them started, or start the job anew" in told[0]
        assert "Traceback" not in err
