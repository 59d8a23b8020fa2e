"""Run folders as `distlm submit` and a controller would have left them, made by the functions that they use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from distlm.config.attempt import begin_attempt, changes_so_far, create_run
from distlm.config.load import load_tree
from distlm.controller.__main__ import write_result
from distlm.controller.recorder import Recorder
from distlm.errors import ExitCode
from distlm.outcome import Outcome
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.tracking import Tracker
from distlm.tracking.records import Record

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": {"config": {"model_type": "bert"}},
    "tokenizer": {"train": {"vocab_size": 1000}},
    "data": {"train": [{"source": "python-docs"}]},
    "training": {"max_steps": 100},
    "resources": {"num_workers": 2},
}
HOLD_LEASE = """
import sys
from pathlib import Path
from distlm.run_folder import RunFolder, lease
with lease(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def run_id(minutes: int = 0) -> str:
    """Of a run that was made so many minutes after midnight."""
    return f"{datetime(2026, 1, 31, tzinfo=UTC) + timedelta(minutes=minutes):%Y%m%d-%H%M%S}-{minutes:06x}"


def make_run(runs_dir: Path, minutes: int = 0, **sections: Any) -> RunFolder:
    run = RunFolder(runs_dir.absolute() / run_id(minutes))
    create_run(load_tree({**CONFIG, **sections}), run)
    return run


def make_attempt(run: RunFolder, *changes: str) -> AttemptFolder:
    cumulated = [*changes_so_far(run), *changes]
    return begin_attempt(load_tree(CONFIG), run, list(changes), changes=cumulated)


def record(
    run: RunFolder,
    attempt: AttemptFolder,
    losses: dict[int, float],
    restored: int = 0,
    evaluated: dict[int, float] | None = None,
    connect: Callable[[], Tracker] | None = None,
) -> None:
    """What a controller records of an attempt that went on after step `restored`."""
    with Recorder(run, attempt, connect) as recorder:
        recorder.restored(restored, 1)
        messages = [Record(step, 1, step, {"train/loss": loss}).to_message() for step, loss in losses.items()]
        messages += [
            Record(step, 1, step, {"eval/loss": loss}).to_message() for step, loss in (evaluated or {}).items()
        ]
        recorder.record(sorted(messages, key=lambda message: message["step"]))


def end(attempt: AttemptFolder, code: ExitCode, message: str = "", took_s: float = 60.0) -> None:
    write_result(attempt, Outcome(code, message), time.time() - took_s)


def make_older(run: RunFolder, seconds: float) -> None:
    """As if all of its files had been written that long ago."""
    for path in [run.path, *run.path.rglob("*")]:
        about = path.stat()
        os.utime(path, (about.st_atime, about.st_mtime - seconds))


@contextmanager
def held_lease(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD_LEASE, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.stdin.close()


def distlm(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A `distlm` command, to its end."""
    command = [sys.executable, "-m", "distlm.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env or clean_environment(cwd), capture_output=True, text=True)


def clean_environment(home: Path, **others: str) -> dict[str, str]:
    """Nothing that names a cluster or a tracking server, and a home of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "COLUMNS"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **others}


def parsed(done: subprocess.CompletedProcess[str], codes: Sequence[int] = (0,)) -> Any:
    assert done.returncode in codes, (done.stdout, done.stderr)
    return json.loads(done.stdout)
