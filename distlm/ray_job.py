"""`python -m distlm.ray_job RUN_FOLDER` or `python -m distlm.ray_job CONFIG [KEY=VALUE ...]`, the entry point of a job
of Ray's Jobs API, on a cluster that was there or in pods on Kubernetes: run the newest attempt of the run, or of a new
run, to its end. A job that its target begins again goes on with its run.

The last line of its output is the attempt's result.json, for clients that do not see the run's folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt
from distlm.config.schema import RunConfig
from distlm.console import exit_code_of, say
from distlm.errors import DistlmError, ExitCode, InputError
from distlm.job_run import (
    JobName,
    changes_by_config,
    config_of_job,
    final_code,
    jobs_of,
    next_attempt,
    run_of_config,
    run_of_files,
)
from distlm.launchers.base import Job
from distlm.launchers.carried import ATTEMPT_FILES, JOB, line_of_error, result_line
from distlm.launchers.local import LocalLauncher, require_packages
from distlm.launchers.supervise import wait_for_attempt
from distlm.launchers.targets import queue_launcher
from distlm.run_folder import AttemptFolder, RunFolder, is_there, read_json, user_request, write_yaml
from distlm.view.kept import KeptView
from distlm.view.plain import PlainView

_ABANDONED = "the head of the Ray cluster was lost, and the controller with it"
_NO_JOB = JobName("ray", "")
"""Of a job that was sent by hand, which is not begun again."""


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        raise InputError("usage: python -m distlm.ray_job RUN_FOLDER, or CONFIG [KEY=VALUE ...]")
    require_packages()
    name = JobName(*os.environ[JOB].split(":", 1)) if JOB in os.environ else _NO_JOB
    what, overrides = Path(arguments[0]), arguments[1:]
    run: RunFolder | None = None
    config: dict[str, Any] | None = None
    changes: Sequence[str] = ()
    try:
        if files := _carried_files(os.environ.pop(ATTEMPT_FILES, None), what):
            run = RunFolder(what)
            run_of_files(what, files, name)
        else:
            run = run_of_config(what, overrides, name, may_have_begun=name != _NO_JOB)
            config = config_of_job(what, overrides, name)
            changes = changes_by_config(run, config, name)
        final = None if changes else _final_code(run)
        if final is not None:
            _say_again(run, final)
        code = final if final is not None else _run(run, name, config, changes)
    except DistlmError as error:
        say(line_of_error(run, error))
        raise
    say(result_line(run))
    return code


def _carried_files(carried: str | None, what: Path) -> Mapping[str, str]:
    """By their names; none where the job is given a config, which may be among them."""
    if carried is None or what.is_relative_to(carried):
        return {}
    if not carried.startswith("/"):
        files: dict[str, str] = json.loads(carried)
        return files
    return {path.name: path.read_text(encoding="utf-8") for path in Path(carried).iterdir() if path.is_file()}


def _final_code(run: RunFolder) -> ExitCode | None:
    """Also of a run that the user has stopped, saved, while its target is to begin it again after such an end."""
    newest = run.attempts()[-1]
    if newest.result_json.exists() and user_request(newest) is not None:
        return ExitCode(read_json(newest.result_json)["exit_code"])
    return final_code(run)


def _say_again(run: RunFolder, code: ExitCode) -> None:
    """How it ended: what the job has printed then may be gone with what it ran on."""
    with suppress(OSError):
        say(run.attempts()[-1].output_log.read_text(encoding="utf-8", errors="replace"), end="")
    say(f"run {run.run_id} has ended before with exit code {code}; nothing to do")


def _run(run: RunFolder, name: JobName, config: dict[str, Any] | None, changes: Sequence[str]) -> int:
    launcher = queue_launcher(name.target)
    assert launcher is not None
    max_starts = _max_starts if name.target == "kubernetes" else None
    ray_cluster = os.environ.get("RAY_CLUSTER_NAME", "") if name.target == "kubernetes" else ""
    attempt = next_attempt(run, name, launcher.check, _ABANDONED, changes, max_starts, ray_cluster)
    attempt.logs.mkdir(exist_ok=True)
    if config is not None:
        write_yaml(attempt.job_config_yaml, config)
    if name != _NO_JOB and not is_there(attempt.job_json):  # else the sender has written it
        _write_job(run, attempt, name, ray_cluster)
    with suppress(OSError):  # what is missing there is named by who needs it
        os.chdir(Attempt.read(attempt).working_directory)
    return wait_for_attempt(run, attempt, KeptView(PlainView(sys.stdout)), LocalLauncher(), shows_ending=True)


def _max_starts(config: RunConfig) -> int:
    return config.kubernetes.max_retries + 1


def _write_job(run: RunFolder, attempt: AttemptFolder, name: JobName, ray_cluster: str) -> None:
    before = jobs_of(run, name)
    job = before[-1] if before else Job(name.target, name.id, folder=str(run.path))
    num_restarts = job.num_restarts + 1 if before else 0
    newest_step = CheckpointStore(run.checkpoints).newest_step()
    replace(job, num_restarts=num_restarts, from_step=newest_step, ray_cluster=ray_cluster).write(attempt)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
