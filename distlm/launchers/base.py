"""What a launcher is: it builds a request, which is pure and can be printed, and submits it; what a target with a queue
gives back for it, its job, tells how it goes and can be cancelled."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from distlm.config.schema import RunConfig
from distlm.errors import ExitCode, InputError, Problem
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json

JOB_GOES_ON_AFTER = (ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE)
"""Ends of an attempt after which a job that its target begins again goes on with the run."""


@dataclass(frozen=True)
class Request:
    """What is sent to a target, whole. There are no secrets in it."""

    command: tuple[str, ...]
    script: str = ""
    """What the command reads on its standard input."""

    def __str__(self) -> str:
        return self.script or f"{shlex.join(self.command)}\n"


class JobState(StrEnum):
    """How a job stands with its target, in the same words for all targets.

    It is about the job alone. How the training has ended, result.json says: a job that its target calls completed, and
    that has left no result, has not succeeded.
    """

    SUBMITTED = "submitted"
    """Sent; the target has not said anything about it yet."""
    PENDING = "pending"
    """It waits for its turn, for resources, or to be put back into the queue."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    """Ended from outside before its time: continue the run."""
    UNKNOWN = "unknown"
    """The target does not know it (any more), or says what we do not know, or does not answer."""

    @property
    def is_alive(self) -> bool:
        return self in (JobState.SUBMITTED, JobState.PENDING, JobState.RUNNING)

    def with_exit_code(self, exit_code: int | None) -> JobState:
        """What a target calls failed may have been ended on purpose."""
        if self == JobState.FAILED and exit_code == ExitCode.PREEMPTED:
            return JobState.PREEMPTED
        if self == JobState.FAILED and exit_code == ExitCode.CANCELLED:
            return JobState.CANCELLED
        return self


@dataclass(frozen=True)
class JobStatus:
    """What the target says about a job."""

    state: JobState
    target_state: str = ""
    """In the target's own word."""
    reason: str = ""
    """Why it is in that state, in the target's words and where needed in ours."""
    problem: str = ""
    """What of that is wrong, also while it runs; empty: nothing."""

    def __str__(self) -> str:
        word = f" ({self.target_state})" if self.target_state.lower() not in ("", self.state) else ""
        return f"{self.state}{word}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class Job:
    """The handle of what was submitted: job.json in the attempt's folder."""

    target: str
    id: str
    """The target's name for it."""
    num_restarts: int = 0
    """How often the target had started it before this attempt."""
    from_step: int = 0
    """Of the newest checkpoint when the attempt began."""
    address: str = ""
    """Of the cluster, where the target has several."""
    folder: str = ""
    """The run's folder as the job sees it, where that may be another one than here."""
    ray_cluster: str = ""
    """That KubeRay made for this start."""

    def is_elsewhere(self, run: RunFolder) -> bool:
        """It is known to have the run's folder at another place than here."""
        return self.folder not in ("", str(run.path))

    def write(self, folder: AttemptFolder) -> None:
        write_json(folder.job_json, asdict(self))

    @classmethod
    def read(cls, folder: AttemptFolder) -> Self | None:
        """None: the attempt was not given to a target with a queue. Raises InputError if the file is damaged."""
        content: Any = read_json(folder.job_json)
        if content is None:
            return None
        try:
            return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})
        except TypeError as error:
            raise InputError(f"{folder.job_json} is damaged: {error}") from None


class Launcher(Protocol):
    """One target."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """What is wrong with a config for this target, by itself."""
        ...

    def check_here(self, config: RunConfig) -> Iterator[Problem]:
        """What is wrong with it, as far as can be seen from here: also with the files that it names."""
        ...

    def build(self, config: RunConfig, run: RunFolder) -> Request:
        """The request for the run's newest attempt. Pure: what a dry run prints is what is submitted."""
        ...


class QueueLauncher(Launcher, Protocol):
    """A target that takes jobs and runs them when and where it likes."""

    def render(self, config: RunConfig, path: Path, overrides: list[str]) -> Request:
        """The request for a new run of a config file, which whoever has it can send by the target's own means."""
        ...

    def submit(self, request: Request, folder: Path) -> Job:
        """Send it. Raises InputError, in the target's own words, where it refuses it. `folder`: of the user."""
        ...

    def status(self, job: Job) -> JobStatus:
        """Raises nothing: a target that does not answer leaves the state UNKNOWN, with the reason."""
        ...

    def output(self, job: Job, run: RunFolder) -> str:
        """What the job has printed so far, as far as that is known here."""
        ...

    def cancel(self, job: Job, *, saves: bool) -> bool:
        """Take it from the queue, or end it, where the target can ask for that, after it `saves`. False: it cannot be
        asked yet. Raises DistlmError where the target refuses."""
        ...

    def no_more_starts(self, job: Job) -> None:
        """What it runs now is the last: the target is not to begin the job again. Raises DistlmError."""
        ...

    def logs_there(self, job: Job, arguments: Sequence[str]) -> Iterator[str] | None:
        """What `distlm logs` with these arguments prints where the job sees the run's folder, as it comes; None: the
        target cannot tell. Raises DistlmError."""
        ...
