"""`launch slurm`: a job script that one can read, from a recipe, a few flags and a site file, and its submission.

The job's one step has a task for every process, and each runs `tsumugu train` itself: signals reach training without a
launcher in between, and its exit codes reach the script. `distributed/slurm.py` tells a task its rank.
"""

import dataclasses
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tsumugu import config as configuration
from tsumugu.config import PrepareConfig, SlurmConfig, SlurmSiteConfig, TrainingRun
from tsumugu.data.batches import check_batch
from tsumugu.data.executor import SLURM_JOBS, unfinished_jobs
from tsumugu.distributed.mesh import degrees
from tsumugu.errors import UserError
from tsumugu.training.checkpoint import complete_steps
from tsumugu.training.trainer import planned_steps

_FOLDER, _SCRIPT, _CONFIG = "slurm", "job.sbatch", "config.yaml"  # in the run folder
_OURS = (
    *("job-name", "nodes", "ntasks-per-node", "exclusive", "signal", "requeue", "open-mode", "output"),
    *("chdir", "partition", "account", "time"),
)


def launch(
    config: TrainingRun,
    run_dir: Path,
    site: SlurmSiteConfig,
    nodes: int,
    processes_per_node: int | None = None,
    time: str | None = None,
    *,
    submit: bool = True,
) -> str:
    """Writes RUN/slurm/job.sbatch, with the configuration beside it, and submits it.

    Args:
        config: Copied into the run, so that what is edited while the job waits does not change it.
        run_dir: The run folder, on a file system that all nodes share.
        site: The cluster.
        nodes: How many.
        processes_per_node: In place of the site's.
        time: In place of the site's.
        submit: False: nothing is written or submitted.

    Returns:
        A line that says what was submitted; with submit False the script.

    Raises:
        UserError: Degrees or a batch that do not go with the number of processes, a time limit that leaves no time, a
            job of this run that is still there, no sbatch, or one that refuses, a credential in recipe or site.
    """
    _refuse_credentials(dataclasses.asdict(config) | {"slurm": dataclasses.asdict(site)})
    run_dir = run_dir.absolute()
    count = processes_per_node or site.processes_per_node
    if count is None:
        raise UserError(
            "how many processes a node runs is not said",
            "set slurm.processes_per_node in the file of --site, or --processes-per-node, to its number of GPUs",
        )
    degrees(config.parallel, nodes * count)
    reading = nodes * count // config.parallel.tensor_degree
    check_batch(config.train.global_batch_size, config.train.micro_batch_size, reading)
    # a run that stops after a step would stop there again for ever
    script = job_script(run_dir, site, nodes, count, time or site.time, requeue=config.train.stop_after is None)
    steps = planned_steps(config)  # most of what can be wrong shows here
    if not submit:
        return script
    if complete_steps(run_dir)[-1:] == [steps]:
        return f"{run_dir}: already done, {steps} steps"
    _require_sbatch()
    folder = run_dir / _FOLDER
    if jobs := unfinished_jobs(folder):
        raise UserError(f"job {jobs[0]} already trains into {run_dir}, or waits to", f"wait, or: scancel {jobs[0]}")
    for name in (folder, run_dir / "logs"):
        name.mkdir(parents=True, exist_ok=True)
    configuration.write(config, folder / _CONFIG)
    (folder / _SCRIPT).write_text(script, encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(folder / _SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"sbatch refuses {folder / _SCRIPT}: {said}", "mend the file of --site, or the flags")
    job = done.stdout.strip().split(";")[0]
    (folder / SLURM_JOBS).write_text(job)
    return f"submitted as job {job}; logs are in {run_dir}/logs: slurm-{job}.log, and rank-N.log of every process"


def job_script(
    run_dir: Path, site: SlurmSiteConfig, nodes: int, processes_per_node: int, time: str | None, *, requeue: bool = True
) -> str:
    """The text of the job script.

    Args:
        run_dir: Absolute.
        site: The cluster.
        nodes: How many.
        processes_per_node: Tasks on each.
        time: Time limit; None: the partition's.
        requeue: Whether the job queues again once it was interrupted.

    Raises:
        UserError: A path that Slurm would change, a time limit that leaves no time, an option that is ours to set.
    """
    if found := re.search(r"[%\\\x00-\x1f\x7f]", str(run_dir)):
        raise UserError(
            f"{run_dir}: {found[0]!r} in the path of a log means something else to Slurm", "choose another --run-dir"
        )
    if time is not None and _seconds(time) <= site.seconds_to_save + 60:
        raise UserError(
            f"a time limit of {time} leaves no time: training is stopped {site.seconds_to_save} s before it",
            "raise it, or lower slurm.seconds_to_save in the file of --site",
        )
    options: dict[str, object] = {
        "job-name": run_dir.name,
        "partition": site.partition,
        "account": site.account,
        "nodes": nodes,
        "ntasks-per-node": processes_per_node,
        "chdir": Path.cwd(),  # which paths in a configuration are relative to
        "exclusive": "" if site.exclusive else None,
        "time": time,
        "signal": f"TERM@{site.seconds_to_save}",
        "requeue" if requeue else "no-requeue": "",
        "open-mode": "append",
        "output": f"{run_dir}/logs/slurm-%j.log",
    }
    for name, value in site.options.items():
        if name in _OURS:
            raise UserError(f"slurm.options.{name} is set", "leave it out: it has a key or flag of its own, or is ours")
        options[name] = value
    directives = [f"#SBATCH {_quoted_option(name, value)}" for name, value in options.items() if value is not None]
    train = ["tsumugu", "train", f"--config={run_dir / _FOLDER / _CONFIG}", f"--run-dir={run_dir}"]
    step = ["srun", "--kill-on-bad-exit=0", "--wait=120", "--cpu-bind=none", "--open-mode=append"]
    step += ["--auto-resume=1"] if site.auto_resume else []
    if site.container and site.container_runtime == "pyxis":
        step.append(f"--container-image={site.container}")
        step += [f"--container-mounts={','.join(site.container_mounts)}"] if site.container_mounts else []
    elif site.container:
        mounts = [f"--bind={mount}" for mount in site.container_mounts]
        train = ["apptainer", "exec", "--nv", *mounts, site.container, *train]
    step.append(f"--output={run_dir}/logs/rank-%t.log")
    return f"""#!/bin/bash
# Written by `tsumugu launch slurm`: trains into {run_dir}
# and goes on from the newest checkpoint there, also when it is submitted again.
{chr(10).join(directives)}

{_setup(site.setup)}

# One task a process. Each finds its rank and the step's first node by itself, so the step may start again elsewhere.
# --signal above reaches the tasks: they save and end with 3. No task is killed for another's exit code: the others may
# still be saving, and have 120 seconds.
echo "$(date): start $((${{SLURM_RESTART_COUNT:-0}} + 1)) on $SLURM_JOB_NODELIST"
{shlex.join(step)} \\
    {shlex.join(train)}
code=$?
echo "$(date): exit code $code"
{_REQUEUE if requeue else ""}exit $code
"""


_REQUEUE = """
# 3: interrupted, and a checkpoint was saved. The job queues again under its number, and Slurm ends this script.
if [ $code = 3 ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 120
fi
"""


def for_preparation(config: PrepareConfig, site: SlurmSiteConfig, time: str | None = None) -> PrepareConfig:
    """The configuration of a preparation on the cluster; a site's values hold where the configuration has none.

    Args:
        config: Any `prepare.executor`.
        site: The cluster.
        time: Time limit of a task, in place of both.

    Raises:
        UserError: A credential in one of them.
    """
    own, default = config.slurm, SlurmConfig()
    account = {"account": site.account} if site.account else {}
    slurm = dataclasses.replace(
        own,
        partition=own.partition or site.partition,
        time=time or (own.time if own.time != default.time else site.time or default.time),
        setup=own.setup or site.setup,
        options=account | site.options | own.options,
    )
    result = dataclasses.replace(config, executor="slurm", slurm=slurm)
    _refuse_credentials({"prepare": dataclasses.asdict(result)})
    return result


def _refuse_credentials(content: dict[str, Any], place: str = "") -> None:
    """Refuses a credential in a recipe or site: it would lie in the job's script, or `config.write` would leave it out.

    Set-up lines may name one: what the shell puts in place of $NAME, ${NAME} and $(COMMAND) is not written.
    """
    for key, value in content.items():
        if isinstance(value, dict):
            _refuse_credentials(value, f"{place}{key}.")
            continue
        written = re.sub(r"\$(\w+|\{[^}]*\}|\([^)]*\))", " ", value) if value and key == "setup" else value
        if configuration.redacted(written) != written:
            raise UserError(
                f"{place}{key} holds what looks like a credential, which no file of a job may hold",
                "leave it out: the job has the environment in which you submit it, such as HF_TOKEN",
            )


def _quoted_option(name: str, value: object) -> str:
    if any(character in f"{name}{value}" for character in "\\\n\r"):
        raise UserError(f"the sbatch option {name} holds a backslash or line end: {value!r}", "write it without")
    return shlex.quote(f"--{name}={value}" if value != "" else f"--{name}")


def _setup(lines: str | None) -> str:
    if lines is not None:
        return lines.strip()
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


def _seconds(time: str) -> float:
    """A time limit in the forms of sbatch(1): M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise UserError(f"the time limit {time} is none", "write it as sbatch takes it, such as 24:00:00 or 2-00:00:00")
    days, *parts = (int(part) for part in found.groups(default="0"))
    if found[1] is None and found[4] is None:  # M or M:S
        parts = [0, *parts[:2]]
    return days * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def _require_sbatch() -> None:
    if not shutil.which("sbatch"):
        raise UserError(
            "there is no sbatch here", "run it on a login node of the cluster, or look at it with --dry-run"
        )
