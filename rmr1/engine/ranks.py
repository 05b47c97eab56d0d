"""The ranks of a job: processes that train one model together. A process alone is a job of one.

Every rank holds the same description of a step (a packed batch is small on the host) and works on
its own part of it. What they exchange is tensors, never pickled objects.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from rmr1.engine.heartbeat import Heartbeat
from rmr1.engine.launch import Launch

JOIN = timedelta(minutes=5)  # in which all ranks must have come
# A rank may wait this long for one that is alive but slow: samples differ in length.
PATIENCE = timedelta(hours=2)


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's number among `size`. `device` is where its tensors are exchanged."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's run of `count` things; the runs differ by one at most.

        Where there are fewer things than ranks the last ranks have none of them, but rank 0 has.
        """
        return range(
            -(-self.rank * count // self.size),
            -(-(self.rank + 1) * count // self.size),
        )

    def gather(self, values: Tensor) -> Tensor:
        """The runs of all ranks one after the other, on the host; they may differ in length.

        `values` is [n] or [n, ...] with the same further sizes and dtype everywhere.
        """
        if self.size == 1:
            return values.cpu()
        own = values.to(self.device).contiguous()
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(own)], device=self.device))
        longest = max(int(count) for count in counts)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        runs = [run[: int(count)] for run, count in zip(found, counts, strict=True)]
        return torch.cat(runs).cpu()

    def reduce(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures that add up over ranks; of those named `_max` or `_min` the extremes.

        Every rank must give the same names.
        """
        if self.size == 1:
            return dict(figures)
        names = sorted(figures)
        rows = torch.tensor([figures[name] for name in names], dtype=torch.float64)  # [F]
        all_rows = self.gather(rows[None])  # [ranks, F]
        found = {}
        for column, name in enumerate(names):
            values = all_rows[:, column]
            if name.endswith("_max"):
                found[name] = values.max().item()
            elif name.endswith("_min"):
                found[name] = values.min().item()
            else:
                found[name] = values.sum().item()
        return found

    def any(self, said: bool) -> bool:
        """Whether any rank said so."""
        return self.reduce({"said_max": float(said)})["said_max"] > 0

    def from_first(self, number: int) -> int:
        """What rank 0 says; the others' number is ignored."""
        return int(self.gather(torch.tensor([number]))[0])

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.reduce({"": 0.0})


class Stopped(KeyboardInterrupt):
    """All ranks have agreed to end, at the same place; a KeyboardInterrupt that one rank may see
    alone is a failure to the others.
    """


@contextmanager
def joined(place: Launch | None, device: torch.device) -> Iterator[Ranks]:
    """The ranks of the job that this process belongs to, while the block runs.

    A rank that raises or dies ends the others within a minute; they say why.

    Raises:
        ValueError: not all ranks came within `JOIN`.
    """
    if place is None:
        yield Ranks()
        return
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed looks for it there
    own = device if device.type == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    store = _meet(place)
    ranks = Ranks(place.rank, place.size, own)
    # A connection of its own: the other may be waiting for a rank while this one beats.
    heartbeat = Heartbeat(store.clone(), place.rank, place.size)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=PATIENCE,
        )
        yield ranks
        ranks.wait()  # rank 0 leaves last: the others' messages go through it
    except Stopped:
        ranks.wait()
        raise
    except BaseException as error:
        heartbeat.fail(str(error) or type(error).__name__)
        raise
    finally:
        heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(place: Launch) -> dist.Store:
    """Meet the others; the store through which they can send words."""
    if place.address in ("127.0.0.1", "localhost") and sys.platform == "linux":
        # gloo would look up the machine's own name, which not every machine can.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    url = f"tcp://{place.address}:{place.port}?rank={place.rank}&world_size={place.size}"
    try:
        # Under torchrun this is its own store, else one that rank 0 opens.
        store, _, _ = next(rendezvous(url, timeout=JOIN))
        came = store.add("rmr1/joined", 1)
        if came == place.size:
            store.set("rmr1/complete", "1")
        store.wait(["rmr1/complete"], JOIN)
    except (dist.DistError, TimeoutError) as error:
        raise ValueError(
            f"rank {place.rank} of {place.size} waited {JOIN.total_seconds():.0f} s for the others"
            f" at {place.address}:{place.port} ({str(error).splitlines()[0]}); see why not all of"
            " them started, or start the job anew"
        ) from None
    return store
