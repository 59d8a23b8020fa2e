"""`distlm submit` and `distlm resume`: begin an attempt, show how it goes, and say how it ended.

`python -m distlm.commands.submit RUN_FOLDER` does this in the background, for an attempt that has been begun.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distlm.checkpoint.store import CheckpointStore
from distlm.commands.find import find_run
from distlm.config.attempt import begin_attempt, changed_config, create_run, load_attempt
from distlm.config.load import load_config
from distlm.config.reproduce import Reproduction, reproduce
from distlm.config.resolve import resolved_tree
from distlm.config.schema import RunConfig
from distlm.console import exit_code_of, say
from distlm.errors import Cause, ExitCode, InputError
from distlm.launchers.local import LocalLauncher, end_abandoned, require_packages, tell_mlflow
from distlm.outcome import Outcome
from distlm.redact import redact_uri
from distlm.retry_policy import RetryPolicy
from distlm.run_folder import AttemptFolder, RunFolder, dump_yaml, lease, new_run_id, read_json
from distlm.run_reference import pin_references
from distlm.run_status import run_status
from distlm.stop_count import STOP_SIGNALS, signals_held
from distlm.view import Event, View, make_event
from distlm.view.choose import check_view, make_view
from distlm.view.ending import command, ending
from distlm.view.plain import PlainView

_RUN_PREFIX = "run:"
"""What begins the name of a run that is given in place of a config file."""


def submit(options: argparse.Namespace) -> int:
    launcher = LocalLauncher()
    equal = None
    if (name := str(options.config)).startswith(_RUN_PREFIX):
        original = find_run(options.runs_dir or Path("runs"), name.removeprefix(_RUN_PREFIX))
        equal = reproduce(original, options.overrides, launcher.check)
    elif options.runs_dir:
        raise InputError(f"--runs-dir is for run:RUN; for the folder of a new run: runs_dir={options.runs_dir}")
    loaded = equal.loaded if equal else load_config(options.config, options.overrides, launcher.check)
    loaded = pin_references(loaded)
    run = RunFolder(Path(loaded.config.runs_dir).absolute() / new_run_id())
    if options.dry_run:
        say(dump_yaml(resolved_tree(loaded.config, loaded.raw)), end="")
        say(f"# {launcher.build(loaded.config, run)}")
        return ExitCode.SUCCEEDED
    _check_machine()
    create_run(loaded, run)
    attempt = begin_attempt(loaded, run, options.overrides, reproduces=str(equal.original.path) if equal else "")
    return _begin(run, attempt, options, _what_is_otherwise(equal) if equal else ())


def resume(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    if _has_succeeded(run) and not options.overrides:
        say(f"run {run.run_id} has succeeded; nothing to do", file=sys.stderr if options.json else sys.stdout)
        return ExitCode.SUCCEEDED
    loaded, changes = changed_config(run, options.overrides, LocalLauncher().check)
    _check_machine()
    if run_status(run).state == "starting":
        raise InputError(f"run {run.run_id} is being started; wait a minute if it was killed")
    with lease(run):  # refused here already, before an attempt is made, if the run is being trained
        if (attempts := run.attempts()) and not attempts[-1].result_json.exists():
            text = "the controller and the command that waited for it were killed"
            end_abandoned(attempts[-1], Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.INFRASTRUCTURE))
        attempt = begin_attempt(loaded, run, options.overrides, changes=changes)
    return _begin(run, attempt, options)


def _check_machine() -> None:
    """What would end the command when the attempt has been begun. Raises InputError."""
    check_view()
    require_packages()


def _what_is_otherwise(equal: Reproduction) -> Iterator[Event]:
    but_for = ", but for:" if equal.changed else ""
    yield make_event("note", message=f"the config of run {equal.original.run_id}{but_for}")
    for line in equal.changed:
        yield make_event("note", message=f"  {line}")
    for line in equal.warnings:
        yield make_event("warning", message=line)


def _has_succeeded(run: RunFolder) -> bool:
    attempts = run.attempts()
    result = read_json(attempts[-1].result_json) if attempts else None
    return isinstance(result, dict) and result.get("exit_code") == ExitCode.SUCCEEDED


def _begin(
    run: RunFolder, attempt: AttemptFolder, options: argparse.Namespace, first_events: Iterable[Event] = ()
) -> int:
    """Run an attempt to its end here, or begin it in the background."""
    begin = begin_event(load_attempt(run, attempt).config, run, attempt)
    with signals_held():  # until there are handlers, here or in the background; never by the threads of a view
        view = PlainView(sys.stdout) if options.detach and not options.json else make_view(options.json)
        for event in (begin, *first_events):
            view.show(event)
        if not options.detach:
            return _wait(run, attempt, view, options.json)
        with open(attempt.output_log, "ab") as log:
            background = subprocess.Popen(
                [sys.executable, "-m", __name__, str(run.path)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        follow = shlex.join(("tail", "-f", os.path.relpath(attempt.output_log)))
        view.show(make_event("note", message=f"in the background; follow: {follow}; stop: kill {background.pid}"))
        view.close()
    return ExitCode.SUCCEEDED


def _wait(run: RunFolder, attempt: AttemptFolder, view: View, as_json: bool = False) -> int:
    """The exit code of an attempt, or of the one that took its place, when it has ended and the user knows how."""
    config = load_attempt(run, attempt).config
    try:
        result = _supervise(run, attempt, config, view)
        view.show(make_event("result", **result))
    finally:
        view.close()
    is_good = result["exit_code"] == ExitCode.SUCCEEDED
    for line in ending(run, result, _where_curves_are(config, run)) if not as_json else ():
        say(line if is_good else f"distlm: {line}", file=sys.stdout if is_good else sys.stderr)
    return int(result["exit_code"])


def _supervise(run: RunFolder, attempt: AttemptFolder, config: RunConfig, view: View) -> dict[str, Any]:
    """Wait for an attempt. If it has lost what it ran on, its controller or Ray, begin another one, as the policy
    decides. Returns the result of the last one."""
    launcher, policy, store = LocalLauncher(), RetryPolicy(config.recovery), CheckpointStore(run.checkpoints)
    while True:
        step_before = store.newest_step()
        result = launcher.submit(launcher.build(config, run), attempt, view)
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
        loaded, changes = changed_config(run, [], launcher.check)
        attempt = begin_attempt(loaded, run, [], changes=changes)
        view.show(begin_event(config, run, attempt))


def _pause(seconds: float) -> bool:
    """Whether nobody has asked to stop meanwhile."""
    with signals_held():
        return signal.sigtimedwait(STOP_SIGNALS, seconds) is None


def _where_curves_are(config: RunConfig, run: RunFolder) -> str:
    """The address of a server, or the command that shows them; empty: nowhere but in the run's folder."""
    if not config.tracking.report_to:
        return ""
    uri = config.tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
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


def main(arguments: list[str]) -> int:
    def wait() -> int:
        run = RunFolder(Path(arguments[0]))
        attempt = run.attempts()[-1]
        return _wait(run, attempt, PlainView(sys.stdout))

    return exit_code_of(wait)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
