"""How a run ends that is hurt or stopped, with real Ray: what it says, what it keeps, and that nothing is left of it.

One folder is shared by all runs here, so the corpus is tokenised once.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from place import (
    CONFIG,
    END_TIMEOUT_S,
    GLOBAL_BATCH,
    MAX_SEQ_LENGTH,
    MICRO_BATCH,
    SEED,
    START_TIMEOUT_S,
    Command,
    Place,
    wait_until,
)

from distlm.checkpoint.store import CheckpointStore
from distlm.data.order import samples
from distlm.data.pack import PackedDataset
from distlm.errors import ExitCode
from distlm.run_folder import RunFolder, read_json
from distlm.tracking.records import read_lines

FATAL = "recovery.max_retries=0"
ENDLESS = ("training.max_steps=1000000", "training.eval_steps=null", FATAL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("endings"))


def start(place: Place, *overrides: str) -> Command:
    """A run that would train for ever, and has begun to."""
    command = place.start("submit", "run.yaml", *ENDLESS, *overrides)
    command.wait_for("step  ")
    return command


def require_ended(place: Place, command: Command, code: ExitCode, mlflow_status: str, cause: str) -> dict[str, Any]:
    """The result.json of a command that has ended as it should."""
    assert command.wait(END_TIMEOUT_S) == code, (command.out, command.err)
    return require_clean(place, command.run, code, mlflow_status, cause)


def require_clean(place: Place, run: RunFolder, code: ExitCode, mlflow_status: str, cause: str) -> dict[str, Any]:
    place.require_nothing_left(run)
    assert place.mlflow_run(run).info.status == mlflow_status
    result: dict[str, Any] = read_json(run.attempts()[-1].result_json)
    assert (result["exit_code"], result["cause"]) == (code, cause)
    return result


def steps_reported(run: RunFolder) -> list[int]:
    """Steps with a training loss, over all attempts."""
    messages = [message for attempt in run.attempts() for _, message in read_lines(attempt.metrics_jsonl)]
    return [m["step"] for m in messages if m["kind"] == "metrics" and "train/loss" in m["values"]]


def worker(command: Command, rank: int) -> psutil.Process:
    log = str(command.run.attempts()[-1].worker_log(rank))
    for process in command.controller.children(recursive=True):
        with suppress(OSError):
            if any(os.path.realpath(link) == log for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                return process
    raise AssertionError(f"no process writes {log}")


class TestFailures:
    """The first failure in one line, and what merely followed from it under it."""

    def test_a_killed_worker(self, place: Place) -> None:
        command = start(place)
        ports = place.listening_ports()
        assert ports
        worker(command, rank=1).kill()
        result = require_ended(place, command, ExitCode.INFRASTRUCTURE, "FAILED", "node lost")
        first, *others = command.err.splitlines()
        assert result["host"] == socket.gethostname()
        assert first.startswith(f"distlm: failed on rank 1 ({result['host']}): node lost: the worker process died")
        log = f"runs/{command.run.run_id}/attempts/001/logs/rank-00001.log"
        assert first.endswith(f"; log: {log}") and (place.folder / log).is_file()
        assert [follower["rank"] for follower in result["followers"]] == [0]
        assert others[0].startswith("distlm:   rank 0 only followed: ")  # it may have had no time to say more
        assert others[1:] == [f"distlm:   resume with: distlm resume {command.run.run_id}"]
        listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert not ports & listening

    def test_an_error_on_one_rank(self, place: Place) -> None:
        if not (made := sorted(place.runs_dir.glob("*/init/prepared.json"))):
            assert place.start("submit", "run.yaml", "training.max_steps=1").wait() == ExitCode.SUCCEEDED
            made = sorted(place.runs_dir.glob("*/init/prepared.json"))
        prepared = read_json(made[0])
        # One token of a sample that rank 1 trains on in step 2 becomes larger than the vocabulary.
        (path,) = map(Path, prepared["train_paths"])
        _, indices = samples(GLOBAL_BATCH + MICRO_BATCH, 1, len(PackedDataset([path])), SEED)
        sample = PackedDataset([path])[indices][0].astype(np.uint16)
        content = path.read_bytes()
        assert content.count(sample.tobytes()) == 1
        broken = np.where(np.arange(MAX_SEQ_LENGTH) % (MAX_SEQ_LENGTH - 1) == 0, sample, 60_000).astype(np.uint16)
        path.write_bytes(content.replace(sample.tobytes(), broken.tobytes()))
        try:
            command = place.start("submit", "run.yaml", *ENDLESS, "recovery.max_retries=9")
            command.wait()
        finally:
            path.write_bytes(content)
        result = require_ended(place, command, ExitCode.FAILED, "FAILED", "code")
        first, *others = command.err.splitlines()
        assert f"failed on rank 1 ({result['host']}): code: IndexError: index out of range in self (" in first
        assert result["place"].endswith(" in embedding") and result["place"] in first
        assert "the same in step 2 twice" in first and [retry["step"] for retry in result["retries"]] == [2]
        assert "rank-00001.log" in first and "IndexError" in Path(result["log"]).read_text()
        assert others[0].startswith("distlm:   rank 0 only followed: ")  # it may have had no time to say more
        assert "when that is mended, resume with" in others[1]

    def test_a_loss_that_is_not_a_number(self, place: Place) -> None:
        hot = ("training.learning_rate=1e30", "training.max_grad_norm=0", "training.warmup_steps=0")
        command = place.start("submit", "run.yaml", *ENDLESS, *hot, "training.lr_scheduler_type=constant")
        command.wait()
        require_ended(place, command, ExitCode.FAILED, "FAILED", "divergence")
        first, *others = command.err.splitlines()
        assert "failed on all 2 ranks alike: divergence: the loss is nan at step 5; " in first
        assert "lower training.learning_rate (1e+30)" in first
        assert others == [f"distlm:   start anew with other values: distlm submit run:{command.run.run_id} KEY=VALUE"]
        assert not CheckpointStore(command.run.checkpoints).checkpoints()

    def test_memory_that_runs_out(self, place: Place, memory_limit: Path) -> None:
        """Control groups count what the run's processes use together, as those of Slurm and Kubernetes do."""
        large = (
            "training.per_device_train_batch_size=1024", "training.global_train_batch_size=2048",
            "model.config.hidden_size=256", "model.config.intermediate_size=4096",
        )  # fmt: skip
        command = place.start("submit", "run.yaml", *ENDLESS, *large, "recovery.max_retries=9")
        (memory_limit / "cgroup.procs").write_text(str(command.process.pid))
        command.wait()
        result = require_ended(place, command, ExitCode.FAILED, "FAILED", "out of memory")
        first = command.err.splitlines()[0]
        assert f"failed on rank {result['rank']}" in first and ": out of memory: " in first
        assert "the same in step 1 twice" in first
        assert [retry["cause"] for retry in result["retries"]] == ["out of memory"]
        assert "lower training.per_device_train_batch_size (now 1024)" in first


_LIMIT_BYTES = 3 * 2**30


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """A control group that allows 3 GiB. Processes that are put into it take their later children with them."""
    version_1 = Path("/sys/fs/cgroup/memory")
    base, limit = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (version_1.parent, "memory.max")
    group = base / f"distlm-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(_LIMIT_BYTES))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), END_TIMEOUT_S, "the end of all processes in the group")
    group.rmdir()


class TestFullDisk:
    """Of the whole run folder and MLflow's store, in mid-run."""

    @pytest.fixture
    def small_place(self, tmp_path: Path) -> Iterator[Place]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "distlm-test", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a file system of a small size can be mounted by root only")
        try:
            place = Place(tmp_path / "place", {**CONFIG, "runs_dir": str(disk / "runs")})
            place.runs_dir = disk / "runs"
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)

    def test_it(self, small_place: Place) -> None:
        place = small_place
        command = start(place, "training.save_steps=10")
        wait_until(lambda: len(CheckpointStore(command.run.checkpoints).checkpoints()) > 1, 60, "two checkpoints")
        filler = place.runs_dir / "filler"
        with open(filler, "wb") as file, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            while True:
                file.write(bytes(2**20))
        assert command.wait(END_TIMEOUT_S) == ExitCode.INFRASTRUCTURE, (command.out, command.err)
        result = read_json(command.run.attempts()[-1].result_json)
        assert (result["exit_code"], result["cause"]) == (ExitCode.INFRASTRUCTURE, "storage")
        first, *_, last = command.err.splitlines()
        assert ": storage: " in first and "No space left on device" in first and "make room" in first
        assert last == f"distlm:   resume with: distlm resume {os.path.relpath(command.run.path, place.folder)}"
        filler.unlink()
        saved = CheckpointStore(command.run.checkpoints).checkpoints()[0].step
        sync = place.start("sync", command.run.run_id, "--runs-dir", str(place.runs_dir))
        assert sync.wait() == ExitCode.SUCCEEDED
        assert place.mlflow_run(command.run).info.status == "FAILED"
        resumed = place.start(
            "resume", command.run.run_id, f"training.max_steps={saved + 10}", "--runs-dir", str(place.runs_dir)
        )
        assert resumed.wait() == ExitCode.SUCCEEDED, (resumed.out, resumed.err)
        assert f"continuing from checkpoint step-{saved:08d}" in resumed.out
        place.require_nothing_left(command.run)
        assert place.mlflow_run(command.run).info.status == "FINISHED"


# The command, once the terminal is its controlling one.
_IN_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from distlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


class TestStopping:
    def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(self, place: Place) -> None:
        command = start(place)
        other = place.start("resume", command.run.run_id)
        assert other.wait() == ExitCode.BAD_INPUT
        assert f"is being trained by process {command.controller.pid} on" in other.err
        command.process.send_signal(signal.SIGINT)
        require_ended(place, command, ExitCode.CANCELLED, "KILLED", "cancellation")
        step = CheckpointStore(command.run.checkpoints).checkpoints()[0].step
        assert command.err.splitlines() == [
            f"distlm: cancelled: stopped after step {step}, which is saved (Ctrl-C)",
            f"distlm: resume with: distlm resume {command.run.run_id}",
        ]
        assert "stopping: the step under way is finished and saved; Ctrl-C again stops now" in command.out
        assert steps_reported(command.run)[-1] == step, "what was trained since the last point is recorded"
        resumed = place.start("resume", command.run.run_id, f"training.max_steps={step + 5}")
        assert resumed.wait() == ExitCode.SUCCEEDED, (resumed.out, resumed.err)
        assert f"continuing from checkpoint step-{step:08d}" in resumed.out
        steps = steps_reported(command.run)
        assert steps == sorted(set(steps)), "no step was trained twice"

    def test_ctrl_c_twice_stops_now(self, place: Place) -> None:
        # A step takes seconds: with both signals in the same one, the first cannot be followed.
        large = ("training.global_train_batch_size=8192", "training.per_device_train_batch_size=64")
        command = start(place, *large, "training.save_steps=null")
        command.process.send_signal(signal.SIGINT)
        command.wait_for("stopping: ")
        command.process.send_signal(signal.SIGINT)
        require_ended(place, command, ExitCode.CANCELLED, "KILLED", "cancellation")
        assert "stopping now" in command.out
        assert "cancelled: stopped before the first step was saved (Ctrl-C)" in command.err
        assert not CheckpointStore(command.run.checkpoints).checkpoints()

    def test_ctrl_c_three_times_kills_a_controller_that_does_not_answer(self, place: Place) -> None:
        command = start(place)
        command.controller.suspend()
        for _ in range(3):
            seen = len(command.out)
            command.process.send_signal(signal.SIGINT)
            wait_until(lambda seen=seen: len(command.out) > seen, 10, "an answer")
        assert command.out.endswith("stopping now\nkilling\n")
        require_ended(place, command, ExitCode.CANCELLED, "KILLED", "cancellation")
        assert "the controller was killed on request" in command.err

    def test_a_terminal_that_hangs_up_saves_too(self, place: Place) -> None:
        """As when a connection breaks: the kernel sends SIGHUP, and nothing can be printed any more."""
        ours, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, "submit", "run.yaml", *ENDLESS],
            stdin=terminal, stdout=terminal, stderr=terminal, cwd=place.folder, start_new_session=True,
            env=place.environ | {"TERM": "xterm", "CI": ""},
        )  # fmt: skip
        os.close(terminal)
        screen = b""
        while b" tokens/s" not in screen:
            assert select.select([ours], [], [], START_TIMEOUT_S)[0], screen.decode()
            screen += os.read(ours, 2**16)
        found = re.search(rb"run (\S+) in ", screen)
        assert found and b"\x1b[?25l" in screen, "the live view"
        run = RunFolder(place.runs_dir / found[1].decode())
        os.close(ours)
        assert process.wait(END_TIMEOUT_S) == ExitCode.PREEMPTED
        result = require_clean(place, run, ExitCode.PREEMPTED, "KILLED", "preemption")
        step = CheckpointStore(run.checkpoints).checkpoints()[0].step
        assert result["message"] == f"stopped after step {step}, which is saved (SIGHUP)"

    @pytest.mark.parametrize(
        ("moment", "number", "code"),
        [
            ("run ", signal.SIGINT, ExitCode.CANCELLED),
            ("starting Ray", signal.SIGTERM, ExitCode.PREEMPTED),
            ("preparing data", signal.SIGTERM, ExitCode.PREEMPTED),
        ],
    )
    def test_a_signal_while_starting(self, place: Place, moment: str, number: signal.Signals, code: ExitCode) -> None:
        command = place.start("submit", "run.yaml")
        command.wait_for(moment)
        command.process.send_signal(number)
        assert command.wait(END_TIMEOUT_S) == code, (command.out, command.err)
        place.require_nothing_left(command.run)
        assert "stopped before the first step was saved" in command.err
        assert "starting 2 workers" not in command.out and not place.mlflow_runs(command.run)

    def test_ctrl_c_while_the_model_is_uploaded_keeps_the_success(self, place: Place) -> None:
        command = place.start("submit", "run.yaml", "training.max_steps=10", "tracking.log_model=true")
        command.wait_for("uploading the model")
        command.process.send_signal(signal.SIGINT)
        assert command.wait(END_TIMEOUT_S) == ExitCode.SUCCEEDED, (command.out, command.err)
        assert "warning: MLflow has not got everything (the upload was stopped)" in command.out
        place.require_nothing_left(command.run)
        found = place.mlflow_run(command.run)
        assert found.info.status == "FINISHED" and not found.outputs.model_outputs
        sync = place.start("sync", command.run.run_id)
        assert sync.wait() == ExitCode.SUCCEEDED, (sync.out, sync.err)
        assert len(place.mlflow_run(command.run).outputs.model_outputs) == 1
        place.require_nothing_left(command.run)

    def test_in_the_background(self, place: Place) -> None:
        command = place.start("submit", "run.yaml", *ENDLESS, "--detach")
        assert command.wait() == ExitCode.SUCCEEDED
        output = command.run.attempts()[-1].output_log
        wait_until(lambda: "step  " in output.read_text(), 120, "the first step")
        pid = int(command.out.split("kill ")[1])
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not psutil.pid_exists(pid), END_TIMEOUT_S, "the end of the run")
        require_clean(place, command.run, ExitCode.PREEMPTED, "KILLED", "preemption")
        step = CheckpointStore(command.run.checkpoints).checkpoints()[0].step
        assert output.read_text().splitlines()[-2:] == [
            f"distlm: preempted: stopped after step {step}, which is saved (SIGTERM)",
            f"distlm: resume with: distlm resume {command.run.run_id}",
        ]


class TestKilled:
    """By SIGKILL, of which the killed one knows nothing."""

    def test_the_command(self, place: Place) -> None:
        command = start(place)
        command.process.send_signal(signal.SIGSTOP)  # as by Ctrl-Z: it has not read all that it was told
        told = len(steps_reported(command.run))
        wait_until(lambda: len(steps_reported(command.run)) > told + 2, 60, "more steps")
        command.process.kill()
        command.process.wait()
        wait_until(lambda: not place.processes(), END_TIMEOUT_S, "the end of the controller")
        result = require_clean(place, command.run, ExitCode.PREEMPTED, "KILLED", "preemption")
        step = CheckpointStore(command.run.checkpoints).checkpoints()[0].step
        assert result["message"] == f"stopped after step {step}, which is saved (the distlm command was killed)"

    def test_the_controller(self, place: Place) -> None:
        command = start(place)
        command.controller.kill()
        require_ended(place, command, ExitCode.INFRASTRUCTURE, "FAILED", "infrastructure")
        assert "the controller ended without a result (killed by SIGKILL)" in command.err

    def test_the_controller_while_it_prepares(self, place: Place) -> None:
        """Before anything is recorded: no MLflow run is made only to be ended."""
        command = place.start("submit", "run.yaml", FATAL)
        command.wait_for("preparing data")
        command.controller.kill()
        assert command.wait(END_TIMEOUT_S) == ExitCode.INFRASTRUCTURE, (command.out, command.err)
        place.require_nothing_left(command.run)
        assert not place.mlflow_runs(command.run)

    def test_both(self, place: Place) -> None:
        """Nobody is left to say it; the next who looks does."""
        command = start(place)
        controller = command.controller
        command.process.kill()
        controller.kill()
        command.process.wait()
        wait_until(lambda: not place.processes(), END_TIMEOUT_S, "the end of Ray")
        assert place.mlflow_run(command.run).info.status == "RUNNING"
        resumed = place.start("resume", command.run.run_id)
        resumed.wait_for("continuing from checkpoint" if list(command.run.checkpoints.glob("step-*")) else "step  ")
        resumed.process.send_signal(signal.SIGINT)
        assert resumed.wait(END_TIMEOUT_S) == ExitCode.CANCELLED
        place.require_nothing_left(command.run)
        assert place.mlflow_run(command.run).info.status == "KILLED"


def test_events_for_programs(place: Place) -> None:
    command = place.start("submit", "run.yaml", "--json", "training.max_steps=10")
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    events = [json.loads(line) for line in command.out.splitlines()]
    assert command.err == ""
    begin, *_, last = events
    assert (begin["event"], begin["run_name"], begin["attempt"], begin["num_workers"]) == ("begin", "tiny", 1, 2)
    assert (last["event"], last["state"], last["exit_code"]) == ("result", "succeeded", 0)
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases == ["ray", "prepare", "workers", "export"]
    points = [event for event in events if event["event"] == "metrics" and "train/loss" in event["values"]]
    assert [event["step"] for event in points] == [1, 5, 10] and {event["total_steps"] for event in points} == {10}
    recorded = [m for _, m in read_lines(RunFolder(Path(begin["folder"])).attempts()[0].metrics_jsonl)]
    assert [event["values"]["train/loss"] for event in points] == [
        m["values"]["train/loss"] for m in recorded if m["kind"] == "metrics" and "train/loss" in m["values"]
    ]
    place.require_nothing_left(RunFolder(Path(begin["folder"])))
