"""`distlm cancel`: end a run that is running, from any terminal and any host that sees its folder.

The request is a file in the attempt's folder, which the controller looks for. `--json` prints one object:

    run_id, attempt             the attempt that was asked to end
    state                       as in `distlm status`; running, starting or lost: it has not ended
    exit_code, message          how it has ended; null and why not: it has not
    next                        commands that may be wanted now, the likeliest first
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from distlm.commands.find import find_run
from distlm.console import say
from distlm.errors import Cause, ExitCode, InputError
from distlm.launchers.base import JobState
from distlm.launchers.jobs import KnownJob, end_if_final, find_job
from distlm.launchers.local import end_abandoned, tell_mlflow
from distlm.outcome import Outcome
from distlm.run_folder import AttemptFolder, RunFolder, is_there, process_name, read_json, write_json
from distlm.run_status import run_status
from distlm.view.ending import command, ending, next_steps

_LOOK_INTERVAL_S, _ASK_INTERVAL_S = 0.2, 1.0
_SIGN_OF_LIFE_S = 10.0
"""In which a controller that sees the run's folder has written there who it is."""


def cancel(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    if not (attempts := run.attempts()):
        raise InputError(f"run {run.run_id} has no attempt that could be cancelled")
    job = find_job(run)
    if job is not None and job.status.state in (JobState.SUBMITTED, JobState.PENDING):
        return _cancel_in_queue(run, attempts[-1], job, options.json)
    attempt, state = attempts[-1], run_status(run, with_evaluation=False).state
    if is_there(attempt.result_json):
        lines = [f"run {run.run_id} has ended already: {state}; nothing to cancel"]
        return _say_ended(run, lines, ExitCode.SUCCEEDED, options.json)
    write_json(attempt.cancel_json, {"save": options.checkpoint})
    if state == "lost" and not (job and job.is_alive):  # also one whose lease this host cannot see
        text = (
            f"run {run.run_id} is lost: nobody holds its lease, as far as can be seen here, so nothing is left to "
            "cancel; a controller that is out of sight ends by itself now"
        )
        return _say_not_ended(run, attempt.number, state, text, [command(run, "resume")], options.json)
    how = "finish its step, save and end" if options.checkpoint else "end now"
    say(f"run {run.run_id} is asked to {how}", file=sys.stderr if options.json else sys.stdout)
    deadline = time.monotonic() + options.timeout
    if job is not None:
        job.no_more_starts()
    is_elsewhere, is_asked = job is not None and job.job.is_elsewhere(run), False
    look_s = time.monotonic() + (0 if is_elsewhere else _SIGN_OF_LIFE_S)
    while not is_there(attempt.result_json):
        if time.monotonic() >= deadline:
            return _say_still_running(run, attempt, options)
        time.sleep(_LOOK_INTERVAL_S)
        if job is not None and time.monotonic() >= look_s:
            is_asked = _end_out_of_sight(run, attempt, saves=options.checkpoint, is_asked=is_asked)
            look_s = time.monotonic() + (_ASK_INTERVAL_S if is_asked or is_elsewhere else _SIGN_OF_LIFE_S)
    result = read_json(attempt.result_json)
    # A training that has ended meanwhile needs no end, and one that was stopped more gently has one.
    asked = {ExitCode.SUCCEEDED, ExitCode.PREEMPTED} | (set() if options.checkpoint else {ExitCode.CANCELLED})
    code = ExitCode.SUCCEEDED if result["exit_code"] in asked else ExitCode(result["exit_code"])
    return _say_ended(run, ending(run, result), code, options.json)


def _end_out_of_sight(run: RunFolder, attempt: AttemptFolder, *, saves: bool, is_asked: bool) -> bool:
    """The controller of a job may not see this folder: then its target ends it, and how it has ended is found out from
    there. Whether the target is asked by now."""
    job = find_job(run)
    if job is None or not job.is_alive or is_there(attempt.handle_json):
        return is_asked
    is_asked = is_asked or job.cancel(saves=saves)
    end_if_final(run, job)
    return is_asked


def _cancel_in_queue(run: RunFolder, attempt: AttemptFolder, known: KnownJob, as_json: bool) -> int:
    """Nothing of it runs that could save or say how it ended."""
    known.cancel(saves=False)
    if not is_there(attempt.result_json):
        end_abandoned(attempt, Outcome(ExitCode.CANCELLED, "cancelled in the queue", cause=Cause.CANCELLATION))
        tell_mlflow(attempt)
    lines = [f"{known.job.target} job {known.job.id} of run {run.run_id} is taken from the queue"]
    return _say_ended(run, lines, ExitCode.SUCCEEDED, as_json)


def _say_ended(run: RunFolder, lines: list[str], code: ExitCode, as_json: bool) -> int:
    if as_json:
        newest = run_status(run, with_evaluation=False).attempts[-1]
        steps = [what for _, what in next_steps(run, newest.result)]
        _print_json(run, newest.number, newest.state, newest.exit_code, newest.message, steps)
    else:
        say("\n".join(lines))
    return code


def _say_still_running(run: RunFolder, attempt: AttemptFolder, options: argparse.Namespace) -> int:
    handle = read_json(attempt.handle_json)
    who = f"its controller, {process_name(handle['pid'], handle['host'])}," if handle else "its controller"
    text = f"run {run.run_id} has not ended within {options.timeout} s; {who} is still asked to"
    harder = [command(run, "cancel")] if options.checkpoint else []
    state = run_status(run, with_evaluation=False).state
    return _say_not_ended(run, attempt.number, state, text, [*harder, command(run, "status")], options.json)


def _say_not_ended(run: RunFolder, attempt: int, state: str, text: str, steps: list[str], as_json: bool) -> int:
    if as_json:
        _print_json(run, attempt, state, None, text, steps)
    else:
        say("\n".join([f"distlm: {text}", *(f"distlm: next: {step}" for step in steps)]), file=sys.stderr)
    return ExitCode.INFRASTRUCTURE


def _print_json(
    run: RunFolder, attempt: int, state: str, exit_code: int | None, message: str, steps: list[str]
) -> None:
    told: dict[str, Any] = {"run_id": run.run_id, "attempt": attempt, "state": state, "exit_code": exit_code}
    say(json.dumps({**told, "message": message, "next": steps}, indent=2))
