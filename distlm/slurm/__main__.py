"""`python -m distlm.slurm RUN_FOLDER` or `python -m distlm.slurm CONFIG [KEY=VALUE ...]`, in a batch script: run the
next attempt of the run, or of a new run, and exit with the code of its end.

If the job is told (SIGUSR2, by --signal=B:USR2@SECONDS) that its time will be over before the training is, the workers
save and the job goes back into the queue. A job that begins again, for that or because Slurm has lost a node or needed
its nodes, goes on with its run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distlm.checkpoint.store import CheckpointStore
from distlm.compile_caches import keep_compile_caches
from distlm.config.attempt import load_attempt
from distlm.console import exit_code_of, say
from distlm.errors import ExitCode, InputError
from distlm.job_run import JobName, final_code, next_attempt, run_of_config, starts_in_vain
from distlm.launchers.base import Job
from distlm.launchers.local import require_packages
from distlm.launchers.slurm import SlurmLauncher
from distlm.launchers.supervise import wait_for_attempt
from distlm.run_folder import RunFolder
from distlm.slurm.allocation import Allocation
from distlm.slurm.launcher import AllocationLauncher
from distlm.stop_count import signals_held
from distlm.view.kept import KeptView
from distlm.view.plain import PlainView

_ABANDONED = "the job was ended by Slurm before it could save (a node lost, or no time left)"


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        raise InputError("usage: python -m distlm.slurm RUN_FOLDER, or CONFIG [KEY=VALUE ...]")
    allocation = Allocation.from_environ(os.environ)
    require_packages()
    name = JobName("slurm", allocation.job_id)
    run = _run(name, allocation, Path(arguments[0]), list(arguments[1:]))
    if (final := final_code(run)) is not None:
        say(f"run {run.run_id} has ended before with exit code {final}; nothing to do")
        return final
    attempt = next_attempt(run, name, SlurmLauncher().check_here, _ABANDONED)
    job = Job("slurm", allocation.job_id, allocation.num_restarts, CheckpointStore(run.checkpoints).newest_step())
    job.write(attempt)
    keep_compile_caches(run)  # for all nodes, which get this environment
    launcher, view = AllocationLauncher(allocation), KeptView(PlainView(sys.stdout))
    code = wait_for_attempt(run, attempt, view, launcher, shows_ending=True)
    if code == ExitCode.PREEMPTED and launcher.first_signal == signal.SIGUSR2:
        with signals_held():  # which come at once then
            said = _requeue(run, job, load_attempt(run, attempt).config.slurm.max_requeues)
            view.keep(said)
            say(said)
    return code


def _run(name: JobName, allocation: Allocation, what: Path, overrides: list[str]) -> RunFolder:
    """The run of this job: the one named, or the one that it made of the config when it began first, or a new one."""
    if (what / "run.yaml").is_file():
        return RunFolder(what.absolute())
    if what.is_dir() or (not what.exists() and not what.suffix):
        raise InputError(
            f"the run's folder {what} is not there on {os.uname().nodename}: every node of the job must see it; set "
            "runs_dir to a folder on shared storage"
        )
    check, has_begun = SlurmLauncher().check_here, allocation.num_restarts > 0
    return run_of_config(what, overrides, name, check, may_have_begun=has_begun)


def _requeue(run: RunFolder, job: Job, max_requeues: int) -> str:
    """Put the job back into the queue, if that makes sense; what was done."""
    if job.num_restarts >= max_requeues:
        return f"the job has begun again {job.num_restarts} times (slurm.max_requeues); it ends here"
    if starts_in_vain(run, JobName(job.target, job.id)) > 1:
        return "no step was saved in the job's time, twice; it ends here: give it more time with slurm.time"
    done = subprocess.run(("scontrol", "requeue", job.id), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"the job could not be put back into the queue: {' '.join((done.stderr or done.stdout).split())}"
    return f"the job goes back into the queue, to go on (restart {job.num_restarts + 1} of {max_requeues})"


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
