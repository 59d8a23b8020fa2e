"""The controller's decisions that need no cluster: which failure came first, progress lines, the lease, the result."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fabricated import give_format_version, write

from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.config.load import load_tree
from distlm.controller.__main__ import main, write_result
from distlm.controller.attempt import AttemptController, checkpoint_to_continue
from distlm.controller.policy import Outcome, StopAtFirstFailure
from distlm.controller.preflight import check_free_space
from distlm.controller.progress import Progress, format_duration
from distlm.controller.trainer import first_failure
from distlm.errors import CheckpointError, ExitCode, InputError, UnknownFormatError
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


class WorkerGroupError(Exception):
    """Stands in for Ray Train's, which carries the exception of each rank."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("workers failed")
        self.worker_failures = worker_failures


def failure(rank: int, message: str, timestamp_ms: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "failure", "rank": rank, "host": f"node{rank}", "incarnation": 1, "timestamp_ms": timestamp_ms,
        "type": "RuntimeError", "message": message, "details": "trace", "exit_code": 1, "expected": False,
    } | fields  # fmt: skip


def test_the_cause_is_named_and_not_the_ranks_that_followed() -> None:
    outcome = first_failure(
        [
            failure(0, "[gloo] Connection closed by peer [10.0.0.1]:3", 100),  # noticed before the cause was reported
            failure(1, "index 7 is out of range\nmore", 200),
            failure(2, "something later", 300),
        ],
        WorkerGroupError({}),
    )
    assert (outcome.rank, outcome.host, outcome.exit_code) == (1, "node1", ExitCode.FAILED)
    assert outcome.message == "RuntimeError: index 7 is out of range"


def test_an_error_made_on_purpose_keeps_its_text_and_exit_code() -> None:
    message = "step-00000001: rank 1: no space; Connection reset by peer"
    outcome = first_failure([failure(1, message, 5, exit_code=3, expected=True)], WorkerGroupError({}))
    assert (outcome.exit_code, outcome.message) == (ExitCode.INFRASTRUCTURE, message)


def test_of_an_error_that_all_ranks_raise_the_rank_where_it_happened_is_named() -> None:
    message = "rank 1: cannot write shard-00001: No space left on device"
    together = {"exit_code": 3, "expected": True}
    failures = [failure(0, message, 5, follows=True, **together), failure(1, message, 9, follows=False, **together)]
    outcome = first_failure(failures, WorkerGroupError({}))
    assert (outcome.rank, outcome.host, outcome.message) == (1, "node1", message)


def test_a_killed_worker_is_told_from_those_that_lost_it() -> None:
    followers = [failure(0, "Connection reset by peer", 100)]
    outcome = first_failure(followers, WorkerGroupError({0: RuntimeError("gloo"), 1: RuntimeError("The actor died")}))
    assert (outcome.rank, outcome.exit_code) == (1, ExitCode.INFRASTRUCTURE)
    assert "The actor died" in outcome.message


def test_a_failure_without_any_worker_is_infrastructure() -> None:
    outcome = first_failure([], ConnectionError("\n\nthe head node has gone\ntrace"))
    assert (outcome.rank, outcome.exit_code) == (None, ExitCode.INFRASTRUCTURE)
    assert outcome.message == "ConnectionError: the head node has gone"


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_first_policy_never_trains_again(code: ExitCode) -> None:
    assert not StopAtFirstFailure().decide(Outcome(code), 1).train_again


def test_progress_says_step_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(stream)
    progress.begin(200)
    values = {"train/loss": 7.5, "throughput/tokens_per_s": 1234.5}
    progress.metrics(20, values)
    now += 30
    progress.metrics(50, values)
    progress.metrics(50, {"eval/loss": 7.0, "eval/perplexity": 1096.6, "eval/accuracy": 0.05})
    progress.metrics(50, {"time/checkpoint_s": 1.0})
    assert stream.getvalue().splitlines() == [
        "step  20/200  loss 7.5000  1,234 tokens/s  ETA -",
        "step  50/200  loss 7.5000  1,234 tokens/s  ETA 2m 30s",
        "step  50/200  eval loss 7.0000  perplexity 1096.6  accuracy 0.050",
    ]


def test_durations_read_well() -> None:
    assert [format_duration(s) for s in (0, 59.6, 75, 3600, 90061)] == ["0s", "1m 00s", "1m 15s", "1h 00m", "25h 01m"]


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
    write_result(attempt, Outcome(ExitCode.FAILED, "ValueError: x", 1, "node1", "trace"), started=0.0)
    result = read_json(attempt.result_json)
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
    assert checkpoint_to_continue(make_run(tmp_path)[0], Progress(io.StringIO())) is None


def test_the_newest_good_checkpoint_is_continued_and_damaged_ones_are_named(tmp_path: Path) -> None:
    run, said = run_with_checkpoints(tmp_path, 10, 20, 30), io.StringIO()
    manifest_of(run, 30).write_text("{")
    (run.checkpoints / "step-99999999").mkdir()
    assert checkpoint_to_continue(run, Progress(said)) == Checkpoint(20, run.checkpoints / "step-00000020")
    first, second = said.getvalue().splitlines()
    assert "step-99999999" in first and "never committed" in first and "step-00000030" in second


def test_where_no_checkpoint_is_good_training_does_not_begin_from_the_start(tmp_path: Path) -> None:
    run = run_with_checkpoints(tmp_path, 10, 20)
    for step in (10, 20):
        manifest_of(run, step).write_text("{")
    with pytest.raises(
        CheckpointError, match=r"none of the run's checkpoints .*step-00000020/manifest\.json is damaged.* move .* away"
    ):
        checkpoint_to_continue(run, Progress(io.StringIO()))


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    """To continue an older one would be to train again what it holds, and then to replace it."""
    run = run_with_checkpoints(tmp_path, 10, 20)
    give_format_version(Checkpoint(20, run.checkpoints / "step-00000020"), 99)
    with pytest.raises(UnknownFormatError, match="has format version 99, and this distlm reads 2; use the distlm that"):
        checkpoint_to_continue(run, Progress(io.StringIO()))
    write(CheckpointStore(run.checkpoints), 30)  # a newer one that is good leaves nothing to train again
    assert checkpoint_to_continue(run, Progress(io.StringIO())) == Checkpoint(30, run.checkpoints / "step-00000030")


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


# --- what the workers report ------------------------------------------------------------------------------------------


def test_messages_that_come_late_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mailbox on a busy machine answers after we have stopped waiting; it has given its messages away by then."""
    import ray

    class Drain:
        calls = 0

        def remote(self) -> list[dict[str, Any]]:
            self.calls += 1
            return [{"kind": "failure", "message": f"answer {self.calls}"}]

    class Mailbox:
        drain = Drain()

    class Recorded:
        def __init__(self) -> None:
            self.messages: list[dict[str, Any]] = []

        def record(self, messages: list[dict[str, Any]]) -> None:
            self.messages += messages

    late = iter([True, True, False, False])

    def get(reference: Any, timeout: float) -> Any:
        if next(late):
            raise ray.exceptions.GetTimeoutError
        return reference

    monkeypatch.setattr(ray, "get", get)
    controller = AttemptController.__new__(AttemptController)
    controller.failures, controller._asked_for = [], None
    recorded: Any = Recorded()
    for _ in range(4):
        controller._record(recorded, Mailbox())
    assert [message["message"] for message in recorded.messages] == ["answer 1", "answer 2"]
    assert controller.failures == recorded.messages and controller._asked_for is None
