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
from typing import Any

import yaml

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt, accepted_attempts, begin_attempt, changed_config, create_run
from distlm.config.load import load_config
from distlm.config.resolve import refuse_changes, resolved_tree
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.errors import Cancelled, Cause, DistlmError, ExitCode, InfrastructureError, InputError, Preempted, Problem
from distlm.launchers.base import JOB_GOES_ON_AFTER, Job
from distlm.launchers.carried import ATTEMPT_YAML, NEWEST_STEP, RUN_YAML
from distlm.launchers.local import end_abandoned, tell_mlflow
from distlm.outcome import Outcome
from distlm.run_folder import (
    AttemptFolder,
    RunFolder,
    lease,
    new_run_id,
    read_json,
    read_yaml,
    runs_in,
    user_request,
    write_atomically,
)
from distlm.run_reference import pin_references

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


def config_of_job(config: Path, overrides: Sequence[str], name: JobName) -> dict[str, Any]:
    """Every key of the config file of a job, `run:RUN` and `${VAR}` as they are written. Raises InputError."""
    loaded = load_config(config, [*overrides, name.override])
    return resolved_tree(loaded.config, loaded.raw)


def changes_by_config(run: RunFolder, now: dict[str, Any], name: JobName) -> list[str]:
    """What the config of a job says otherwise than when it has last begun an attempt of the run, as overrides of the
    run's config, a section in each. Raises InputError for what would make it another run."""
    noted = [attempt for attempt in run.attempts() if attempt.job_config_yaml.exists()]
    if not noted:
        return []
    in_force = [attempt for attempt in accepted_attempts(run) if attempt in noted]  # what is refused changes nothing
    then = read_yaml((in_force[-1] if in_force else noted[0]).job_config_yaml)
    if refused := list(refuse_changes(then, now)):
        what = f"the job {name.id} has made run {run.run_id} of another config; give it another name for another run"
        raise InputError(*refused, what)
    return [f"{key}={json.dumps(now[key], ensure_ascii=False)}" for key in now if now[key] != then.get(key)]


def run_of_files(folder: Path, files: Mapping[str, str], name: JobName) -> RunFolder:
    """The run of that folder, with an attempt for this job: it is made of the files that travelled with the job, unless
    the sender sees the same folder, or the job has begun before. Raises InputError."""
    run = RunFolder(folder)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _require_same_steps(run, int(files[NEWEST_STEP]))
        if not run.run_yaml.exists():
            write_atomically(run.run_yaml, files[RUN_YAML])
        _place_attempt(run, files[ATTEMPT_YAML], name)
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


def _place_attempt(run: RunFolder, attempt_yaml: str, name: JobName) -> None:
    """Make the attempt that travelled, unless the job has begun it before. Where the sender sees the folder it is
    there, and its paths are seen from elsewhere here."""
    waits = [attempt for attempt in run.attempts()[-1:] if not _has_begun(attempt) and attempt.attempt_yaml.exists()]
    token = yaml.safe_load(attempt_yaml).get("token")
    if token and [Attempt.read(attempt).token for attempt in waits] == [token]:
        return write_atomically(waits[0].attempt_yaml, attempt_yaml)
    if any(map(name.is_of, run.attempts())):
        return
    with lease_in_time(run):
        _end_newest(run, "the job before this one has ended without a result")
        write_atomically(run.new_attempt().attempt_yaml, attempt_yaml)


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
    ray_cluster: str = "",
) -> AttemptFolder:
    """The one that was made for this job, or a new one after one that has ended, which is `why_abandoned` if it could
    not say how.

    Args:
        changes: overrides that come with it, by `changes_by_config`.
        max_starts: of the job without a step that was saved; None: its target counts itself.
        ray_cluster: on which they are counted: KubeRay counts those on others.

    Raises:
        InputError: another controller has the run, or the newest attempt waits for another job.
        Cancelled, Preempted: the user has asked the attempt to end that could not say how it ended.
        InfrastructureError: the job has begun that often in a row, and none of its starts has saved a step.
    """
    if not run.attempts():
        raise InputError(f"the run's folder {run.path} has no attempt")
    newest = run.attempts()[-1]
    if not _has_begun(newest):
        other = Job.read(newest)
        # Under Slurm a script may be sent anew by hand.
        if other is not None and not name.is_of(newest) and (name.target, other.target) != ("slurm", "slurm"):
            raise InputError(f"run {run.run_id} is to go on in another job, {other.target} {other.id}")
        if not changes:
            return newest
    loaded, changes_so_far = changed_config(run, list(changes), check)
    if loaded.config.resources.target != name.target:
        loaded, changes_so_far = changed_config(run, [*changes, name.override], check)
    with lease_in_time(run):
        if (asked := _end_newest(run, why_abandoned)) is not None:
            tell_mlflow(newest)
            raise asked
        if max_starts and (num_starts := starts_in_vain(run, name, ray_cluster)) >= max_starts(loaded.config):
            tell_mlflow(newest)
            raise InfrastructureError(f"no step was saved in {num_starts} starts of the job in a row; it ends here")
        return begin_attempt(loaded, run, [], changes=changes_so_far)


def _end_newest(run: RunFolder, why: str) -> DistlmError | None:
    """Of an attempt that could not say how it ended. Its lease is ours. How the user had asked it to end; None: not."""
    newest = run.attempts()[-1] if run.attempts() else None
    if newest is None or newest.result_json.exists():
        return None
    if (request := user_request(newest)) is None:
        end_abandoned(newest, Outcome(ExitCode.INFRASTRUCTURE, why, cause=Cause.INFRASTRUCTURE))
        return None
    asked = (Preempted if request.get("save") else Cancelled)(f"asked to end by distlm cancel; {why}")
    end_abandoned(newest, Outcome.of(asked))
    return asked


def jobs_of(run: RunFolder, name: JobName) -> list[Job]:
    """The job in each of the attempts that it has begun, oldest first: a start may have several."""
    return [job for attempt in run.attempts() if name.is_of(attempt) and (job := Job.read(attempt)) is not None]


def starts_in_vain(run: RunFolder, name: JobName, ray_cluster: str = "") -> int:
    """How many of the job's newest starts, on that Ray cluster where it is named, began where the run still is."""
    newest_step = CheckpointStore(run.checkpoints).newest_step()
    begun_at: dict[int, int] = {}
    for job in (job for job in jobs_of(run, name) if job.ray_cluster == ray_cluster):
        begun_at.setdefault(job.num_restarts, job.from_step)
    steps = [begun_at[start] for start in sorted(begun_at, reverse=True)]
    return sum(1 for _ in takewhile(lambda step: step == newest_step, steps))


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
