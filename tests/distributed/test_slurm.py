"""What a task of srun makes of Slurm's variables."""

import pytest
import torch

from tsumugu.distributed.environment import _gpu
from tsumugu.distributed.slurm import adopt_step, first_host
from tsumugu.errors import UserError

# As slurmd 22.05 gives them to a task of `srun --nodes=2 --ntasks-per-node=4`.
STEP = {
    "SLURM_JOB_ID": "40001",
    "SLURM_JOB_NODELIST": "gpu-[001-002]",
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-[001-002]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


def test_a_task_gets_what_torchrun_would_have_set(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(96)))
    variables = dict(STEP)
    adopt_step(variables)
    assert variables == STEP | {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu-001",
        "MASTER_PORT": str(15000 + 40001 - 2 * 15000),
        "OMP_NUM_THREADS": "24",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "3"},  # under torchrun, which srun started
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_others_are_left_alone(changes):
    variables = STEP | changes
    adopt_step(variables)
    assert variables == STEP | changes


def test_the_shell_of_a_job_is_no_step():
    job = {key: value for key, value in STEP.items() if not key.startswith("SLURM_STEP")} | {"SLURM_NTASKS": "8"}
    variables = dict(job)
    adopt_step(variables)
    assert variables == job


def test_what_is_set_already_stays():
    variables = STEP | {"MASTER_PORT": "29500", "OMP_NUM_THREADS": "2"}
    adopt_step(variables)
    assert (variables["MASTER_PORT"], variables["OMP_NUM_THREADS"]) == ("29500", "2")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("gpu-[007-012,20],login", "gpu-007"),
        ("ip-10-1-[3,77]-9", "ip-10-1-3-9"),
        ("rack[2-4]n[01-16],rack9n01", "rack2n01"),  # several dimensions
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_a_gpu_of_its_own_for_every_process():
    assert [_gpu(rank, 8) for rank in (0, 7)] == [0, 7]
    assert _gpu(5, 1) == 0  # the one that Slurm shows this task
    with pytest.raises(UserError, match="local rank 4: this host has 4 GPUs"):
        _gpu(4, 4)
    assert torch.device("cuda", _gpu(1, 2)).index == 1
