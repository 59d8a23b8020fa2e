"""`distlm checkpoints` and `distlm export`: what is saved of a run."""

from __future__ import annotations

import argparse
import json
import sys

from distlm.checkpoint.listing import best_by, list_checkpoints, table
from distlm.checkpoint.store import CheckpointStore
from distlm.checkpoint.tensor_file import one_line
from distlm.commands.data_plane import continue_in
from distlm.commands.find import find_run
from distlm.console import say
from distlm.errors import ExitCode, InputError


def checkpoints(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    try:
        best = best_by(run)
    except InputError as error:
        say(f"distlm: warning: which one is best is not known: {one_line(error)}", file=sys.stderr)
        best = None
    listed = list_checkpoints(CheckpointStore(run.checkpoints), best, verify=options.verify)
    if options.json:
        say(json.dumps([one.to_json() for one in listed], indent=2))
    elif listed:
        say("\n".join(table(listed, best)))
    else:
        say(f"run {run.run_id} has no checkpoints")
    return ExitCode.INFRASTRUCTURE if any(one.state in ("damaged", "unknown") for one in listed) else ExitCode.SUCCEEDED


def export(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    merge = ["--merge"] if options.merge else []
    continue_in("distlm.worker.export", *step_argument(options), *merge, "--", run.path, options.dir)


def step_argument(options: argparse.Namespace) -> list[str]:
    """`--step` as it was given, for the process in which the command goes on."""
    return [] if options.step is None else [f"--step={options.step}"]
