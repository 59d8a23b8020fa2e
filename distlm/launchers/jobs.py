"""The job of a run's newest attempt, on a target with a queue: how it stands, and what is done in the run's folder when
it has ended without having done it itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distlm.errors import Cause, DistlmError, ExitCode
from distlm.launchers.base import JOB_GOES_ON_AFTER, Job, JobState, JobStatus
from distlm.launchers.carried import RESULT_PREFIX, result_in
from distlm.launchers.local import end_abandoned, tell_mlflow
from distlm.launchers.targets import queue_launcher
from distlm.outcome import Outcome
from distlm.run_folder import (
    AttemptFolder,
    RunFolder,
    is_there,
    lease_holder,
    read_json,
    user_request,
    write_atomically,
    write_json,
)

_MAX_LOG_LINES = 5
_BEGINS_AGAIN_WITHIN_S = 3600.0
"""Of an end; later a target has begun the job again, or does not, and is not asked in vain by who cannot reach it."""


@dataclass(frozen=True)
class KnownJob:
    """A job and what its target says about it."""

    job: Job
    status: JobStatus

    @property
    def is_alive(self) -> bool:
        """It runs the attempt, or is going to run it or the next one."""
        return self.status.state.is_alive

    def cancel(self, *, saves: bool) -> bool:
        """See `distlm.launchers.base.QueueLauncher`. Raises DistlmError where the target refuses."""
        launcher = queue_launcher(self.job.target)
        return launcher is not None and launcher.cancel(self.job, saves=saves)

    def no_more_starts(self) -> None:
        """See `distlm.launchers.base.QueueLauncher`; as far as the target takes it."""
        if (launcher := queue_launcher(self.job.target)) is not None:
            with suppress(DistlmError):
                launcher.no_more_starts(self.job)

    def __str__(self) -> str:
        return f"{self.job.target} job {self.job.id}: {self.status}"


def find_job(run: RunFolder) -> KnownJob | None:
    """The job of the newest attempt, asked for now; None: it has none, or an end that no job goes on after. Of a job
    that has ended without a result, the result is written. Raises InputError for damaged files."""
    attempts = run.attempts()
    job = Job.read(attempts[-1]) if attempts else None
    if job is None or (launcher := queue_launcher(job.target)) is None:
        return None
    result = read_json(attempts[-1].result_json) if is_there(attempts[-1].result_json) else None
    code = result.get("exit_code") if isinstance(result, dict) else None
    if result is not None and code not in JOB_GOES_ON_AFTER:
        return None
    known = KnownJob(job, launcher.status(job))
    if result is None and not known.is_alive and known.status.state != JobState.UNKNOWN:
        with suppress(PermissionError):  # somebody else's run
            _settle(run, known)
    return known


def end_if_final(run: RunFolder, known: KnownJob, lines: Sequence[str] | None = None) -> bool:
    """Whether the job's output says that the run has ended for good, while its target is about to begin it again: then
    the result is written, and the target told not to. `lines`: of the output; None: they are asked for."""
    attempt = run.attempts()[-1]
    if not known.is_alive or is_there(attempt.result_json):
        return False
    lines = job_output(run, known.job).splitlines() if lines is None else lines
    result = result_in(lines)
    if result is None or result.get("exit_code") in JOB_GOES_ON_AFTER:
        return False
    known.no_more_starts()
    _keep(lines, attempt)
    write_json(attempt.result_json, result)
    return True


def tell_target_of_end(run: RunFolder) -> None:
    """A run that has ended for good, without success, is not to be begun again by a target that does not know it. What
    is damaged, or does not answer, is left as it is."""
    with suppress(DistlmError):
        attempts = run.attempts()
        job, result = (Job.read(attempts[-1]), read_json(attempts[-1].result_json)) if attempts else (None, None)
        code = result.get("exit_code") if isinstance(result, dict) else None
        is_final = isinstance(code, int) and code not in (*JOB_GOES_ON_AFTER, ExitCode.SUCCEEDED)
        if job is not None and is_final and _age_s(attempts[-1].result_json) < _BEGINS_AGAIN_WITHIN_S:
            KnownJob(job, JobStatus(JobState.UNKNOWN)).no_more_starts()


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _settle(run: RunFolder, known: KnownJob) -> None:
    """The job is over, and could not say so in the run's folder."""
    attempt = run.attempts()[-1]
    if is_there(attempt.result_json) or lease_holder(run) is not None:
        return
    lines = job_output(run, known.job).splitlines()
    _keep(lines, attempt)
    if (result := result_in(lines)) is not None:  # the run's folder is elsewhere, or not seen from here yet
        write_json(attempt.result_json, result)
        return
    last_lines = "".join(f"; {line.strip()}" for line in lines[-_MAX_LOG_LINES:] if line.strip())
    last_lines = last_lines or "; nothing that it has printed can be read here"
    message = f"the {known.job.target} job {known.job.id} has ended without a result ({known.status}){last_lines}"
    state = known.status.state
    if state == JobState.FAILED and user_request(attempt) is not None:
        state = JobState.CANCELLED
    match state:
        case JobState.CANCELLED:
            outcome = Outcome(ExitCode.CANCELLED, message, cause=Cause.CANCELLATION)
        case JobState.PREEMPTED:
            outcome = Outcome(ExitCode.PREEMPTED, message, cause=Cause.PREEMPTION)
        case _:
            outcome = Outcome(ExitCode.INFRASTRUCTURE, message, cause=Cause.INFRASTRUCTURE)
    end_abandoned(attempt, outcome)
    tell_mlflow(attempt)


def _keep(lines: Sequence[str], attempt: AttemptFolder) -> None:
    """What the job has printed, which its target may forget."""
    if lines and not is_there(attempt.output_log):
        shown = [line for line in lines if not line.startswith(RESULT_PREFIX)]
        write_atomically(attempt.output_log, "".join(f"{line}\n" for line in shown))


def job_output(run: RunFolder, job: Job) -> str:
    """What the job has printed so far, as far as that is known here."""
    launcher = queue_launcher(job.target)
    return launcher.output(job, run) if launcher else ""
