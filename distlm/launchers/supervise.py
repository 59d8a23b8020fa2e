"""Wait for an attempt whose controller runs on this machine, and begin another one where it has lost what it ran on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import begin_attempt, changed_config, load_attempt
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.errors import Cause, ExitCode
from distlm.launchers.base import Job
from distlm.launchers.local import LocalLauncher, tell_mlflow
from distlm.outcome import Outcome
from distlm.redact import redact_uri
from distlm.retry_policy import RetryPolicy
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.stop_count import STOP_SIGNALS, signals_held
from distlm.view import Event, View, make_event
from distlm.view.ending import command, ending
from distlm.view.kept import KeptView


def wait_for_attempt(
    run: RunFolder,
    attempt: AttemptFolder,
    view: KeptView,
    launcher: LocalLauncher,
    *,
    shows_ending: bool,
    first_events: Iterable[Event] = (),
) -> int:
    """Run an attempt that has been made; the exit code of it, or of the one that took its place, when it has ended and
    `view` has shown how. `shows_ending`: the user is told, too, on standard output or standard error. `first_events`
    are shown after the one that it begins."""
    config = load_attempt(run, attempt).config
    try:
        for event in (begin_event(config, run, attempt), *first_events):
            view.show(event)
        result = _supervise(run, attempt, config, view, launcher)
        view.show(make_event("result", **result))
    finally:
        view.close()
    lines = ending_lines(run, config, result)
    for line in lines:
        view.keep(line)
    if shows_ending:
        say_ending(lines, result["exit_code"])
    return int(result["exit_code"])


def ending_lines(run: RunFolder, config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    """How an attempt ended, for people: what went wrong is marked as ours, among the lines of others."""
    lines = ending(run, result, _where_curves_are(config, run))
    return lines if result["exit_code"] == ExitCode.SUCCEEDED else [f"distlm: {line}" for line in lines]


def say_ending(lines: Sequence[str], exit_code: int) -> None:
    """A success goes to standard output, and what went wrong to standard error."""
    for line in lines:
        say(line, file=sys.stdout if exit_code == ExitCode.SUCCEEDED else sys.stderr)


def _supervise(
    run: RunFolder, attempt: AttemptFolder, config: RunConfig, view: View, launcher: LocalLauncher
) -> dict[str, Any]:
    """Wait for an attempt. If it has lost what it ran on, its controller or Ray, begin another one, as the policy
    decides. Returns the result of the last one."""
    policy, store = RetryPolicy(config.recovery), CheckpointStore(run.checkpoints)
    while True:
        step_before = store.newest_step()
        result = launcher.run(launcher.build(config, run), attempt, view)
        if not result["needs_new_attempt"]:
            return result
        outcome = Outcome(ExitCode(result["exit_code"]), result["message"], cause=Cause(result["cause"]))
        decision = policy.decide(outcome, has_progressed=store.newest_step() > step_before)
        goes_on = decision.try_again and not attempt.cancel_json.exists()
        if goes_on:
            message = f"{outcome.cause}: {outcome.message}; a new attempt begins {decision.how}"
            view.show(make_event("warning", message=message))
        if not goes_on or not _pause(decision.pause_s):
            tell_mlflow(attempt)
            return result
        loaded, changes = changed_config(run, [], launcher.check_here)
        job, attempt = Job.read(attempt), begin_attempt(loaded, run, [], changes=changes)
        if job is not None:  # which runs this one, too
            replace(job, from_step=store.newest_step()).write(attempt)
        view.show(begin_event(config, run, attempt))


def _pause(seconds: float) -> bool:
    """Whether nobody has asked to stop meanwhile."""
    with signals_held():
        return signal.sigtimedwait(STOP_SIGNALS, seconds) is None


def _where_curves_are(config: RunConfig, run: RunFolder) -> str:
    """The address of a server, or the command that shows them; empty: nowhere but in the run's folder."""
    if not config.tracking.report_to:
        return ""
    of_pods = config.kubernetes.env if config.resources.target == "kubernetes" else {}
    name = "MLFLOW_TRACKING_URI"
    uri = config.tracking.tracking_uri or of_pods.get(name) or os.environ.get(name)
    return redact_uri(uri) if uri else command(run, "ui")


def begin_event(config: RunConfig, run: RunFolder, attempt: AttemptFolder) -> Event:
    return make_event(
        "begin",
        run_id=run.run_id,
        run_name=config.name,
        attempt=attempt.number,
        folder=str(run.path),
        log=str(attempt.logs),
        task=config.task.type,
        num_workers=config.resources.num_workers,
        zero_stage=config.deepspeed.zero_stage,
        mixed_precision=config.training.mixed_precision,
        tracking=_where_curves_are(config, run),
    )
