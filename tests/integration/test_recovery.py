"""Recovery with real Ray, where a chaos of faults shows too little: who hangs and where, and who may commit."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from place import START_TIMEOUT_S, Command, Place, wait_until

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode
from distlm.run_folder import read_json

ENDLESS = ("training.max_steps=1000000", "training.eval_steps=null", "training.save_steps=20", "tracking.report_to=[]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("recovery"))


def start(place: Place, *overrides: str) -> Command:
    command = place.start("submit", "run.yaml", *ENDLESS, *overrides)
    store = CheckpointStore(command.run.checkpoints)
    wait_until(lambda: store.newest_step() >= 40 or command.process.poll() is not None, START_TIMEOUT_S, "two saves")
    assert command.process.poll() is None, (command.out, command.err)
    return command


def workers(place: Place) -> list[psutil.Process]:
    return [process for process in place.processes() if process.cmdline()[:1] == ["ray::RayTrainWorker"]]


def writes_to(process: psutil.Process, log: Path) -> bool:
    return any(link.resolve() == log.resolve() for link in Path(f"/proc/{process.pid}/fd").iterdir())


def test_of_workers_that_do_not_go_on_the_stopped_one_is_named_with_its_stack(place: Place) -> None:
    command = start(place, "recovery.step_timeout_s=3", "recovery.max_retries=0")
    log = command.run.attempts()[-1].worker_log(1)
    (stopped,) = [process for process in workers(place) if writes_to(process, log)]
    stopped.suspend()
    assert command.wait(60) == ExitCode.INFRASTRUCTURE, (command.out, command.err)
    result: dict[str, Any] = read_json(command.run.attempts()[-1].result_json)
    assert (result["cause"], result["rank"]) == ("hang", 1)
    assert "no progress for" in result["message"] and "it is stopped (by SIGSTOP" in result["message"]
    assert "recovery.step_timeout_s = 3" in result["message"]
    assert "worker/train.py" in result["details"] and "in train_step" in result["details"]
    assert [(follower["rank"], follower["message"]) for follower in result["followers"]] == [(0, "waited for it")]
    place.require_nothing_left(command.run)


def test_workers_that_do_not_start_in_time_are_given_up(place: Place) -> None:
    command = place.start("submit", "run.yaml", *ENDLESS, "recovery.start_timeout_s=1", "recovery.max_retries=1")
    assert command.wait() == ExitCode.INFRASTRUCTURE, (command.out, command.err)
    result: dict[str, Any] = read_json(command.run.attempts()[-1].result_json)
    assert (result["cause"], [retry["cause"] for retry in result["retries"]]) == ("hang", ["hang"])
    expected = r"the workers have not started: no progress for \d+ s \(starting; recovery.start_timeout_s = 1\)"
    assert re.match(expected, result["message"])
    assert result["message"].endswith("(recovery.max_retries.hang = 1 without a new checkpoint)")
    place.require_nothing_left(command.run)


def test_nothing_is_committed_while_the_controller_does_not_answer(place: Place) -> None:
    """Two writers at once are impossible: who has lost its controller may not commit."""
    command = start(place)
    store = CheckpointStore(command.run.checkpoints)
    controller = command.controller
    controller.suspend()
    since: dict[Path, float] = {}

    def waits() -> Path | None:
        """A checkpoint that has lacked its manifest alone for three seconds; a commit takes some milliseconds."""
        for folder in store.unfinished():
            if (
                len(list(folder.glob("shard-*"))) == 2
                and time.monotonic() - since.setdefault(folder, time.monotonic()) > 3
            ):
                return folder
        return None

    step = int(wait_until(waits, 60, "a checkpoint that waits").name.split("-")[1].split(".")[0])
    assert store.newest_step() < step
    controller.resume()
    wait_until(lambda: store.newest_step() >= step, 30, "the commit")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(60) == ExitCode.PREEMPTED, (command.out, command.err)
    place.require_nothing_left(command.run)
