"""As which rank of a job this process was started: by torchrun, `deepspeed`, or Slurm's srun.

No torch: the command line asks before it knows whether there is anything to train.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """A rank of `size`, number `local_rank` on its machine; rank 0 listens at address:port."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher said; None for a process that was started alone.

    torchrun and `deepspeed` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun
    sets SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID and the step's node list, whose first
    node is taken where MASTER_ADDR is not given. The shell of `salloc` and the script of `sbatch`
    are in no such step, so a command without srun there runs alone.

    Raises:
        ValueError: some of these are set and others are missing, or are no numbers.
    """
    if "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return _checked(environment, {name: environment.get(name) for name in names})
    if "SLURM_STEP_NUM_TASKS" in environment:
        job = _number("SLURM_JOB_ID", environment.get("SLURM_JOB_ID", "0"))
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST"))
        given = {
            "SLURM_PROCID": environment.get("SLURM_PROCID"),
            "SLURM_STEP_NUM_TASKS": environment["SLURM_STEP_NUM_TASKS"],
            "SLURM_LOCALID": environment.get("SLURM_LOCALID"),
            "SLURM_STEP_NODELIST": environment.get("MASTER_ADDR") or first_node(nodes),
            # Jobs that share a node get different ports.
            "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + job % 20_000),
        }
        return _checked(environment, given)
    return None


def first_node(nodes: str | None) -> str | None:
    """The first host of a Slurm node list: `gpu[03-05,9],cpu1` is gpu03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes or "")
    return found.group(1) + (found.group(2) or "") if found else None


def _checked(environment: Mapping[str, str], given: dict[str, str | None]) -> Launch | None:
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise ValueError(
            f"the launcher set {_set(environment)} but not {', '.join(missing)}; start the job with"
            " torchrun, deepspeed or srun"
        )
    rank, size, local, address, port = given.items()
    found = Launch(_number(*rank), _number(*size), _number(*local), str(address[1]), _number(*port))
    if not 0 <= found.rank < found.size:
        raise ValueError(f"{rank[0]} is {found.rank} in a job of {found.size} ranks; start it anew")
    return found if found.size > 1 else None


def _set(environment: Mapping[str, str]) -> str:
    names = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    return next(name for name in names if name in environment)


def _number(name: str, value: str | None) -> int:
    try:
        return int(value or "")
    except ValueError:
        raise ValueError(f"{name} must be a number, got {value!r}") from None
