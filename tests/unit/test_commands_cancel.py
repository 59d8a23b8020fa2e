"""`distlm cancel` without a controller: what it asks, what it waits for, and what there is nothing to cancel of."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest
from made_runs import end, held_lease, make_attempt, make_older, make_run

from distlm.cli import main
from distlm.errors import ExitCode
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "runs")


def answer(attempt: AttemptFolder, code: ExitCode) -> threading.Thread:
    """A controller that ends when it is asked to."""

    def wait() -> None:
        while not attempt.cancel_json.exists():
            time.sleep(0.01)
        end(attempt, code, "stopped after step 7, which is saved")

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("options", "ended", "expected"),
    [
        ([], ExitCode.CANCELLED, ExitCode.SUCCEEDED),
        ([], ExitCode.PREEMPTED, ExitCode.SUCCEEDED),
        ([], ExitCode.SUCCEEDED, ExitCode.SUCCEEDED),
        (["--checkpoint"], ExitCode.PREEMPTED, ExitCode.SUCCEEDED),
        (["--checkpoint"], ExitCode.SUCCEEDED, ExitCode.SUCCEEDED),
        (["--checkpoint"], ExitCode.CANCELLED, ExitCode.CANCELLED),
        (["--checkpoint"], ExitCode.INFRASTRUCTURE, ExitCode.INFRASTRUCTURE),
    ],
)
def test_it_waits_for_the_end_and_says_whether_it_is_the_one_that_was_asked(
    run: RunFolder, options: list[str], ended: ExitCode, expected: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = make_attempt(run)
    thread = answer(attempt, ended)
    assert main(["cancel", "last", *options]) == expected
    thread.join()
    assert read_json(attempt.cancel_json) == {"save": bool(options)}
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"run {run.run_id} is asked to " + ("finish its step, save and end" if options else "end now")
    assert lines[0].startswith(("succeeded: ", "preempted: ", "cancelled: ", "failed: "))
    if ended not in (ExitCode.SUCCEEDED, ExitCode.INFRASTRUCTURE):
        assert lines == [
            f"{ended.name.lower()}: stopped after step 7, which is saved",
            f"resume with: distlm resume {run.run_id}",
        ]


def test_for_programs(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    thread = answer(make_attempt(run), ExitCode.PREEMPTED)
    assert main(["cancel", run.run_id, "--checkpoint", "--json"]) == ExitCode.SUCCEEDED
    thread.join()
    assert json.loads(capsys.readouterr().out) == {
        "run_id": run.run_id, "attempt": 1, "state": "preempted", "exit_code": 75,
        "message": "stopped after step 7, which is saved", "next": [f"distlm resume {run.run_id}"],
    }  # fmt: skip


@pytest.mark.parametrize("code", list(ExitCode))
def test_of_what_has_ended_there_is_nothing_to_cancel(
    run: RunFolder, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = make_attempt(run)
    end(attempt, code)
    for _ in range(2):
        assert main(["cancel", "tiny", "--checkpoint"]) == ExitCode.SUCCEEDED
        told = capsys.readouterr().out
        assert told == f"run {run.run_id} has ended already: {code.name.lower()}; nothing to cancel\n"
    assert not attempt.cancel_json.exists()


def test_a_controller_that_does_not_answer_is_named_and_stays_asked(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = make_attempt(run)
    with held_lease(run) as holder:
        handle = {"host": socket.gethostname(), "pid": holder.pid, "temporary_root": ""}
        write_json(attempt.handle_json, handle)
        for options in (["--checkpoint"], []):
            assert main(["cancel", "last", "--timeout", "0", *options]) == ExitCode.INFRASTRUCTURE
    first, *more = capsys.readouterr().err.splitlines()
    controller = f"its controller, process {handle['pid']} on {handle['host']}, is still asked to"
    assert first == f"distlm: run {run.run_id} has not ended within 0 s; {controller}"
    assert more[0] == f"distlm: next: distlm cancel {run.run_id}"
    assert read_json(attempt.cancel_json) == {"save": False}, "the last one counts"


def test_a_lost_run_is_told(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = make_attempt(run)
    make_older(run, 120)
    assert main(["cancel", "last", "--json"]) == ExitCode.INFRASTRUCTURE
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["exit_code"], told["next"]) == ("lost", None, [f"distlm resume {run.run_id}"])
    assert f"run {run.run_id} is lost: nobody holds its lease" in told["message"]
    assert attempt.cancel_json.exists(), "its controller may be out of sight"


def test_a_run_that_was_never_begun(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", "last"]) == ExitCode.BAD_INPUT
    assert "has no attempt that could be cancelled" in capsys.readouterr().err
