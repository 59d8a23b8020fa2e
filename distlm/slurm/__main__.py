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
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from distlm.checkpoint.store import CheckpointStore
from distlm.compile_caches import keep_compile_caches
from distlm.config.attempt import begin_attempt, changed_config, create_run, load_attempt
from distlm.config.load import load_config
from distlm.console import exit_code_of, say
from distlm.errors import Cause, ExitCode, InputError
from distlm.launchers.base import JOB_GOES_ON_AFTER, Job
from distlm.launchers.local import end_abandoned, require_packages
from distlm.launchers.slurm import SlurmLauncher
from distlm.launchers.supervise import wait_for_attempt
from distlm.outcome import Outcome
from distlm.run_folder import AttemptFolder, RunFolder, lease, new_run_id, read_json, runs_in
from distlm.run_reference import pin_references
from distlm.slurm.allocation import Allocation
from distlm.slurm.launcher import AllocationLauncher
from distlm.stop_count import signals_held
from distlm.view.kept import KeptView
from distlm.view.plain import PlainView

_TARGET = "resources.target=slurm"
_LEASE_TIMEOUT_S, _LEASE_INTERVAL_S = 180.0, 10.0


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        raise InputError("usage: python -m distlm.slurm RUN_FOLDER, or CONFIG [KEY=VALUE ...]")
    allocation = Allocation.from_environ(os.environ)
    require_packages()
    run = _run(allocation, Path(arguments[0]), list(arguments[1:]))
    if (final := _final_code(run)) is not None:
        say(f"run {run.run_id} has ended before with exit code {final}; nothing to do")
        return final
    attempt = _next_attempt(run)
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


def _run(allocation: Allocation, what: Path, overrides: list[str]) -> RunFolder:
    """The run of this job: the one named, or the one that it made of the config when it began first, or a new one."""
    if (what / "run.yaml").is_file():
        return RunFolder(what.absolute())
    if what.is_dir() or (not what.exists() and not what.suffix):
        raise InputError(
            f"the run's folder {what} is not there on {os.uname().nodename}: every node of the job must see it; set "
            "runs_dir to a folder on shared storage"
        )
    loaded = load_config(what, [*overrides, _TARGET], SlurmLauncher().check_here)
    runs_dir = Path(loaded.config.runs_dir).absolute()
    if allocation.num_restarts and (run := _run_of_job(runs_dir, allocation.job_id)) is not None:
        return run
    loaded = pin_references(loaded)
    run = RunFolder(runs_dir / new_run_id())
    create_run(loaded, run)
    begin_attempt(loaded, run, [*overrides, _TARGET])
    return run


def _run_of_job(runs_dir: Path, job_id: str) -> RunFolder | None:
    for run in runs_in(runs_dir):
        for attempt in reversed(run.attempts()):
            if (job := Job.read(attempt)) is not None and (job.target, job.id) == ("slurm", job_id):
                return run
    return None


def _final_code(run: RunFolder) -> ExitCode | None:
    """The exit code of a run that there is nothing more to do for."""
    attempts = run.attempts()
    result = read_json(attempts[-1].result_json) if attempts else None
    code = ExitCode(result["exit_code"]) if result is not None else None
    return None if code in JOB_GOES_ON_AFTER else code


def _next_attempt(run: RunFolder) -> AttemptFolder:
    """The one that was begun for this job, or a new one after one that was ended. Raises InputError where another
    controller has the run."""
    if not run.attempts():
        raise InputError(f"the run's folder {run.path} has no attempt")
    newest = run.attempts()[-1]
    if not newest.handle_json.exists() and not newest.result_json.exists():
        return newest
    loaded, changes = changed_config(run, [], SlurmLauncher().check_here)
    if loaded.config.resources.target != "slurm":
        loaded, changes = changed_config(run, [_TARGET], SlurmLauncher().check_here)
    with _lease_in_time(run):
        if not newest.result_json.exists():
            text = "the job was ended by Slurm before it could save (a node lost, or no time left)"
            end_abandoned(newest, Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.INFRASTRUCTURE))
        return begin_attempt(loaded, run, [], changes=changes)


@contextmanager
def _lease_in_time(run: RunFolder) -> Iterator[None]:
    """The lease of the run. Shared storage may hold that of a node that is gone for a minute or two. Raises InputError
    where somebody keeps it."""
    deadline = time.monotonic() + _LEASE_TIMEOUT_S
    with ExitStack() as scope:
        while True:
            try:
                scope.enter_context(lease(run))
                break
            except InputError as error:
                if time.monotonic() > deadline:
                    raise
                said = f"waiting: {error}"
            say(said)
            time.sleep(_LEASE_INTERVAL_S)
        yield


def _requeue(run: RunFolder, job: Job, max_requeues: int) -> str:
    """Put the job back into the queue, if that makes sense; what was done."""
    if job.num_restarts >= max_requeues:
        return f"the job has begun again {job.num_restarts} times (slurm.max_requeues); it ends here"
    if not _saves_steps(run, job):
        return "no step was saved in the job's time, twice; it ends here: give it more time with slurm.time"
    done = subprocess.run(("scontrol", "requeue", job.id), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"the job could not be put back into the queue: {' '.join((done.stderr or done.stdout).split())}"
    return f"the job goes back into the queue, to go on (restart {job.num_restarts + 1} of {max_requeues})"


def _saves_steps(run: RunFolder, job: Job) -> bool:
    """Whether the job has saved a step in this start, or in the one before. A start may have several attempts."""
    begun_at: dict[int, int] = {}
    for attempt in run.attempts():
        if (each := Job.read(attempt)) is not None and each.id == job.id:
            begun_at.setdefault(each.num_restarts, each.from_step)
    now = begun_at.pop(job.num_restarts, job.from_step)
    if CheckpointStore(run.checkpoints).newest_step() > now:
        return True
    return not begun_at or begun_at[max(begun_at)] < now


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
