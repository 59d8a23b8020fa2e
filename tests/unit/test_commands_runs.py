"""`distlm list` and `status`: the state of runs that are whole, half made, damaged, and just being trained."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fabricated import write
from made_runs import (
    clean_environment,
    distlm,
    end,
    held_lease,
    make_attempt,
    make_older,
    make_run,
    parsed,
    record,
    run_id,
)

from distlm.checkpoint.store import CheckpointStore
from distlm.cli import main
from distlm.commands.find import find_run
from distlm.errors import Cause, ExitCode, Problem
from distlm.metrics_file import encode_line, read_backwards, read_lines
from distlm.outcome import Follower, Outcome, Retry, write_result
from distlm.run_folder import RunFolder, lease, lease_holder, read_json, write_json
from distlm.run_status import newest_metrics, run_status
from distlm.tracking.records import Record
from distlm.view.ending import ending
from distlm.view.table import Column, table


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "runs"


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = ExitCode.SUCCEEDED) -> str:
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    assert code or captured.err == ""
    return captured.out or captured.err


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_state_is_that_of_the_result(runs_dir: Path, code: ExitCode) -> None:
    run = make_run(runs_dir)
    end(make_attempt(run), code, "why")
    status = run_status(run)
    assert (status.state, status.attempts[0].exit_code, status.damaged) == (code.name.lower(), code, [])


def test_starting_then_lost(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    assert run_status(run).state == "starting"
    make_attempt(run)
    assert run_status(run).state == "starting"
    make_older(run, 120)
    assert run_status(run).state == "lost"


def test_running_while_the_lease_is_held_and_lost_after_a_kill(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    with held_lease(run) as holder:
        assert run_status(run).state == "running"
        write_json(attempt.handle_json, {"host": socket.gethostname(), "pid": holder.pid, "temporary_root": ""})
        assert lease_holder(run) == f"process {holder.pid} on {socket.gethostname()}"
        assert run_status(run).state == "running"
        holder.kill()
    assert run_status(run).state == "lost"


def test_a_result_counts_also_while_the_lease_is_held(runs_dir: Path) -> None:
    """By `distlm sync`, or by a resume that is about to make its attempt."""
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    end(attempt, ExitCode.FAILED)
    with held_lease(run):
        assert run_status(run).state == "failed"
        attempt.result_json.unlink()
        write_json(attempt.handle_json, {"host": "another-host", "pid": 1, "temporary_root": ""})
        assert run_status(run).state == "lost", "sync does not train"


def test_a_controller_that_has_given_the_lease_back_and_still_lives_is_running(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", "distlm.controller"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as controller:
        write_json(attempt.handle_json, {"host": socket.gethostname(), "pid": controller.pid, "temporary_root": ""})
        assert run_status(run).state == "running"
    assert run_status(run).state == "lost"


def test_asking_neither_changes_the_lease_nor_keeps_a_controller_out(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    make_attempt(run)
    with lease(run):
        before = run.lease.read_bytes()
    stop, asked = threading.Event(), 0

    def ask() -> None:
        nonlocal asked
        while not stop.is_set():
            lease_holder(run)
            asked += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            with lease(run):  # raises InputError if it is kept out
                pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert asked > 100 and run.lease.read_bytes() == before


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_the_newest_metrics_are_those_that_no_restore_has_superseded(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    first = make_attempt(run)
    record(run, first, {10: 5.0, 20: 4.0, 30: 3.0}, evaluated={20: 4.5, 30: 3.5})
    make_attempt(run)
    found = newest_metrics(run.attempts())
    assert (found.step, found.train_step, found.train["train/loss"], found.eval_step) == (30, 30, 3.0, 30)
    record(run, run.attempts()[-1], {}, restored=20)
    found = newest_metrics(run.attempts())
    assert (found.step, found.train["train/loss"], found.eval["eval/loss"]) == (20, 4.0, 4.5)
    record(run, make_attempt(run), {}, restored=0)
    assert newest_metrics(run.attempts()) == newest_metrics([run.attempts()[-1]])
    assert newest_metrics(run.attempts()).train == {}


def test_reading_backwards_gives_what_reading_forwards_gives(tmp_path: Path) -> None:
    draw, path = random.Random(3), tmp_path / "metrics.jsonl"
    for size in (0, 1, 2, 40, 400):
        lines = [
            encode_line({"kind": "event", "number": number, "text": "x" * draw.choice([0, 10, 2000, 70_000])})
            for number in range(size)
        ]
        if size > 2:
            lines[size // 2] = b"{damaged\n"
        for torn in (b"", b'{"kind": "event", "num'):
            path.write_bytes(b"".join(lines) + torn)
            forwards = [message for _, message in read_lines(path)]
            assert list(read_backwards(path, b"event"))[::-1] == forwards
    assert [m["number"] for m in read_backwards(path, b'"number":7,', b'"number":300,')] == [300, 7]
    assert list(read_backwards(tmp_path / "none", b"event")) == []


def test_the_size_of_a_file_does_not_matter(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    with open(attempt.metrics_jsonl, "wb") as file:
        file.truncate(4 * 2**30)  # a hole, which takes no room
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
        for name, value in (("eval/loss", 2.5), ("train/loss", 2.0)):
            file.write(encode_line(Record(10, 1, 0, {name: value}).to_message()))
    read_before = bytes_read()
    assert run_status(run).metrics.train == {"train/loss": 2.0}
    assert bytes_read() - read_before < 2**20


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_total_steps(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    end(make_attempt(run), ExitCode.INFRASTRUCTURE)
    assert run_status(run).total_steps == 100
    end(make_attempt(run, "training.max_steps=300", "resources.num_workers=4"), ExitCode.FAILED)
    end(make_attempt(run, "training.max_steps=5"), ExitCode.BAD_INPUT)
    status = run_status(run)
    assert status.total_steps == 300, "a refused attempt changes nothing"
    assert [one.num_workers for one in status.attempts] == [2, 4, 4]
    make_attempt(run, "resources.num_workers=[1,4]")
    assert run_status(run).attempts[-1].num_workers == [1, 4]
    epochs = make_run(runs_dir, 1, training={"num_train_epochs": 2.0})
    assert run_status(epochs).total_steps is None
    epochs.init.mkdir()
    write_json(epochs.init / "prepared.json", {"total_steps": 77})
    assert run_status(epochs).total_steps == 77


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_is_newest_first_and_limited(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(23):
        run = make_run(runs_dir, number, name=f"run {number}")
        attempt = make_attempt(run)
        record(run, attempt, {10: 1 + number / 10})
        end(attempt, ExitCode.SUCCEEDED, took_s=75)
    (runs_dir / "cache").mkdir()
    (runs_dir / "mlartifacts").mkdir()
    header, *lines, last = out_of(capsys, "list").splitlines()
    assert header.split() == ["run", "name", "state", "step", "loss", "started", "took"]
    assert [line.split()[0] for line in lines] == [run_id(number) for number in range(22, 2, -1)]
    assert lines[0].split() == [run_id(22), "run", "22", "succeeded", "100/100", "3.2", "1", "min", "ago", "1m", "15s"]
    assert last == "and 3 older runs (-n 0 lists all)"
    assert len(out_of(capsys, "list", "--limit", "0").splitlines()) == 24
    (one,) = json.loads(out_of(capsys, "list", "--json", "-n", "1"))
    assert one.pop("started_at") and one.pop("duration_s") == pytest.approx(75, abs=3)
    assert one == {
        "run_id": run_id(22), "name": "run 22", "state": "succeeded", "step": 100, "total_steps": 100, "loss": 3.2,
        "attempts": 1, "folder": str(runs_dir / run_id(22)), "damaged": [],
    }  # fmt: skip


def test_the_newest_run_is_a_run(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And no folder beside it whose name sorts behind, such as a copy that somebody has made."""
    runs = [make_run(runs_dir, number) for number in range(2)]
    for name in ("old-backup", f"{runs[0].run_id}-backup", f"{runs[1].run_id}.bak", "99999999-999999-abcdef"):
        shutil.copytree(runs[0].path, runs_dir / name)
    assert find_run(Path("runs"), "last") == runs[1]
    assert find_run(Path("runs"), "old").path == runs_dir / "old-backup"
    first, second, *others = json.loads(out_of(capsys, "list", "--json"))
    assert [first["run_id"], second["run_id"]] == [runs[1].run_id, runs[0].run_id]
    assert len(others) == 4, "they are listed, behind"
    for run in runs:
        shutil.rmtree(run.path)
    assert "there is no run last in runs (newest runs: " in out_of(capsys, "status", "last", code=ExitCode.BAD_INPUT)


def test_attempts_are_what_has_a_number(runs_dir: Path) -> None:
    run = make_run(runs_dir)
    for name in ("001", "002", "999", "1000", "001-copy", "0099.old"):
        (run.path / "attempts" / name).mkdir(parents=True)
    assert [attempt.number for attempt in run.attempts()] == [1, 2, 999, 1000]
    assert run.new_attempt().number == 1001
    assert make_attempt(run).number == 1002, "as a resume does"


def test_no_runs(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "list").startswith("no runs in runs")
    assert json.loads(out_of(capsys, "list", "--json")) == []
    assert "there is no run x" in out_of(capsys, "status", "x", code=ExitCode.BAD_INPUT)
    assert "there is no run last" in out_of(capsys, "status", "last", code=ExitCode.BAD_INPUT)


def test_numbers_that_json_does_not_have(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(runs_dir)
    record(run, make_attempt(run), {10: math.nan}, evaluated={10: math.inf})
    assert json.loads(out_of(capsys, "list", "--json"), parse_constant=pytest.fail)[0]["loss"] == "NaN"
    metrics = json.loads(out_of(capsys, "status", "last", "--json"), parse_constant=pytest.fail)["metrics"]
    assert metrics["eval"] == {"step": 10, "values": {"eval/loss": "Infinity"}}
    assert " nan " in out_of(capsys, "list")


def damage(run: RunFolder, kind: str) -> None:
    attempt = run.attempts()[-1]
    match kind:
        case "no run.yaml":
            run.run_yaml.unlink()
        case "run.yaml is a list":
            run.run_yaml.write_text("[1, 2]")
        case "a section is a number":
            run.run_yaml.write_text("name: [3]\ntraining: 5\nresources: 7\nmodel: 1\ntracking: 2\n")
        case "torn result.json":
            attempt.result_json.write_text(attempt.result_json.read_text()[:30])
        case "result.json of another kind":
            attempt.result_json.write_text('{"state": ["x"], "exit_code": "no", "started_at": 5, "log": 3}')
        case "torn handle.json":
            attempt.result_json.unlink()
            attempt.handle_json.write_text("{")
        case "attempt.yaml is damaged":
            attempt.attempt_yaml.write_text("target: 3\nchanges: 7\n")
        case "no attempt.yaml":
            attempt.attempt_yaml.unlink()
        case "empty attempts":
            shutil.rmtree(attempt.path)
        case "an odd attempt":
            (run.path / "attempts" / "001-copy").mkdir()
            (run.path / "attempts" / "notes.txt").write_text("")
        case "damaged metrics":
            attempt.metrics_jsonl.write_bytes(
                b'{"kind":"metrics","step":"x","values":{"train/loss":1}}\n"train/loss"\n'
            )
        case "damaged prepared.json":
            run.run_yaml.write_text("training: {max_steps: null}")
            run.init.mkdir()
            (run.init / "prepared.json").write_text("[]")


HARMLESS = ("a section is a number", "an odd attempt", "damaged metrics", "empty attempts")


@pytest.mark.parametrize(
    "kind",
    [
        "no run.yaml", "run.yaml is a list", "torn result.json", "result.json of another kind",
        "torn handle.json", "attempt.yaml is damaged", "no attempt.yaml", "damaged prepared.json", *HARMLESS,
    ],
)  # fmt: skip
def test_one_damaged_run_hides_no_other(runs_dir: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    for number in range(2):
        run = make_run(runs_dir, number)
        end(make_attempt(run), ExitCode.FAILED, "the cause")
    damage(run, kind)
    first, second = json.loads(out_of(capsys, "list", "--json"))
    assert (second["state"], second["damaged"]) == ("failed", [])
    assert (first["run_id"], bool(first["damaged"])) == (run_id(1), kind not in HARMLESS)
    assert not any(str(runs_dir) in text for text in first["damaged"]), "relative to the run"
    assert len(out_of(capsys, "list").splitlines()) == 3 + len(first["damaged"])
    if run.run_yaml.exists():
        page, told = out_of(capsys, "status", run_id(1)), json.loads(out_of(capsys, "status", run_id(1), "--json"))
        assert page.startswith(f"run {run_id(1)}: {first['state']}")
        assert set(first["damaged"]) <= set(told["damaged"])


def test_fuzzed_run_folders(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(11)
    whole = make_run(runs_dir)
    attempt = make_attempt(whole)
    record(whole, attempt, {10: 1.0}, evaluated={10: 2.0})
    write_json(attempt.handle_json, {"host": "h", "pid": 1, "temporary_root": ""})
    end(attempt, ExitCode.FAILED)
    for number in range(1, 60):
        copy = runs_dir / run_id(number)
        shutil.copytree(whole.path, copy)
        for file in [path for path in copy.rglob("*") if path.is_file()]:
            content = bytearray(file.read_bytes())
            for _ in range(draw.randrange(3)):
                start = draw.randrange(len(content) or 1)
                content[start : start + draw.randrange(30)] = draw.randbytes(draw.randrange(30))
            file.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content) + 1)])])
    assert len(json.loads(out_of(capsys, "list", "--json", "-n", "0"))) == 60
    text = out_of(capsys, "list", "-n", "0")
    assert "\x1b" not in text and all(run_id(number) in text for number in range(60))
    for number in range(60):
        json.loads(out_of(capsys, "status", run_id(number), "--json"))
        out_of(capsys, "status", run_id(number))


# --- status ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def resumed(runs_dir: Path) -> RunFolder:
    """A run whose first attempt lost a worker, and whose second one was refused; with two checkpoints, one damaged."""
    run = make_run(runs_dir)
    first = make_attempt(run)
    record(run, first, {10: 5.0, 20: 4.0}, evaluated={20: 4.25})
    end(first, ExitCode.INFRASTRUCTURE, "worker 1 was killed (SIGKILL)\nfree some memory")
    store = CheckpointStore(run.checkpoints)
    run.checkpoints.mkdir()
    for step in (10, 20, 30):
        write(store, step)
    (run.checkpoints / "step-00000030" / "manifest.json").write_text("{")
    second = make_attempt(run, "deepspeed.zero_stage=1", "tracking.tracking_uri=https://me:${WORD}@host/x")
    write_json(second.metrics_sent_json, {"destination": "mlflow:0123abcd", "offset": 3})
    end(second, ExitCode.CANCELLED, "stopped on request")
    return run


def test_status_says_everything(
    resumed: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORD", "hidden-word")
    text = out_of(capsys, "status", "last")
    told: dict[str, Any] = json.loads(out_of(capsys, "status", resumed.run_id[:10], "--json"))
    assert "hidden-word" not in text + str(told)
    assert text.startswith(f"run {resumed.run_id}: cancelled, step 20/100, took 2m 0")
    for expected in (
        "masked-lm", "bert from scratch", "step 20: loss 4", "step 20: loss 4.25", "20, 10 (a resume continues 20)",
        "https://***@host/x (run 0123abcd)", "worker 1 was killed (SIGKILL)\n  free some memory",
        f"next: distlm resume {resumed.run_id}", "damaged: checkpoint step-00000030",
        "attempts/002/logs/controller.log",
    ):  # fmt: skip
        assert expected in text, (expected, text)
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert [(row[1], row[2], row[3], row[4], row[-1]) for row in rows] == [
        ("infrastructure", "local", "2", "2", "3"),
        ("cancelled", "local", "2", "1", "130"),
    ]
    assert (told["checkpoints"], told["last_good_step"], told["mlflow_run_id"]) == ([20, 10], 20, "0123abcd")
    assert [(one["zero_stage"], one["exit_code"]) for one in told["attempts"]] == [(2, 3), (1, 130)]
    assert told["metrics"]["eval"] == {"step": 20, "values": {"eval/loss": 4.25}}
    assert told["model_folder"] is None
    assert told["next"] == [f"distlm resume {resumed.run_id}", f"distlm ui {resumed.run_id}"]
    assert {*told} == {
        "run_id", "name", "state", "step", "total_steps", "loss", "started_at", "duration_s", "attempts", "folder",
        "damaged", "task", "model", "metrics", "checkpoints", "last_good_step", "log", "model_folder", "tracking_uri",
        "mlflow_run_id", "job", "next",
    }  # fmt: skip


def test_a_variable_that_is_not_set_here_hides_nothing(
    resumed: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORD", raising=False)
    told = json.loads(out_of(capsys, "status", "last", "--json"))
    assert (told["tracking_uri"], told["mlflow_run_id"], told["step"]) == ("https://***@host/x", "0123abcd", 20)
    assert not any("WORD" in text for text in told["damaged"])
    page = out_of(capsys, "status", "last")
    assert "https://***@host/x (run 0123abcd)" in page and "WORD" not in page


@pytest.mark.parametrize(
    "tracking",
    ["{report_to: 5}", "{report_to: [mlflow], tracking_uri: 5}", "{report_to: [mlflow], tracking_uri: [a]}", "5"],
)
def test_odd_values_of_tracking_are_no_traceback(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], tracking: str
) -> None:
    run = make_run(runs_dir)
    make_attempt(run)
    run.run_yaml.write_text(f"tracking: {tracking}\n")
    assert json.loads(out_of(capsys, "status", "last", "--json"))["run_id"] == run.run_id
    out_of(capsys, "status", "last")
    assert main(["ui", "last", "--port", "1"]) == ExitCode.BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


RESUME, ANEW = f"distlm resume {run_id()}", f"distlm submit run:{run_id()} KEY=VALUE"


@pytest.mark.parametrize(
    ("code", "cause", "expected"),
    [
        (ExitCode.FAILED, Cause.DIVERGENCE, [ANEW]),
        (ExitCode.FAILED, Cause.OUT_OF_MEMORY, [ANEW, f"{RESUME} KEY=VALUE"]),
        (ExitCode.FAILED, Cause.CODE, [RESUME]),
        (ExitCode.INFRASTRUCTURE, Cause.NODE_LOST, [RESUME]),
        (ExitCode.PREEMPTED, Cause.PREEMPTION, [RESUME]),
        (ExitCode.CANCELLED, Cause.CANCELLATION, [RESUME]),
        (ExitCode.BAD_INPUT, Cause.CONFIGURATION, [ANEW]),
    ],
)
def test_status_says_what_the_command_said_at_its_end(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], code: ExitCode, cause: Cause, expected: list[str]
) -> None:
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    lost = [Follower(rank, "Connection closed by peer") for rank in (0, 2)]
    outcome = Outcome(code, "the reason", 1, "node1", "trace", cause, "bert.py:9 in f", "lower a.key", lost)
    problems = [Problem("no such key", "seeed", "1", "a.yaml:3").to_json()] if code == ExitCode.BAD_INPUT else []
    write_result(attempt, outcome, 0.0, problems)
    said = ending(run, read_json(attempt.result_json))
    told = json.loads(out_of(capsys, "status", "last", "--json"))
    assert told["next"] == expected and told["attempts"][0]["message"] == "the reason"
    page = out_of(capsys, "status", "last")
    assert [line for line in page.splitlines() if line.startswith("next: ")] == [f"next: {line}" for line in expected]
    if problems:
        assert "a.yaml:3: seeed = 1: no such key" in page
        return
    *what, how = said
    assert "\n".join(f"  {line}" for line in what) in page
    assert all(command in how for command in expected), "the same ones"


@pytest.mark.parametrize("has_ended", [False, True])
def test_status_says_what_an_attempt_went_on_after(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], has_ended: bool
) -> None:
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    at = "2026-05-01T12:00:00+00:00"
    retries = [Retry(n, Cause.NODE_LOST, 1, "node-7", f"silent, {n}", 124, 100, at) for n in range(1, 8)]
    lines = [encode_line({"kind": "event", "event": "retry", **asdict(retry)}) for retry in retries]
    attempt.metrics_jsonl.write_bytes(b"".join(lines))
    if has_ended:
        write_result(attempt, Outcome(ExitCode.FAILED, "why", retries=retries), 0.0)
    (told,) = json.loads(out_of(capsys, "status", run.run_id, "--json"))["attempts"]
    assert told["retries"] == [json.loads(json.dumps(asdict(retry))) for retry in retries]
    page = out_of(capsys, "status", run.run_id)
    assert "attempt 1 went on after 7 failures, at last:" in page
    assert "node lost on rank 1 (node-7): silent, 7; from step 100" in page and "silent, 2" not in page


def test_next_of_a_result_that_says_nothing(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(runs_dir)
    attempt = make_attempt(run)
    attempt.result_json.write_text("{")
    told = json.loads(out_of(capsys, "status", "last", "--json"))
    assert (told["state"], told["next"]) == ("unknown", []), "resume is refused"


def test_the_next_command_works_from_here(runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "elsewhere")
    record(run, make_attempt(run), {10: 1.0})
    make_older(run, 120)
    told = json.loads(out_of(capsys, "status", "last", "--runs-dir", "elsewhere", "--json"))
    assert told["state"] == "lost"
    assert told["next"] == [f"distlm resume elsewhere/{run.run_id}", f"distlm sync elsewhere/{run.run_id}"]
    assert json.loads(out_of(capsys, "status", f"elsewhere/{run.run_id}", "--json"))["run_id"] == run.run_id


def test_what_is_not_recorded_in_mlflow_has_no_page_there(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(runs_dir, tracking={"report_to": []})
    end(make_attempt(run), ExitCode.SUCCEEDED)
    told = json.loads(out_of(capsys, "status", "last", "--json"))
    assert (told["tracking_uri"], told["next"]) == (None, [f"distlm export {run.run_id} DIR"])


# --- output ----------------------------------------------------------------------------------------------------------


def test_tables_fit_and_keep_ids_whole() -> None:
    columns = [
        Column("run"), Column("name", gives_way=True), Column("state"), Column("step", "right"),
        Column("loss", "right"), Column("started", "right", may_go=True), Column("took", "right", may_go=True),
    ]  # fmt: skip
    row = (run_id(), "预训练 " * 9, "infrastructure", "100000/100000", "3.142", "12 min ago", "1h 02m")
    for width in (80, 160):
        for line in table(columns, [row, row], width)[1:]:
            assert line.startswith(f"{run_id()}  预训") and "100000/100000" in line
            assert len(line) + sum(letter >= "一" for letter in line) <= width
    narrow, wide = table(columns, [row], 80), table(columns, [row], 160)
    assert "took" not in narrow[0] and "…" in narrow[1]
    assert "took" in wide[0] and "…" not in wide[1]
    assert "预训练 " * 8 in table(columns, [row], None)[1]
    assert table([Column("a"), Column("b", "right")], [("x\n\x1b[31m", None)]) == ["a        b", "x??[31m  -"]


def test_a_pipe_gets_plain_text_and_a_reader_that_goes_is_no_error(runs_dir: Path, tmp_path: Path) -> None:
    name = "a name that is longer than any terminal " * 5
    for number in range(30):
        end(make_attempt(make_run(runs_dir, number, name=name)), ExitCode.FAILED)
    done = distlm("list", cwd=tmp_path, env=clean_environment(tmp_path, TERM="xterm-256color", COLUMNS="40"))
    assert done.returncode == 0 and "\x1b" not in done.stdout
    assert name.strip() in done.stdout
    shell = f"{sys.executable} -m distlm.cli list -n 0 --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    piped = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True
    )
    assert (piped.stdout, piped.stderr) == ("[0\n", "")


def test_list_and_status_load_no_data_plane(runs_dir: Path, tmp_path: Path) -> None:
    run = make_run(runs_dir)
    record(run, make_attempt(run), {10: 1.0})
    code = (
        "import sys; from distlm.cli import main; code = main(sys.argv[1:]);"
        "print(*{'torch', 'numpy', 'ray', 'mlflow', 'psutil', 'distlm.tracking', 'distlm.controller', 'distlm.worker'}"
        " & {*sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    for arguments in (("list",), ("status", "last")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=clean_environment(tmp_path),
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "\n")


def test_whole_commands(runs_dir: Path, tmp_path: Path) -> None:
    run = make_run(runs_dir)
    end(make_attempt(run), ExitCode.FAILED, "why")
    assert parsed(distlm("status", "last", "--json", cwd=tmp_path))["state"] == "failed"
    refused = distlm("status", "2099", cwd=tmp_path)
    assert refused.returncode == ExitCode.BAD_INPUT and refused.stderr.startswith("distlm: there is no run 2099")
    assert distlm("list", "-n", "-1", cwd=tmp_path).returncode == ExitCode.BAD_INPUT
    assert read_json(run.attempts()[0].result_json)["message"] == "why"
