"""The controller's decisions that need no cluster: the lease, the result, requests to stop, late messages."""

from __future__ import annotations

import io
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fabricated import give_format_version, write

from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.config.load import load_tree
from distlm.config.schema import RecoveryConfig, ResourcesConfig
from distlm.controller.__main__ import main
from distlm.controller.attempt import AttemptController, checkpoint_to_continue
from distlm.controller.preflight import check_free_space
from distlm.controller.progress import Progress
from distlm.controller.stop import StopRequest, stop_before_limit, stop_on_cancel, stop_with_command
from distlm.controller.watchdog import Watchdog
from distlm.errors import Cancelled, Cause, CheckpointError, ExitCode, InputError, Preempted, UnknownFormatError
from distlm.leftovers import clear_leftovers
from distlm.outcome import Follower, Outcome, write_result
from distlm.run_folder import (
    AttemptFolder,
    RunFolder,
    lease,
    new_run_id,
    read_json,
    read_yaml,
    run_created_s,
    write_json,
)
from distlm.stop_count import StopCount
from distlm.view.plain import PlainView


def make_run(tmp_path: Path) -> tuple[RunFolder, AttemptFolder]:
    run = RunFolder.create(tmp_path, new_run_id())
    return run, run.new_attempt()


def test_a_run_has_one_writer_and_a_dead_one_is_none(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from distlm.run_folder import RunFolder, lease\n"
        "with lease(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"being trained by process {holder.pid}"), lease(run):
            pass
    finally:
        holder.kill()
        holder.wait()
    with lease(run):
        pass


def test_an_attempt_that_has_ended_is_not_run_again(tmp_path: Path) -> None:
    run, attempt = make_run(tmp_path)
    write_json(attempt.result_json, {"exit_code": 75})
    assert main([str(run.path)]) == ExitCode.PREEMPTED


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == ExitCode.BAD_INPUT
    assert "usage" in capsys.readouterr().err


def test_the_result_names_rank_host_cause_and_log(tmp_path: Path) -> None:
    _, attempt = make_run(tmp_path)
    followers = [Follower(0, "lost rank 1", "node0")]
    outcome = Outcome(
        ExitCode.FAILED, "ValueError: x", 1, "node1", "trace", Cause.CODE, "a.py:3 in f", "mend it", followers
    )
    write_result(attempt, outcome, started=0.0)
    result = read_json(attempt.result_json)
    assert (result["cause"], result["place"], result["advice"]) == ("code", "a.py:3 in f", "mend it")
    assert result["followers"] == [{"rank": 0, "message": "lost rank 1", "host": "node0", "is_same": False}]
    assert result["started_at"] == "1970-01-01T00:00:00+00:00" < result["ended_at"]
    assert result["state"] == "failed" and result["exit_code"] == 1
    assert (result["rank"], result["host"], result["message"]) == (1, "node1", "ValueError: x")
    assert result["log"] == str(attempt.worker_log(1))


def test_a_run_id_tells_when_the_run_was_made() -> None:
    assert abs(run_created_s(new_run_id()) - time.time()) < 5


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    run, attempt = make_run(tmp_path)
    attempt.result_json.write_text("{")
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        read_json(attempt.result_json)
    with pytest.raises(InputError, match=r"run\.yaml is missing"):
        read_yaml(run.run_yaml)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def run_with_checkpoints(tmp_path: Path, *steps: int) -> RunFolder:
    run, _ = make_run(tmp_path)
    store = CheckpointStore(run.checkpoints)
    store.clean()
    for step in steps:
        write(store, step)
    return run


def manifest_of(run: RunFolder, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}" / MANIFEST_NAME


def test_a_new_run_begins_from_the_start(tmp_path: Path) -> None:
    assert checkpoint_to_continue(make_run(tmp_path)[0], Progress(PlainView(io.StringIO()))) is None


def test_the_newest_good_checkpoint_is_continued_and_damaged_ones_are_named(tmp_path: Path) -> None:
    run, said = run_with_checkpoints(tmp_path, 10, 20, 30), io.StringIO()
    manifest_of(run, 30).write_text("{")
    (run.checkpoints / "step-99999999").mkdir()
    assert checkpoint_to_continue(run, Progress(PlainView(said))) == Checkpoint(20, run.checkpoints / "step-00000020")
    first, second = said.getvalue().splitlines()
    assert "step-99999999" in first and "never committed" in first and "step-00000030" in second


def test_where_no_checkpoint_is_good_training_does_not_begin_from_the_start(tmp_path: Path) -> None:
    run = run_with_checkpoints(tmp_path, 10, 20)
    for step in (10, 20):
        manifest_of(run, step).write_text("{")
    with pytest.raises(
        CheckpointError, match=r"none of the run's checkpoints .*step-00000020/manifest\.json is damaged.* move .* away"
    ):
        checkpoint_to_continue(run, Progress(PlainView(io.StringIO())))


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    """To continue an older one would be to train again what it holds, and then to replace it."""
    run = run_with_checkpoints(tmp_path, 10, 20)
    give_format_version(Checkpoint(20, run.checkpoints / "step-00000020"), 99)
    with pytest.raises(UnknownFormatError, match="has format version 99, and this distlm reads 2; use the distlm that"):
        checkpoint_to_continue(run, Progress(PlainView(io.StringIO())))
    write(CheckpointStore(run.checkpoints), 30)  # a newer one that is good leaves nothing to train again
    assert checkpoint_to_continue(run, Progress(PlainView(io.StringIO()))) == Checkpoint(
        30, run.checkpoints / "step-00000030"
    )


def test_checkpoints_that_are_there_need_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has filled its disk with the two that it keeps can be resumed: there is room for the next one."""
    training = {"max_steps": 9, "save_total_limit": 2}
    config = load_tree({"model": {"config": {}}, "data": {"train": [{"source": "python-docs"}]}, "training": training})
    num_parameters = 1000
    free = num_parameters * (12 + 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    check_free_space(config.config, run_with_checkpoints(tmp_path / "resumed", 10, 20), num_parameters)
    with pytest.raises(InputError, match="3 checkpoints and the model of 1,000 parameters need"):
        check_free_space(config.config, make_run(tmp_path / "new")[0], num_parameters)


# --- requests to stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "expected", "count"),
    [
        ([(0, signal.SIGINT)], Cancelled, 1),
        ([(0, signal.SIGTERM)], Preempted, 1),
        ([(0, signal.SIGHUP)], Preempted, 1),
        ([(0, signal.SIGUSR2)], Preempted, 1),
        ([(0, signal.SIGINT), (0.2, signal.SIGINT)], Cancelled, 2),
        ([(0, signal.SIGTERM), (5, signal.SIGTERM)], Preempted, 2),
        ([(0, signal.SIGTERM), (5, signal.SIGINT)], Preempted, 2),
        ([(0, signal.SIGUSR2), (60, signal.SIGTERM)], Preempted, 2),
        # One event each: a shell and then the kernel hang up; a service is stopped; a user presses Ctrl-C and leaves.
        ([(0, signal.SIGHUP), (0.0002, signal.SIGHUP)], Preempted, 1),
        ([(0, signal.SIGTERM), (0.01, signal.SIGHUP)], Preempted, 1),
        ([(0, signal.SIGHUP), (0.01, signal.SIGTERM)], Preempted, 1),
        ([(0, signal.SIGUSR2), (0.01, signal.SIGUSR2)], Preempted, 1),  # sent to all, and passed on by the command
        ([(0, signal.SIGINT), (9, signal.SIGHUP), (9, signal.SIGHUP)], Cancelled, 1),
        ([(0, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGTERM)], Cancelled, 3),
    ],
)
def test_the_first_request_decides_how_the_attempt_ends_and_another_one_ends_it_now(
    signals: list[tuple[float, int]], expected: type[Exception], count: int
) -> None:
    now_s = 100.0
    stop = StopRequest()
    stop._count = StopCount(lambda: 100 + now_s)
    assert not stop.is_asked and not stop.is_urgent
    for now_s, number in signals:  # noqa: B007 - the clock reads it
        stop.signalled(number)
    assert (stop.num_requests, stop.is_urgent) == (count, count > 1)
    error = stop.error("stopped after step 7")
    assert type(error) is expected and str(error).startswith("stopped after step 7 (")


@pytest.mark.parametrize("unread", [b"", b"the command had not read this"])
def test_the_death_of_the_command_is_noticed_and_saves_once(unread: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel resets a connection on which something was left to read."""
    monkeypatch.setattr("distlm.controller.stop._TIME_TO_SAVE_S", 0.3)
    ours, theirs = socket.socketpair()
    stop = StopRequest()
    stop_with_command(stop, theirs)
    theirs.sendall(unread)
    assert not stop.is_asked
    ours.close()
    wait_until(lambda: stop.is_asked)
    assert type(stop.error("x")) is Preempted
    wait_until(lambda: stop.is_urgent)
    assert type(stop.error("x")) is Preempted
    theirs.close()


def resources(limit_s: float | None, to_save_s: float) -> ResourcesConfig:
    return ResourcesConfig(time_limit_s=limit_s, time_to_save_s=to_save_s)


def test_the_time_limit_announces_the_end_and_then_is_it() -> None:
    stop = StopRequest()
    stop_before_limit(stop, resources(0.4, 0.2))
    assert not stop.is_asked
    wait_until(lambda: stop.is_asked)
    assert 0.2 <= time.monotonic() - stop.started_s and str(stop.error("x")) == "x (resources.time_limit_s = 0.4)"
    wait_until(lambda: stop.is_urgent)
    assert 0.4 <= time.monotonic() - stop.started_s and stop.num_requests == 1
    error = stop.error("stopped with step 7 saved")
    assert type(error) is Preempted
    assert str(error).startswith("stopped with step 7 saved (resources.time_limit_s = 0.4; the time limit was reached")
    assert str(error).endswith("with resources.time_to_save_s)")


def test_the_limit_counts_from_the_start_and_cuts_off_what_was_asked_before() -> None:
    stop = StopRequest()
    stop.started_s -= 100
    stop.signalled(signal.SIGTERM)
    stop_before_limit(stop, resources(100.0, 50.0))
    wait_until(lambda: stop.is_urgent)
    assert str(stop.error("x")).startswith("x (SIGTERM; the time limit was reached before more was saved;")


@pytest.mark.parametrize("limit_s", [None, 1e300])
def test_no_limit_or_one_that_never_comes(limit_s: float | None) -> None:
    stop, before = StopRequest(), threading.active_count()
    stop_before_limit(stop, resources(limit_s, 1.0))
    assert threading.active_count() == before + (limit_s is not None) and not stop.is_asked


def test_a_request_to_cancel_in_the_folder_of_the_attempt_is_seen(tmp_path: Path) -> None:
    run, attempt = make_run(tmp_path)
    write_json(attempt.cancel_json, {"save": False})
    newer, stop = run.new_attempt(), StopRequest()
    newer.cancel_json.write_text("{")  # damaged, or of a future distlm: nobody is asked by it
    stop_on_cancel(stop, newer)
    write_json(newer.cancel_json, {"save": True})
    wait_until(lambda: stop.is_asked)
    assert not stop.is_urgent and str(stop.error("x")) == "x (distlm cancel --checkpoint)"
    assert type(stop.error("x")) is Preempted, "what an earlier attempt was asked is stale"
    write_json(newer.cancel_json, {"save": False})
    wait_until(lambda: stop.is_urgent)
    assert type(stop.error("x")) is Cancelled and str(stop.error("x")) == "x (distlm cancel)"


def test_a_signal_that_tells_what_the_time_limit_told_lets_the_save_go_on() -> None:
    now_s, stop = 0.0, StopRequest()
    stop._count = StopCount(lambda: now_s)
    stop.announced("resources.time_limit_s = 600")
    for now_s, count in ((7.0, 1), (7.5, 1), (9.0, 2)):
        stop.signalled(signal.SIGTERM)
        assert stop.num_requests == count, now_s


def test_the_end_is_announced_once_however_often() -> None:
    stop = StopRequest()
    stop.signalled(signal.SIGINT)
    for _ in range(3):
        stop.announced("distlm cancel --checkpoint")
    assert (stop.num_requests, stop.is_urgent) == (1, False)
    assert type(stop.error("x")) is Cancelled


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_what_was_half_done_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    run = run_with_checkpoints(tmp_path, 10)
    (attempt,) = run.attempts()
    kept = [run.run_yaml, attempt.result_json, run.init / "prepared.json", run.model / "model.safetensors"]
    half_done = [
        attempt.reserve("result.json"), attempt.path / ".handle.json.7.tmp", run.path / ".model.1f.tmp" / "shard",
        run.init / ".model.2e.tmp" / "shard", attempt.ray_train / "incarnation-1" / ".marker",
        run.checkpoints / ".step-00000020.tmp-1" / "shard",
    ]  # fmt: skip
    for path in (*kept, *half_done):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clear_leftovers(attempt)
    assert all(path.exists() for path in kept)
    assert not list(run.path.rglob(".*")) and not attempt.ray_train.exists()
    assert [one.step for one in CheckpointStore(run.checkpoints).checkpoints()] == [10]


# --- what the workers report ------------------------------------------------------------------------------------------


def test_messages_that_come_late_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mailbox on a busy machine answers after we have stopped waiting; it has given its messages away by then."""
    import ray

    class Drain:
        calls = 0

        def remote(self) -> list[dict[str, Any]]:
            self.calls += 1
            pulse = {"kind": "pulse", "activity": "training", "step": self.calls, "longest_s": None}
            return [{"kind": "failure", "message": f"answer {self.calls}"}, pulse, {"kind": "saving", "step": 7}]

    class Confirm:
        steps: ClassVar[list[int]] = []

        def remote(self, step: int) -> None:
            self.steps.append(step)

    class Mailbox:
        drain, confirm = Drain(), Confirm()

    class Recorded:
        def __init__(self) -> None:
            self.messages: list[dict[str, Any]] = []

        def record(self, messages: list[dict[str, Any]], durably: bool) -> bool:
            self.messages += messages
            return durably

    late = iter([True, True, False, False])

    def get(reference: Any, timeout: float) -> Any:
        if next(late):
            raise ray.exceptions.GetTimeoutError
        return reference

    monkeypatch.setattr(ray, "get", get)
    controller = AttemptController.__new__(AttemptController)
    controller.failures, controller._asked_for = [], None
    controller._watchdog = Watchdog(RecoveryConfig())
    recorded: Any = Recorded()
    for _ in range(4):
        controller._record(recorded, Mailbox())
    assert [message["message"] for message in recorded.messages] == ["answer 1", "answer 2"]
    assert controller.failures == recorded.messages and controller._asked_for is None
    assert Confirm.steps == [7, 7], "a save is confirmed when all that came before it is in the file"
    assert controller._watchdog.step == 2
