"""`distlm predict` and `distlm evaluate`: what a trained run is used for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from distlm.commands.checkpoints import step_argument
from distlm.commands.data_plane import continue_in
from distlm.commands.find import find_run
from distlm.table_arguments import TableArguments


def predict(options: argparse.Namespace) -> int:
    arguments = [f"--out={options.out}", f"--workers={options.workers}"]
    _continue_in("predict", options, arguments, [options.input])


def evaluate(options: argparse.Namespace) -> int:
    arguments = [f"--out={options.out}"] if options.out is not None else []
    _continue_in("evaluate", options, [*arguments, *(["--json"] if options.json else [])], options.data)


def _continue_in(name: str, options: argparse.Namespace, arguments: list[str], files: list[Path]) -> NoReturn:
    run = find_run(options.runs_dir, options.run)
    arguments += [*step_argument(options), *TableArguments.of(options).as_arguments()]
    if options.batch_size is not None:
        arguments.append(f"--batch-size={options.batch_size}")
    continue_in(f"distlm.inference.{name}", *arguments, "--", run.path, *files)
