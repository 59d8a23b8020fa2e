"""`distlm --help` and the help of every verb: for a terminal of 80 columns, with examples that are right, at once."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distlm.cli import _parse, _parser
from distlm.errors import ExitCode

ROOT = Path(__file__).parents[2]
(SUBPARSERS,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
VERBS = list(SUBPARSERS.choices)


def help_of(*arguments: str) -> str:
    command = [sys.executable, "-m", "distlm.cli", *arguments]
    environment = {"COLUMNS": "80", "PATH": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_80_columns_and_has_examples_that_are_right(verb: str) -> None:
    text = help_of(*filter(None, [verb]), "--help")
    assert max(map(len, text.splitlines())) <= 80
    examples = re.findall(r"^  (distlm .+)$", text.partition("\nexamples:\n")[2], flags=re.MULTILINE)
    assert examples, f"give `distlm {verb}` an example"
    for example in examples:
        command = re.split(r"   | [>|] ", example)[0]  # without what is said about it, or done with its output
        options = _parse(shlex.split(command)[1:])
        assert command.split()[1] == (verb or command.split()[1])
        assert all("=" in override for override in getattr(options, "overrides", []))


def test_every_verb_is_on_one_line_with_what_it_does() -> None:
    lines = help_of("--help").splitlines()
    for verb in VERBS:
        assert [line for line in lines if re.match(rf"    {verb} +\w", line)], verb


def test_distlm_alone_shows_the_help_and_is_bad_input() -> None:
    command = [sys.executable, "-m", "distlm.cli"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == ExitCode.BAD_INPUT
    assert ended.stdout == "" and "train a run from its config" in ended.stderr and "examples:" in ended.stderr


def test_help_comes_at_once() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        help_of("--help")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.5
