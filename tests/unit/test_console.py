"""Commands whose reader has gone, and storage that fails them: the exit code is that of what was done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fabricated import write

from distlm.checkpoint.store import MANIFEST_NAME, CheckpointStore
from distlm.cli import main
from distlm.errors import ExitCode
from distlm.run_folder import RunFolder, write_json


def into_a_closed_pipe(*arguments: str) -> int:
    """The exit code of a command that nobody reads, neither its output nor its errors."""
    reader = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE)
    reader.wait()
    command = [sys.executable, "-m", "distlm.cli", *arguments]
    return subprocess.run(command, stdout=reader.stdin, stderr=reader.stdin).returncode


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "runs", "20260131-235959-3fa9c1")
    run.run_yaml.write_text("training: {}")
    run.new_attempt()
    return run


def test_a_reader_that_has_gone_changes_no_exit_code(run: RunFolder) -> None:
    assert into_a_closed_pipe("schema") == ExitCode.SUCCEEDED
    assert into_a_closed_pipe("validate", "nowhere.yaml") == ExitCode.BAD_INPUT
    store = CheckpointStore(run.checkpoints)
    store.clean()
    write(store, 5)
    assert into_a_closed_pipe("checkpoints", str(run.path)) == ExitCode.SUCCEEDED
    (run.checkpoints / "step-00000005" / MANIFEST_NAME).write_text("{")
    assert into_a_closed_pipe("checkpoints", str(run.path)) == ExitCode.INFRASTRUCTURE
    write_json(run.attempts()[-1].result_json, {"exit_code": 0})
    assert into_a_closed_pipe("resume", str(run.path)) == ExitCode.SUCCEEDED
    assert into_a_closed_pipe("resume", str(run.path), "seed=7") == ExitCode.BAD_INPUT


def test_what_the_operating_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "x" * 300]) == ExitCode.INFRASTRUCTURE
    error = capsys.readouterr().err
    assert error.startswith("distlm: ") and error.endswith(": File name too long\n") and error.count("\n") == 1
