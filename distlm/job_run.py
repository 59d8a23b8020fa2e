"""The run of a job, from within the job: which run it is, and which attempt of it comes next. A job that its target
begins again goes on with its run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import begin_attempt, changed_config, create_run, current_tree
from distlm.config.load import load_config
from distlm.config.resolve import flatten, resolved_tree
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.errors import Cause, ExitCode, InfrastructureError, InputError, Problem
from distlm.launchers.base import JOB_GOES_ON_AFTER, Job
from distlm.launchers.carried import ATTEMPT_YAML, NEWEST_STEP, RUN_YAML
from distlm.launchers.local import end_abandoned, tell_mlflow
from distlm.outcome import Outcome
from distlm.run_folder import AttemptFolder, RunFolder, lease, new_run_id, read_json, runs_in, write_atomically
from distlm.run_reference import is_pinned, pin_references

_LEASE_TIMEOUT_S, _LEASE_INTERVAL_S = 180.0, 10.0


@dataclass(frozen=True)
class JobName:
    """What a job is called by its target, however often it begins."""

    target: str
    id: str

    @property
    def override(self) -> str:
        return f"resources.target={self.target}"

    def is_of(self, attempt: AttemptFolder) -> bool:
        job = Job.read(attempt)
        return job is not None and (job.target, job.id) == (self.target, self.id)


def run_of_config(
    config: Path,
    overrides: Sequence[str],
    name: JobName,
    check: Callable[[RunConfig], Iterator[Problem]] | None = None,
    *,
    may_have_begun: bool,
) -> RunFolder:
    """The run that the job made of a config file when it began first, or a new one. Raises InputError."""
    loaded = load_config(config, [*overrides, name.override], check)
    runs_dir = Path(loaded.config.runs_dir).absolute()
    if may_have_begun and (run := _run_of(name, runs_dir)) is not None:
        return run
    loaded = pin_references(loaded)
    run = RunFolder(runs_dir / new_run_id())
    create_run(loaded, run)
    begin_attempt(loaded, run, [*overrides, name.override])
    return run


def _run_of(name: JobName, runs_dir: Path) -> RunFolder | None:
    return next((run for run in runs_in(runs_dir) if any(map(name.is_of, run.attempts()))), None)


def changes_by_config(run: RunFolder, config: Path, overrides: Sequence[str], name: JobName) -> list[str]:
    """What a config file, from which the job made the run, says otherwise by now, as overrides of the run's config.

    Raises InputError for what would make it another run.
    """
    loaded = load_config(config, [*overrides, name.override])
    now, then = flatten(resolved_tree(loaded.config, loaded.raw)), flatten(current_tree(run))
    changes = [
        f"{key}={json.dumps(value)}"
        for key, value in now.items()
        if value != then.get(key) and not is_pinned(key, value)
    ]
    try:
        changed_config(run, changes, lambda config: iter(()))
    except InputError as error:
        what = f"the job {name.id} has made run {run.run_id} of another config; give it another name for another run"
        raise InputError(*error.problems, what) from None
    return changes


def run_of_files(folder: Path, files: Mapping[str, str], name: JobName) -> RunFolder:
    """The run of that folder, with an attempt for this job: it is made of the files that travelled with the job, unless
    the sender sees the same folder, or the job has begun before. Raises InputError."""
    run = RunFolder(folder)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _require_same_steps(run, int(files[NEWEST_STEP]))
        if not run.run_yaml.exists():
            write_atomically(run.run_yaml, files[RUN_YAML])
        if not any(map(name.is_of, run.attempts())) and not _is_made(run, files[ATTEMPT_YAML]):
            with lease_in_time(run):
                _end_newest(run, "the job before this one has ended without a result")
                write_atomically(run.new_attempt().attempt_yaml, files[ATTEMPT_YAML])
    except OSError as error:
        raise InputError(
            f"the run's folder {folder} cannot be made on {os.uname().nodename}: {error.strerror}; set runs_dir to a "
            "folder on storage that all nodes of the cluster share"
        ) from None
    return run


def _require_same_steps(run: RunFolder, newest_of_sender: int) -> None:
    """Who sends a run that it sees at a step does not want it to begin anew somewhere else."""
    if CheckpointStore(run.checkpoints).newest_step() < newest_of_sender:
        raise InputError(
            f"run {run.run_id} was sent with step {newest_of_sender} saved, which is not in {run.path} on "
            f"{os.uname().nodename}: copy the run's folder there, or continue it where it is"
        )


def _is_made(run: RunFolder, attempt_yaml: str) -> bool:
    """Whether the newest attempt is the one that travelled, which waits to begin."""
    attempts = run.attempts()
    return bool(attempts) and not _has_begun(attempts[-1]) and attempts[-1].attempt_yaml.read_text() == attempt_yaml


def _has_begun(attempt: AttemptFolder) -> bool:
    return attempt.handle_json.exists() or attempt.result_json.exists()


def final_code(run: RunFolder) -> ExitCode | None:
    """The exit code of a run that there is nothing more to do for."""
    attempts = run.attempts()
    result = read_json(attempts[-1].result_json) if attempts else None
    code = ExitCode(result["exit_code"]) if result is not None else None
    return None if code in JOB_GOES_ON_AFTER else code


def next_attempt(
    run: RunFolder,
    name: JobName,
    check: Callable[[RunConfig], Iterator[Problem]],
    why_abandoned: str,
    changes: Sequence[str] = (),
    max_starts: Callable[[RunConfig], int] | None = None,
) -> AttemptFolder:
    """The one that was made for this job, or a new one after one that has ended, which is `why_abandoned` if it could
    not say how.

    Args:
        changes: overrides that come with it.
        max_starts: of the job without a step that was saved; None: its target counts itself.

    Raises:
        InputError: another controller has the run.
        InfrastructureError: the job has begun that often in a row, and none of its attempts has saved a step.
    """
    if not run.attempts():
        raise InputError(f"the run's folder {run.path} has no attempt")
    newest = run.attempts()[-1]
    if not _has_begun(newest):
        return newest
    loaded, changes_so_far = changed_config(run, list(changes), check)
    if loaded.config.resources.target != name.target:
        loaded, changes_so_far = changed_config(run, [*changes, name.override], check)
    with lease_in_time(run):
        _end_newest(run, why_abandoned)
        if max_starts and (num_starts := _starts_in_vain(run, name)) >= max_starts(loaded.config):
            tell_mlflow(newest)
            raise InfrastructureError(f"no step was saved in {num_starts} starts of the job in a row; it ends here")
        return begin_attempt(loaded, run, [], changes=changes_so_far)


def _end_newest(run: RunFolder, why: str) -> None:
    """Of an attempt that could not say how it ended. Its lease is ours."""
    attempts = run.attempts()
    if attempts and not attempts[-1].result_json.exists():
        end_abandoned(attempts[-1], Outcome(ExitCode.INFRASTRUCTURE, why, cause=Cause.INFRASTRUCTURE))


def _starts_in_vain(run: RunFolder, name: JobName) -> int:
    """How many of the newest attempts are of this job and began where the run still is."""
    newest_step = CheckpointStore(run.checkpoints).newest_step()

    def is_in_vain(attempt: AttemptFolder) -> bool:
        job = Job.read(attempt)
        return job is not None and name.is_of(attempt) and job.from_step == newest_step

    return sum(1 for _ in takewhile(is_in_vain, reversed(run.attempts())))


@contextmanager
def lease_in_time(run: RunFolder) -> Iterator[None]:
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
