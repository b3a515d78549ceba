"""A task of `srun` finds its rank: Slurm's variables become those that torchrun sets.

Every task does so for itself and inside the step, so that a step that Slurm starts again, on other nodes if need be,
finds its first node anew. Imports nothing heavy: it comes before torch, which reads OMP_NUM_THREADS once.
"""

import os
import re
from collections.abc import MutableMapping

_PORTS = range(15000, 30000)  # below those that systems give to connections by themselves


def adopt_step(variables: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in a step of several tasks, one a device.

    Nothing is touched under torchrun, in the shell of a job (which is no step), and in a step of one task, such as a
    shell on a node: there the process is the only one, or somebody else's. OMP_NUM_THREADS, where it is not set, is
    this task's share of the cores. MASTER_PORT may be set beforehand.

    Args:
        variables: Environment variables; those of Slurm are described in srun(1), "Output environment variables".
    """
    tasks = int(variables.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "RANK" in variables:
        return
    variables["RANK"] = variables["SLURM_PROCID"]
    variables["WORLD_SIZE"] = str(tasks)
    variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]
    variables["MASTER_ADDR"] = first_host(variables["SLURM_STEP_NODELIST"])
    variables.setdefault("MASTER_PORT", str(_PORTS[int(variables["SLURM_JOB_ID"]) % len(_PORTS)]))
    here = int(variables["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0])  # 8(x4), or 8,4
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // here)))


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's short form: gpu-[007-012,20],login → gpu-007."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    assert first
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
