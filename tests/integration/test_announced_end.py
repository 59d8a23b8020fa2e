"""Ends that are announced, with real Ray: signals to every process of a run, `distlm cancel`, the time limit, and a
warning that was too short. Each ends with a committed checkpoint that the next attempt continues.

One folder is shared by all runs here, so the corpus is tokenised once.
"""

from __future__ import annotations

import json
import signal
import time
from datetime import datetime
from typing import Any

import psutil
import pytest
from place import END_TIMEOUT_S, START_TIMEOUT_S, Command, Place, wait_until

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode
from distlm.run_folder import RunFolder, read_json

ENDLESS = ("training.max_steps=1000000", "training.eval_steps=null", "training.save_steps=null")
TO_SAVE_S = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("announced"))


def start(place: Place, *arguments: str) -> Command:
    """A run that would train for ever, and has begun to."""
    command = place.start(*arguments)
    command.wait_for("step  ")
    return command


def saved_step(run: RunFolder) -> int:
    return CheckpointStore(run.checkpoints).checkpoints()[0].step


def require_preempted(place: Place, command: Command, why: str) -> dict[str, Any]:
    """The result of a run that has saved its last step."""
    assert command.wait(END_TIMEOUT_S) == ExitCode.PREEMPTED, (command.out, command.err)
    result: dict[str, Any] = read_json(command.run.attempts()[-1].result_json)
    assert (result["state"], result["exit_code"], result["cause"]) == ("preempted", 75, "preemption")
    assert result["message"] == f"stopped after step {saved_step(command.run)}, which is saved ({why})"
    place.require_nothing_left(command.run)
    assert place.mlflow_run(command.run).info.status == "KILLED"
    return result


def send_to_all(place: Place, number: signal.Signals) -> None:
    """As `scancel` and `srun` do: to the command, the controller, its helper, and Ray's daemons and workers."""
    processes = place.processes()
    names = {process.name() for process in processes}
    assert {"raylet", "gcs_server"} <= names and sum(name.startswith("ray::") for name in names) >= 2, names
    for process in processes:
        process.send_signal(number)


def test_sigusr2_to_every_process_and_then_the_time_limit(place: Place) -> None:
    began_s = time.monotonic()
    command = start(place, "submit", "run.yaml", *ENDLESS)
    limit_s = round(1.5 * (time.monotonic() - began_s)) + TO_SAVE_S  # enough to begin again on this machine
    send_to_all(place, signal.SIGUSR2)
    require_preempted(place, command, "SIGUSR2")
    first = saved_step(command.run)
    limits = (f"resources.time_limit_s={limit_s}", f"resources.time_to_save_s={TO_SAVE_S}")
    resumed = place.start("resume", command.run.run_id, *limits)
    resumed.wait(START_TIMEOUT_S)
    assert f"continuing from checkpoint step-{first:08d}" in resumed.out
    assert f"stopping: the workers finish their step and save it (resources.time_limit_s = {limit_s})" in resumed.out
    result = require_preempted(place, resumed, f"resources.time_limit_s = {limit_s}")
    assert saved_step(command.run) > first
    began, ended = (datetime.fromisoformat(result[key]) for key in ("started_at", "ended_at"))
    assert limit_s - TO_SAVE_S - 1 <= (ended - began).total_seconds() <= limit_s


def test_sigterm_to_every_process_and_then_cancel_with_a_checkpoint(place: Place) -> None:
    command = start(place, "submit", "run.yaml", *ENDLESS)
    send_to_all(place, signal.SIGTERM)
    require_preempted(place, command, "SIGTERM")
    first = saved_step(command.run)
    resumed = start(place, "resume", command.run.run_id)
    cancel = place.start("cancel", command.run.run_id[:-2], "--checkpoint", "--json")
    require_preempted(place, resumed, "distlm cancel --checkpoint")
    assert cancel.wait(END_TIMEOUT_S) == ExitCode.SUCCEEDED, (cancel.out, cancel.err)
    assert saved_step(command.run) > first
    told = json.loads(cancel.out)
    assert (told["attempt"], told["state"], told["exit_code"]) == (2, "preempted", 75)
    assert told["next"] == [f"distlm resume {command.run.run_id}"]


def test_cancel_while_it_starts_and_of_a_controller_that_does_not_answer(place: Place) -> None:
    command = place.start("submit", "run.yaml", "tokenizer.train.vocab_size=290")
    command.wait_for("preparing data")
    controller = command.controller
    controller.suspend()
    for _ in range(2):
        cancel = place.start("cancel", "last", "--timeout", "1")
        assert cancel.wait(END_TIMEOUT_S) == ExitCode.INFRASTRUCTURE
        assert f"its controller, process {controller.pid} on" in cancel.err and "is still asked to" in cancel.err
    controller.resume()
    assert command.wait(END_TIMEOUT_S) == ExitCode.CANCELLED, (command.out, command.err)
    assert "cancelled: stopped before the first step was saved (distlm cancel)" in command.err
    place.require_nothing_left(command.run)
    again = place.start("cancel", "last", "--checkpoint")
    assert again.wait(END_TIMEOUT_S) == ExitCode.SUCCEEDED
    assert again.out == f"run {command.run.run_id} has ended already: cancelled; nothing to cancel\n"


def test_a_kill_of_everything_while_it_saves_leaves_the_checkpoint_before(place: Place) -> None:
    """The warning was too short. A model of 12 million parameters takes a while to be written."""
    model = ("model.config.hidden_size=512", "model.config.intermediate_size=2048", "model.config.num_hidden_layers=4")
    command = place.start("submit", "run.yaml", *ENDLESS, *model, "training.save_steps=1", "training.warmup_steps=0")
    run = command.run
    wait_until(lambda: CheckpointStore(run.checkpoints).checkpoints(), START_TIMEOUT_S, "a checkpoint")
    trackers = "from multiprocessing.resource_tracker"  # they clean up outside the folder
    processes = [process for process in place.processes() if trackers not in " ".join(process.cmdline())]
    command.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: list(run.checkpoints.glob(".step-*/*")), END_TIMEOUT_S, "a checkpoint that is being written")
    before = saved_step(run)
    for process in processes:
        process.kill()
    command.process.wait()
    psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
    stands = saved_step(run)
    assert stands in (before, before + 1), "it may have been committed meanwhile"
    resumed = place.start("resume", run.run_id, f"training.max_steps={before + 2}", "training.save_steps=null")
    assert resumed.wait() == ExitCode.SUCCEEDED, (resumed.out, resumed.err)
    assert f"continuing from checkpoint step-{stands:08d}" in resumed.out
    assert saved_step(run) == before + 2
