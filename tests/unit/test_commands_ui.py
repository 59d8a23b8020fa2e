"""`distlm ui` with real MLflow servers: the page of a run, and how everything ends with the command."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from made_runs import clean_environment, distlm, end, make_attempt, make_run, parsed, record

from distlm.errors import ExitCode
from distlm.mlflow_store import mlflow_run_id
from distlm.run_folder import RunFolder, write_json

DEADLINE_S = 60.0


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ui")


@pytest.fixture(scope="module")
def embedded(place: Path) -> RunFolder:
    """A run that was delivered to the embedded store."""
    from distlm.tracking.mlflow import MlflowTracker

    run = make_run(place / "runs")
    attempt = make_attempt(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        record(
            run, attempt, {10: 2.5}, connect=lambda: MlflowTracker.connect(run.run_id, "tiny", "tests", run.runs_dir)
        )
    end(attempt, ExitCode.SUCCEEDED)
    assert mlflow_run_id(run)
    return run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Started(NamedTuple):
    process: subprocess.Popen[str]
    first_line: str
    processes: list[psutil.Process]


@contextmanager
def started(place: Path, *arguments: str, **environment: str) -> Iterator[Started]:
    """A running `distlm ui` that has said its first line, and all of its processes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distlm.cli", "ui", *arguments], cwd=place, text=True, stdin=subprocess.DEVNULL,
        env=clean_environment(place, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    found = psutil.Process(process.pid)
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        yield Started(process, first_line, [found, *found.children(recursive=True)])
    finally:
        for one in [*found.children(recursive=True), found] if process.poll() is None else []:
            one.kill()
        process.wait()


def are_gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_the_page_of_a_run_and_nothing_left(place: Path, embedded: RunFolder, number: signal.Signals) -> None:
    port = free_port()
    with started(place, "last", "--json", "--port", str(port)) as (process, first_line, processes):
        page = json.loads(first_line)
        assert page == {
            "url": f"http://127.0.0.1:{port}/#/runs/{mlflow_run_id(embedded)}",
            "tracking_uri": f"sqlite:///{embedded.runs_dir}/mlflow.db",
            "run_id": embedded.run_id,
            "mlflow_run_id": mlflow_run_id(embedded),
        }
        asked = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={page['mlflow_run_id']}"
        with urllib.request.urlopen(asked, timeout=30) as answer:
            metrics = json.load(answer)["run"]["data"]["metrics"]
        assert [(one["key"], one["value"]) for one in metrics] == [("train/loss", 2.5)]
        assert len(processes) >= 3, "this command, mlflow, uvicorn"
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE_S)
        wait_until(lambda: are_gone(processes), f"the end of {processes}")
        assert (out, err) == ("", ""), "it ends quietly, and the server's noise is not shown"
        expected = -signal.SIGKILL if number == signal.SIGKILL else ExitCode.CANCELLED
        assert process.returncode == expected


def test_without_a_run_it_opens_the_store(place: Path, embedded: RunFolder) -> None:
    port = free_port()
    opened = place / "opened"
    with started(place, "--port", str(port), "--open", BROWSER=f"{browser(place)} %s") as (_, first_line, _):
        assert first_line == f"MLflow UI (Ctrl-C ends it) on http://127.0.0.1:{port}\n"
        wait_until(opened.exists, "the browser")
        assert opened.read_text() == f"http://127.0.0.1:{port}"


def browser(place: Path) -> Path:
    """A program that writes down what it was asked to open."""
    program = place / "browser"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > {place}/.opened && mv {place}/.opened {place}/opened\n')
    program.chmod(0o755)
    (place / "opened").unlink(missing_ok=True)
    return program


def test_a_port_that_is_taken_is_refused_at_once(place: Path, embedded: RunFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = distlm("ui", "--port", str(port), cwd=place)
    assert done.returncode == ExitCode.BAD_INPUT
    assert (
        done.stdout == ""
        and f"port {port} of 127.0.0.1: Address already in use; use another one, such as --port" in done.stderr
    )
    assert distlm("ui", "--port", "70000", cwd=place).returncode == ExitCode.BAD_INPUT
    assert distlm("ui", "--host", "no-such-host.invalid", cwd=place).returncode == ExitCode.BAD_INPUT


def test_a_run_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is printed without asking it, and without what is secret in it."""
    monkeypatch.setenv("WORD", "hidden-word")
    run = make_run(
        tmp_path / "runs", tracking={"tracking_uri": "https://me:${WORD}@mlflow.invalid/base/?token=${WORD}"}
    )
    attempt = make_attempt(run)
    environment = clean_environment(tmp_path, WORD="hidden-word", BROWSER=f"{browser(tmp_path)} %s")
    page = parsed(distlm("ui", "last", "--json", cwd=tmp_path, env=environment))
    assert (page["url"], page["mlflow_run_id"]) == ("https://mlflow.invalid/base", None)
    assert "has nothing of run" in distlm("ui", "last", cwd=tmp_path, env=environment).stdout
    write_json(attempt.metrics_sent_json, {"destination": "mlflow:0123abcd", "offset": 1})
    done = distlm("ui", run.run_id, "--open", cwd=tmp_path, env=environment)
    assert done.returncode == ExitCode.SUCCEEDED
    assert done.stdout == "the tracking server's UI is on https://mlflow.invalid/base/#/runs/0123abcd\n"
    assert "hidden-word" not in done.stdout + done.stderr + str(page)
    wait_until((tmp_path / "opened").exists, "the browser")
    assert (tmp_path / "opened").read_text() == "https://mlflow.invalid/base/#/runs/0123abcd"
    monkeypatch.delenv("WORD")
    unset = distlm("ui", "last", cwd=tmp_path)
    assert unset.returncode == ExitCode.BAD_INPUT and "WORD is not set" in unset.stderr


def test_the_environment_names_the_server(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    make_attempt(run)
    environment = clean_environment(tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:1")
    assert parsed(distlm("ui", "last", "--json", cwd=tmp_path, env=environment))["url"] == "http://127.0.0.1:1"
    make_attempt(run, "tracking.tracking_uri=http://127.0.0.1:2")
    assert parsed(distlm("ui", "last", "--json", cwd=tmp_path, env=environment))["url"] == "http://127.0.0.1:2"


def test_commands_that_are_named_work_from_here(tmp_path: Path) -> None:
    run = make_run(tmp_path / "others", tracking={"tracking_uri": "http://127.0.0.1:1"})
    bare = make_run(tmp_path / "others", 1, tracking={"report_to": []})
    done = distlm("ui", run.run_id, "--runs-dir", "others", cwd=tmp_path)
    assert f"(distlm sync others/{run.run_id} sends what is missing)" in done.stdout
    done = distlm("ui", bare.run_id, "--runs-dir", "others", cwd=tmp_path)
    assert done.stderr.endswith(f"distlm status others/{bare.run_id}\n")


def test_what_has_no_ui(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert "no embedded MLflow store in runs" in distlm("ui", cwd=tmp_path).stderr
    make_attempt(make_run(tmp_path / "runs", tracking={"report_to": []}))
    for arguments, message in (
        (("last",), "does not name mlflow"),
        (("x",), "there is no run x"),
        (("last", "--runs-dir", "none"), "there is no run last"),
    ):
        done = distlm("ui", *arguments, cwd=tmp_path)
        assert done.returncode == ExitCode.BAD_INPUT and message in done.stderr


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(b"no database, and long enough to be taken for a damaged one" * 99)
    done = distlm("ui", "--port", str(free_port()), cwd=tmp_path)
    assert done.returncode == ExitCode.INFRASTRUCTURE and done.stdout == ""
    assert done.stderr.startswith("distlm: the MLflow server has ended (exit code 1)")
    assert "file is not a database" in done.stderr
    environments = [one.info["environ"] or {} for one in psutil.process_iter(["environ"])]
    assert not any(one.get("HOME") == str(tmp_path) for one in environments)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mlflow.db"]
