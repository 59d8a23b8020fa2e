"""`distlm logs`, by files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import make_attempt, make_run

from distlm.cli import main
from distlm.controller.__main__ import write_result
from distlm.errors import Cause, ExitCode
from distlm.outcome import Outcome
from distlm.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs")
    for number in (1, 2):
        attempt = make_attempt(run)
        attempt.output_log.write_text(f"shown by attempt {number}\n")
        attempt.worker_log(1).write_text(f"of rank 1 in attempt {number}\n")
    return run


def end(run: RunFolder, code: ExitCode = ExitCode.SUCCEEDED) -> None:
    write_result(run.attempts()[-1], Outcome(code, "a reason", cause=Cause.CODE if code else None), started=1.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "shown by attempt 2\n"),
        (["--attempt", "1"], "shown by attempt 1\n"),
        (["--rank", "1"], "of rank 1 in attempt 2\n"),
        (["--rank", "1", "--attempt", "1"], "of rank 1 in attempt 1\n"),
    ],
)
def test_what_is_printed(run: RunFolder, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "last", *arguments]) == ExitCode.SUCCEEDED
    assert capsys.readouterr().out == text


def test_what_is_not_there_is_named_with_what_is(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "last", "--rank", "7"]) == ExitCode.BAD_INPUT
    assert "has no rank-00007.log; in " in (error := capsys.readouterr().err)
    assert "output.log, rank-00001.log" in error
    assert main(["logs", "last", "--attempt", "3"]) == ExitCode.BAD_INPUT
    assert "has no attempt 3; it has 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize("code", [ExitCode.SUCCEEDED, ExitCode.FAILED, ExitCode.PREEMPTED])
def test_who_follows_gets_the_end_and_its_code(
    run: RunFolder, code: ExitCode, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlm.commands.follow._LAST_LINES_TIMEOUT_S", 0.1)
    end(run, code)
    assert main(["logs", "last", "-f"]) == code
    shown = capsys.readouterr()
    assert shown.out.startswith("shown by attempt 2\n")
    assert ("succeeded" in shown.out) if code == ExitCode.SUCCEEDED else ("a reason" in shown.err)


def test_an_end_that_the_log_tells_is_not_told_twice(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    end(run)
    with open(run.attempts()[-1].output_log, "a") as log:
        log.write("succeeded: model in elsewhere/model\n")
    assert main(["logs", "last", "-f"]) == ExitCode.SUCCEEDED
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("succeeded") == 1


def test_the_file_of_a_rank_is_followed_to_the_end(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    end(run)
    assert main(["logs", "last", "-f", "--rank", "1"]) == ExitCode.SUCCEEDED
    assert capsys.readouterr().out == "of rank 1 in attempt 2\n"


def test_a_run_that_nobody_holds_is_lost(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distlm.run_status._STARTING_S", 0.0)
    assert main(["logs", "last", "-f"]) == ExitCode.INFRASTRUCTURE
    assert f"run {run.run_id} is lost" in capsys.readouterr().err
