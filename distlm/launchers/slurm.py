"""Target slurm: the run is a batch job, sent by sbatch from a login node. What the job does is in `distlm.slurm`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig, slurm_time_s
from distlm.errors import InfrastructureError, InputError, Problem
from distlm.launchers.base import Job, JobState, JobStatus, Request
from distlm.launchers.files import check_files
from distlm.launchers.shares import Hosts, check_hosts
from distlm.launchers.slurm_script import batch_script, cpus_per_node
from distlm.launchers.slurm_states import num_jobs_before, status_of_accounting, status_of_job
from distlm.run_folder import RunFolder

_TIMEOUT_S = 60.0
_SBATCH = ("sbatch", "--parsable")
_MINUTE_S = 60


class SlurmLauncher:
    """See `distlm.launchers.base.QueueLauncher`."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        yield from contradictions(config)
        yield from _check_slurm(config)

    def check_here(self, config: RunConfig) -> Iterator[Problem]:
        yield from self.check(config)
        yield from check_files(config)

    def build(self, config: RunConfig, run: RunFolder) -> Request:
        header = (f"Run {run.run_id} of distlm. `distlm status {run.path}` tells how it goes.",)
        output = f"{str(run.path).replace('%', '%%')}/{_log(run, '%j').name}"
        return Request(_SBATCH, batch_script(config, [str(run.path)], header, output))

    def render(self, config: RunConfig, path: Path, overrides: list[str]) -> Request:
        what = [str(path), *overrides]
        header = (
            f'A run of {path} ("{config.name}") under Slurm: sbatch it in the folder from which that path leads there.',
            "",
            "Printed by:",
            f"  distlm render {shlex.join(what)} --target slurm",
            "To edit: the options below (most clusters want --partition and --account, too), and the lines that make",
            "`python` the one that distlm is installed for. Better: their keys in the section `slurm` of the config,",
            "which `distlm submit --target slurm` uses as well. Each sbatch begins a new run; what it prints is in",
            "slurm-JOBID.out, and `distlm list` names it.",
        )
        return Request(_SBATCH, batch_script(config, what, header, None))

    def submit(self, request: Request, folder: Path) -> Job:
        answer = _ask(request.command, request.script, folder)
        if answer.returncode != 0:
            raise InputError(f"sbatch refuses the job: {_words(answer)}")
        return Job("slurm", answer.stdout.strip().partition(";")[0])

    def status(self, job: Job) -> JobStatus:
        try:
            shown = _ask(("scontrol", "show", "job", "--oneliner", job.id))
            if shown.returncode == 0:
                status = status_of_job(shown.stdout)
                return self._with_place_in_queue(job, status) if status.state == JobState.PENDING else status
            if "Invalid job id" not in shown.stderr:
                return JobStatus(JobState.UNKNOWN, reason=f"Slurm does not answer: {_words(shown)}")
            kept = _ask(
                ("sacct", "--jobs", job.id, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
            )
        except (InputError, InfrastructureError) as error:
            return JobStatus(JobState.UNKNOWN, reason=str(error))
        return status_of_accounting(kept.stdout if kept.returncode == 0 else "")

    def _with_place_in_queue(self, job: Job, status: JobStatus) -> JobStatus:
        """How many jobs of the same partition come before it."""
        columns = "JobID:32,State:32,Partition:128,PriorityLong:32"
        try:
            queue = _ask(("squeue", "--noheader", "--states=PENDING", "--array", f"--Format={columns}"))
        except (InputError, InfrastructureError):
            return status
        before = num_jobs_before(queue.stdout, job.id) if queue.returncode == 0 else None
        place = "" if before is None else f"{before or 'no'} job{'s' * (before != 1)} before it in its partition"
        return JobStatus(status.state, status.target_state, "; ".join(filter(None, (status.reason, place))))

    def output(self, job: Job, run: RunFolder) -> str:
        try:
            return _log(run, job.id).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def cancel(self, job: Job, *, saves: bool) -> bool:
        answer = _ask(("scancel", job.id))
        if answer.returncode != 0:
            raise InfrastructureError(f"scancel {job.id}: {_words(answer)}")
        return True

    def no_more_starts(self, job: Job) -> None:
        return

    def logs_there(self, job: Job, arguments: Sequence[str]) -> None:
        return None


def _log(run: RunFolder, job_id: str) -> Path:
    return run.path / f"slurm-{job_id}.log"


def _check_slurm(config: RunConfig) -> Iterator[Problem]:
    slurm, resources = config.slurm, config.resources
    yield from check_hosts(
        config,
        Hosts(
            "node", "slurm.nodes", slurm.nodes, "slurm.gpus_per_node", slurm.gpus_per_node,
            "slurm.cpus_per_node", cpus_per_node(config),
        ),
    )  # fmt: skip
    if slurm.time is not None and slurm_time_s(slurm.time) < resources.time_to_save_s + 2 * _MINUTE_S:
        message = (
            f"nothing could be trained: the workers are to save resources.time_to_save_s = "
            f"{resources.time_to_save_s:g} s before that, and Slurm may tell them a minute earlier"
        )
        yield Problem(message, "slurm.time", slurm.time)


def _ask(command: Sequence[str], content: str = "", folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. Raises InputError where it is not installed, InfrastructureError where it hangs."""
    if shutil.which(command[0]) is None:
        raise InputError(
            f"{command[0]} is not installed here; use the target slurm on a node of the cluster that has it, such as "
            "its login node"
        )
    try:
        return subprocess.run(
            command, input=content, cwd=folder, capture_output=True, encoding="utf-8", errors="replace",
            timeout=_TIMEOUT_S, check=False,
            env={**os.environ, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InfrastructureError(f"{command[0]} has not answered in {_TIMEOUT_S:.0f} s") from None


def _words(answer: subprocess.CompletedProcess[str]) -> str:
    """What a command of Slurm says about its failure, in one line."""
    lines = [line.strip() for line in (answer.stderr or answer.stdout).splitlines() if line.strip()]
    return "; ".join(lines) or f"exit code {answer.returncode}"
