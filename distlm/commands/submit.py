"""`distlm submit` and `distlm resume`: begin an attempt, show how it goes, and say how it ended.

`python -m distlm.commands.submit RUN_FOLDER` does this in the background, for an attempt that has been begun.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from distlm.checkpoint.store import CheckpointStore
from distlm.commands.find import find_run
from distlm.commands.follow import follow
from distlm.config.attempt import begin_attempt, changed_config, create_run, load_attempt
from distlm.config.load import load_config
from distlm.config.reproduce import Reproduction, reproduce
from distlm.config.resolve import resolved_tree
from distlm.config.schema import RunConfig
from distlm.console import exit_code_of, say
from distlm.errors import Cause, DistlmError, ExitCode, InputError
from distlm.launchers.base import Job, JobState, QueueLauncher, Request
from distlm.launchers.carried import NEWEST_STEP, known_newest_step
from distlm.launchers.jobs import find_job
from distlm.launchers.local import LocalLauncher, end_abandoned, require_packages
from distlm.launchers.supervise import begin_event, wait_for_attempt
from distlm.launchers.targets import check_for_target, launcher_for, queue_launcher, uses_the_folder_here
from distlm.outcome import Outcome, write_result
from distlm.run_folder import AttemptFolder, RunFolder, dump_yaml, lease, new_run_id, read_json, write_atomically
from distlm.run_reference import pin_references
from distlm.run_status import run_status
from distlm.stop_count import signals_held
from distlm.view import Event, make_event
from distlm.view.choose import check_view, make_view
from distlm.view.ending import command
from distlm.view.kept import KeptView
from distlm.view.plain import JsonView, PlainView

_RUN_PREFIX = "run:"
"""What begins the name of a run that is given in place of a config file."""


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Those of the command line, with those for --target and --address."""
    given = {"resources.target": options.target, "ray.address": options.address}
    return [*options.overrides, *(f"{key}={value}" for key, value in given.items() if value)]


def submit(options: argparse.Namespace) -> int:
    overrides = overrides_of(options)
    equal = None
    if (name := str(options.config)).startswith(_RUN_PREFIX):
        original = find_run(options.runs_dir or Path("runs"), name.removeprefix(_RUN_PREFIX))
        equal = reproduce(original, overrides, check_for_target)
    elif options.runs_dir:
        raise InputError(f"--runs-dir is for run:RUN; for the folder of a new run: runs_dir={options.runs_dir}")
    loaded = equal.loaded if equal else load_config(options.config, overrides, check_for_target)
    loaded = pin_references(loaded)
    run = RunFolder(Path(loaded.config.runs_dir).absolute() / new_run_id())
    if options.dry_run:
        say(dump_yaml(resolved_tree(loaded.config, loaded.raw)), end="")
        say(commented(launcher_for(loaded.config).build(loaded.config, run)), end="")
        return ExitCode.SUCCEEDED
    _check_machine(loaded.config)
    create_run(loaded, run)
    attempt = begin_attempt(loaded, run, overrides, reproduces=str(equal.original.path) if equal else "")
    return _begin(run, attempt, options, _what_is_otherwise(equal) if equal else ())


def resume(options: argparse.Namespace) -> int:
    run, overrides = find_run(options.runs_dir, options.run), overrides_of(options)
    if _has_succeeded(run) and not options.overrides:
        say(f"run {run.run_id} has succeeded; nothing to do", file=sys.stderr if options.json else sys.stdout)
        return ExitCode.SUCCEEDED
    loaded, changes = changed_config(run, overrides, check_for_target)
    _check_machine(loaded.config)
    job = find_job(run)
    if job is not None and job.job.is_elsewhere(run) and job.status.state == JobState.UNKNOWN:
        raise InputError(
            f"whether a job of run {run.run_id} runs is not known: {job.status.reason}; if its cluster is gone, delete "
            f"{run.attempts()[-1].job_json}"
        )
    if job is not None and job.is_alive:
        raise InputError(f"run {run.run_id} has a job already, {job}; cancel it first: {command(run, 'cancel')}")
    if run_status(run).state == "starting":
        raise InputError(f"run {run.run_id} is being started; wait a minute if it was killed")
    _require_checkpoints(run, loaded.config)
    with lease(run):  # refused here already, before an attempt is made, if the run is being trained
        if (attempts := run.attempts()) and not attempts[-1].result_json.exists():
            text = "the controller and the command that waited for it were killed"
            end_abandoned(attempts[-1], Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.INFRASTRUCTURE))
        attempt = begin_attempt(loaded, run, overrides, changes=changes)
    return _begin(run, attempt, options)


def _require_checkpoints(run: RunFolder, config: RunConfig) -> None:
    """Raises InputError for a run that would begin anew here, because its checkpoints are out of sight, or may be."""
    if not uses_the_folder_here(config.resources.target):
        return
    newest_step, newest_here = known_newest_step(run), CheckpointStore(run.checkpoints).newest_step()
    if newest_here < newest_step:
        known = f"with step {newest_step} as the newest, are"
    elif not newest_here and any(map(_may_have_saved_elsewhere, run.attempts())):
        known = "if it has saved any, are"
    else:
        return
    folders = [job.folder for attempt in run.attempts() if (job := Job.read(attempt)) and job.folder]
    where = f"in {folders[-1]} of its cluster" if folders else "where its cluster has the run's folder"
    raise InputError(
        f"the checkpoints of run {run.run_id}, {known} not here but {where}: continue it there, or copy them to the "
        "same folder here"
    )


def _may_have_saved_elsewhere(attempt: AttemptFolder) -> bool:
    """Its job had the run's folder at another place, and has not told how far it came."""
    job, result = Job.read(attempt), read_json(attempt.result_json)
    is_elsewhere = job is not None and job.is_elsewhere(attempt.run) and not attempt.handle_json.exists()
    return is_elsewhere and not (isinstance(result, dict) and NEWEST_STEP in result)


def render(options: argparse.Namespace) -> int:
    overrides = overrides_of(options)
    config = load_config(options.config, overrides, lambda config: launcher_for(config).check(config)).config
    if (launcher := queue_launcher(config.resources.target)) is None:
        run = RunFolder(Path(config.runs_dir).absolute() / "RUN_ID")
        say(str(launcher_for(config).build(config, run)), end="")
    else:
        say(str(launcher.render(config, options.config, options.overrides)), end="")
    return ExitCode.SUCCEEDED


def commented(request: Request) -> str:
    """The request below a config in YAML."""
    return "".join(f"# {line}".rstrip() + "\n" for line in str(request).splitlines())


def _check_machine(config: RunConfig) -> None:
    """What would end the command when the attempt has been begun. Raises InputError."""
    check_view()
    if queue_launcher(config.resources.target) is None:
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
    """Run an attempt to its end here, or send it to its target, or begin it in the background."""
    config = load_attempt(run, attempt).config
    if (launcher := queue_launcher(config.resources.target)) is not None:
        return _send(run, attempt, launcher, config, options, (begin_event(config, run, attempt), *first_events))
    with signals_held():  # until there are handlers, here or in the background; never by the threads of a view
        if not options.detach:
            kept, shows_ending = KeptView(make_view(options.json)), not options.json
            return wait_for_attempt(
                run, attempt, kept, LocalLauncher(), shows_ending=shows_ending, first_events=first_events
            )
        view = JsonView(sys.stdout) if options.json else PlainView(sys.stdout)
        for event in (begin_event(config, run, attempt), *first_events):
            view.show(event)
        with open(attempt.output_log, "ab") as log:
            background = subprocess.Popen(
                [sys.executable, "-m", __name__, str(run.path)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        how = f"follow: {command(run, 'logs', '-f')}; stop: kill {background.pid}"
        view.show(make_event("note", message=f"in the background; {how}"))
        view.close()
    return ExitCode.SUCCEEDED


def _send(
    run: RunFolder,
    attempt: AttemptFolder,
    launcher: QueueLauncher,
    config: RunConfig,
    options: argparse.Namespace,
    first_events: Iterable[Event],
) -> int:
    """Submit an attempt to a target with a queue and, unless detached, follow it to its end."""
    request = launcher.build(config, run)
    write_atomically(attempt.job_script, str(request))
    try:
        job = replace(launcher.submit(request, Path.cwd()), from_step=CheckpointStore(run.checkpoints).newest_step())
    except DistlmError as error:
        write_result(attempt, Outcome.of(error), started=None)
        raise
    job.write(attempt)
    view = JsonView(sys.stdout) if options.json else PlainView(sys.stdout)
    for event in first_events:
        view.show(event)
    if not options.detach:
        return follow(run, view, shows_ending=not options.json)
    view.show(make_event("note", message=f"{job.target} job {job.id}: {launcher.status(job)}"))
    how = f"follow: {command(run, 'logs', '-f')}; end: {command(run, 'cancel')}"
    view.show(make_event("note", message=how))
    return ExitCode.SUCCEEDED


def main(arguments: list[str]) -> int:
    def wait() -> int:
        run = RunFolder(Path(arguments[0]))
        return wait_for_attempt(run, run.attempts()[-1], KeptView(None), LocalLauncher(), shows_ending=False)

    return exit_code_of(wait)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
