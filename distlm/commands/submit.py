"""`distlm submit` and `distlm resume`: begin an attempt, and say how it ended."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from distlm.commands.find import find_run
from distlm.config.attempt import begin_attempt, changed_config, create_run
from distlm.config.load import load_config
from distlm.config.reproduce import Reproduction, reproduce
from distlm.config.resolve import resolved_tree
from distlm.console import say
from distlm.errors import ExitCode, Problem
from distlm.launchers.local import LocalLauncher
from distlm.run_folder import RunFolder, dump_yaml, lease, new_run_id, read_json

_RUN_PREFIX = "run:"
"""What begins the name of a run that is given in place of a config file."""


def submit(options: argparse.Namespace) -> int:
    launcher = LocalLauncher()
    equal = None
    if (name := str(options.config)).startswith(_RUN_PREFIX):
        original = find_run(options.runs_dir, name.removeprefix(_RUN_PREFIX))
        equal = reproduce(original, options.overrides, launcher.check)
    loaded = equal.loaded if equal else load_config(options.config, options.overrides, launcher.check)
    run = RunFolder(Path(loaded.config.runs_dir).absolute() / new_run_id())
    request = launcher.build(loaded.config, run)
    if options.dry_run:
        say(dump_yaml(resolved_tree(loaded.config, loaded.raw)), end="")
        say(f"# {request}")
        return ExitCode.SUCCEEDED
    create_run(loaded, run)
    reproduces = str(equal.original.path) if equal else ""
    attempt = begin_attempt(loaded, run, options.overrides, reproduces=reproduces)
    say(f"run {run.run_id} in {os.path.relpath(run.path)}")
    if equal:
        _say_what_is_otherwise(equal)
    code = launcher.submit(request, attempt, options.detach)
    return _report(run, code) if not options.detach else code


def resume(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    last = _last_result(run)
    if last and last["exit_code"] == ExitCode.SUCCEEDED and not options.overrides:
        say(f"run {run.run_id} has succeeded; nothing to do")
        return ExitCode.SUCCEEDED
    launcher = LocalLauncher()
    loaded, changes = changed_config(run, options.overrides, launcher.check)
    with lease(run):  # refused here already, before an attempt is made, if the run is being trained
        attempt = begin_attempt(loaded, run, options.overrides, changes=changes)
    say(f"run {run.run_id}, attempt {attempt.number}")
    code = launcher.submit(launcher.build(loaded.config, run), attempt, options.detach)
    return _report(run, code) if not options.detach else code


def _say_what_is_otherwise(equal: Reproduction) -> None:
    say(f"the config of run {equal.original.run_id}{', but for:' if equal.changed else ''}")
    for line in equal.changed:
        say(f"  {line}")
    for line in equal.warnings:
        say(f"warning: {line}")


def _last_result(run: RunFolder) -> dict[str, object] | None:
    attempts = run.attempts()
    result: dict[str, object] | None = read_json(attempts[-1].result_json) if attempts else None
    return result


def _report(run: RunFolder, code: int) -> int:
    """Say how the attempt ended, from its result.json."""

    result = read_json(run.attempts()[-1].result_json)
    where = os.path.relpath
    if code == ExitCode.SUCCEEDED:
        say(f"succeeded: model in {where(run.model)}; curves: distlm ui --runs-dir {where(run.runs_dir)}")
        return code
    if result["problems"]:
        for problem in result["problems"]:
            say(f"distlm: {Problem.from_json(problem)}", file=sys.stderr)
        return code
    place = f" on rank {result['rank']}" if result.get("rank") is not None else ""
    place += f" ({result['host']})" if result.get("host") else ""
    say(f"distlm: {result['state']}{place}: {result['message']}", file=sys.stderr)
    say(f"distlm: log: {where(result['log'])}", file=sys.stderr)
    if any(run.checkpoints.glob("step-*")):
        say(f"distlm: continue with: distlm resume {run.run_id}", file=sys.stderr)
    return code
