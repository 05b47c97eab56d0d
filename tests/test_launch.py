"""What launchers tell a process: which rank it is, of how many, and where they meet."""

from __future__ import annotations

import re

import pytest

from rmr1.engine.launch import Launch, first_node, launched

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
# Of a step; what srun sets besides is of no interest.
SLURM = {
    "SLURM_JOB_ID": "4000123",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
    "SLURM_NTASKS": "6",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def sentence(environment: dict[str, str]) -> str:
    """What a launch that cannot be meant is refused with."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        launched(environment)
    told = str(caught.value)
    assert "\n" not in told
    assert ". " not in told
    return told


def test_nobody_launched_it() -> None:
    assert launched({}) is None
    assert launched({"PATH": "/bin", "MASTER_ADDR": "somewhere", "RANK": "1"}) is None


def test_torchrun_and_deepspeed() -> None:
    assert launched(TORCHRUN) == Launch(5, 8, 1, "10.0.0.7", 29500)
    deepspeed = {**TORCHRUN, "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "8"}
    assert launched(deepspeed) == launched(TORCHRUN)
    # Inside of an allocation of Slurm, they are nearer than it.
    assert launched({**SLURM, **TORCHRUN}) == launched(TORCHRUN)


def test_one_process_is_alone() -> None:
    assert launched({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    one = {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
    assert launched(one) is None


def test_srun() -> None:
    assert launched(SLURM) == Launch(3, 6, 1, "gpu03", 20_123)
    assert launched(without(SLURM, "SLURM_STEP_NODELIST")) == Launch(3, 6, 1, "gpu01", 20_123)
    given = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"}
    assert launched({**SLURM, **given}) == Launch(3, 6, 1, "10.1.1.1", 1234)
    assert launched({**without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), **given})
    # What is set to nothing is not given.
    assert launched({**SLURM, "MASTER_ADDR": "", "MASTER_PORT": ""}) == launched(SLURM)


def test_jobs_on_one_node_meet_at_different_ports() -> None:
    ports = set()
    for job in range(4_000_000, 4_000_050):
        place = launched({**SLURM, "SLURM_JOB_ID": str(job)})
        assert place is not None
        assert 1024 < place.port < 65536
        ports.add(place.port)
    assert len(ports) == 50


def test_outside_of_a_step_a_script_runs_alone() -> None:
    """The script of sbatch and the shell of salloc know the job, but have no number in it."""
    script = without(SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    assert launched(script) is None  # sbatch sets even SLURM_PROCID: to 0
    assert launched({**script, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("a,b", "a"),
        ("a,b[1-2]", "a"),
        ("node7", "node7"),
        ("node-7.site.org,node-8.site.org", "node-7.site.org"),
        ("rack2-gpu[001-128]", "rack2-gpu001"),
        ("", None),
        (None, None),
    ],
)
def test_the_first_node_of_a_list(nodes: str | None, first: str | None) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("name", without(TORCHRUN, "WORLD_SIZE"))
def test_what_torchrun_left_out_is_named(name: str) -> None:
    for damaged in (without(TORCHRUN, name), {**TORCHRUN, name: ""}):
        told = sentence(damaged)
        assert f"the launcher set WORLD_SIZE but not {name};" in told
        assert "torchrun, deepspeed or srun" in told
    assert "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT;" in sentence({"WORLD_SIZE": "2"})


def test_what_srun_left_out_is_named() -> None:
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        told = sentence(without(SLURM, name))
        assert f"the launcher set SLURM_STEP_NUM_TASKS but not {name};" in told
    told = sentence(without(SLURM, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    assert "not SLURM_STEP_NODELIST;" in told


@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        *((TORCHRUN, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")),
        *((SLURM, f"SLURM_{name}") for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "JOB_ID")),
    ],
)
@pytest.mark.parametrize("value", ["two", "1.5", "0x2", "-"])
def test_what_is_no_number_is_named(launcher: dict[str, str], name: str, value: str) -> None:
    assert sentence({**launcher, name: value}) == f"{name} must be a number, got {value!r}"


def test_a_port_that_is_no_number_is_named_by_srun_too() -> None:
    told = sentence({**SLURM, "MASTER_PORT": "http"})
    assert told == "MASTER_PORT must be a number, got 'http'"


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("0", "0"), ("0", "-2")])
def test_a_rank_that_cannot_be(rank: str, size: str) -> None:
    told = sentence({**TORCHRUN, "RANK": rank, "WORLD_SIZE": size})
    assert told == f"RANK is {rank} in a job of {size} ranks; start it anew"
    told = sentence({**SLURM, "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size})
    assert re.match(rf"SLURM_PROCID is {rank} in a job of {size} ranks", told)
