"""Commands whose reader has gone or cannot read all letters, and storage that fails them: the exit code is that of what
was done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fabricated import write
from made_runs import clean_environment, end, make_attempt, make_run

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


def run_distlm(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "distlm.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True)


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


LIMITED = [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8:strict"}]


@pytest.mark.parametrize("environment", LIMITED, ids=str)
def test_letters_that_the_reader_has_not(tmp_path: Path, environment: dict[str, str]) -> None:
    """Are shown as ? to people, and are whole in JSON."""
    folder = tmp_path / os.fsdecode(b"\xff")  # no UTF-8
    run = make_run(folder / "runs", name="预训练 é 😀")
    end(make_attempt(run), ExitCode.FAILED, "why: 预")
    environment = clean_environment(tmp_path, **environment)
    for verb in (["list"], ["status", "last"], ["schema", "--markdown"], ["doctor"]):
        done = run_distlm(*verb, cwd=folder, env=environment)
        assert done.returncode == 0 and done.stderr == b"" and len(done.stdout.splitlines()) > 1, verb
    (told,) = json.loads(run_distlm("list", "--json", cwd=folder, env=environment).stdout)
    assert (told["name"], told["folder"]) == ("预训练 é 😀", str(run.path))
    assert (
        json.loads(run_distlm("status", "last", "--json", cwd=folder, env=environment).stdout)["name"] == told["name"]
    )
    refused = run_distlm("status", "预", cwd=folder, env=environment)
    assert refused.returncode == ExitCode.BAD_INPUT and refused.stderr.startswith(b"distlm: there is no run ")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_output_that_is_closed_changes_no_exit_code(run: RunFolder, tmp_path: Path, closed: str) -> None:
    for command, code in (
        ("list", 0),
        (f"status {run.run_id}", 0),
        ("status none", 2),
        ("list --json", 0),
        ("--help", 0),
    ):
        shell = f"{sys.executable} -m distlm.cli {command} {closed}"
        done = subprocess.run(
            ["sh", "-c", shell], cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True
        )
        assert done.returncode == code, (command, done.stderr)
        assert "Traceback" not in done.stderr
        if command == "status none" and closed == "2>&-":
            assert done.stdout == "", "what is wrong is no output"


def test_sync_is_one_process(run: RunFolder, tmp_path: Path) -> None:
    """So that a signal to it ends what it does: no child of it goes on."""
    attempt_yaml = run.attempts()[0].attempt_yaml
    os.mkfifo(attempt_yaml)  # where it waits
    command = [sys.executable, "-m", "distlm.cli", "sync", run.run_id]
    with subprocess.Popen(command, cwd=tmp_path, env=clean_environment(tmp_path)) as sync:
        with open(attempt_yaml, "wb"):  # it has come there
            assert b"distlm.tracking.sync" in Path(f"/proc/{sync.pid}/cmdline").read_bytes()
            sync.terminate()
        assert sync.wait() == -signal.SIGTERM


def test_what_the_operating_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "x" * 300]) == ExitCode.INFRASTRUCTURE
    error = capsys.readouterr().err
    assert error.startswith("distlm: ") and error.endswith(": File name too long\n") and error.count("\n") == 1
