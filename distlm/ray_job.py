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

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt
from distlm.console import exit_code_of, say
from distlm.errors import InputError
from distlm.job_run import JobName, changes_by_config, final_code, next_attempt, run_of_config, run_of_files
from distlm.launchers.base import Job
from distlm.launchers.carried import ATTEMPT_FILES, JOB, result_line
from distlm.launchers.local import LocalLauncher, require_packages
from distlm.launchers.supervise import wait_for_attempt
from distlm.launchers.targets import queue_launcher
from distlm.run_folder import RunFolder
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
    changes: Sequence[str] = ()
    if files := _carried_files(os.environ.pop(ATTEMPT_FILES, None), what):
        run = run_of_files(what, files, name)
    else:
        run = run_of_config(what, overrides, name, may_have_begun=name != _NO_JOB)
        changes = changes_by_config(run, what, overrides, name)
    if (final := final_code(run)) is not None:
        say(f"run {run.run_id} has ended before with exit code {final}; nothing to do")
    code = final if final is not None else _run(run, name, changes)
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


def _run(run: RunFolder, name: JobName, changes: Sequence[str]) -> int:
    launcher = queue_launcher(name.target)
    assert launcher is not None
    attempt = next_attempt(
        run, name, launcher.check, _ABANDONED, changes, lambda config: config.kubernetes.max_retries + 1
    )
    attempt.logs.mkdir(exist_ok=True)
    if name != _NO_JOB and not name.is_of(attempt):  # else the sender has written it, with the cluster's address
        starts = list(filter(name.is_of, run.attempts()))
        first = (Job.read(starts[0]) if starts else None) or Job(name.target, name.id, folder=str(run.path))
        newest_step = CheckpointStore(run.checkpoints).newest_step()
        replace(first, num_restarts=len(starts), from_step=newest_step).write(attempt)
    with suppress(OSError):  # what is missing there is named by who needs it
        os.chdir(Attempt.read(attempt).working_directory)
    return wait_for_attempt(run, attempt, KeptView(PlainView(sys.stdout)), LocalLauncher(), shows_ending=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
