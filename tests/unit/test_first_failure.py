"""Which failure of a worker group came first, its class of cause, and the screen that tells it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from distlm.causes import cause_of, exit_code_of_cause
from distlm.config.load import load_tree
from distlm.controller.first_failure import advice, first_failure
from distlm.errors import Cause, CheckpointError, ExitCode, InputError, NonFiniteLossError, Problem
from distlm.outcome import Follower, Outcome, write_result
from distlm.run_folder import RunFolder, read_json
from distlm.view.ending import ending
from distlm.worker.failure import failure_message


class WorkerGroupError(Exception):
    """Stands in for Ray Train's, which carries the exception of each rank."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("workers failed")
        self.worker_failures = worker_failures


def gone(text: str) -> Exception:
    """Stands in for what Ray Train says of a worker that has died."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    return WorkerHealthCheckFailedError(text, RuntimeError("The actor died"))


def failure(rank: int, message: str, timestamp_ms: int, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "failure", "rank": rank, "host": f"node{rank}", "incarnation": 1, "timestamp_ms": timestamp_ms,
        "type": "RuntimeError", "message": message, "details": "trace", "exit_code": 1, "expected": False,
        "cause": "code", "place": "a.py:3 in f", "step": 7,
    } | fields  # fmt: skip


def test_the_cause_is_named_and_not_the_ranks_that_followed() -> None:
    outcome = first_failure(
        [
            # Noticed before the cause was reported.
            failure(0, "[/build/gloo/pair.cc:537] Read error [10.0.0.1]:3: Connection closed by peer.", 100),
            failure(1, "index 7 is out of range\nmore", 200),
            failure(2, "something later", 300),
        ],
        WorkerGroupError({}),
        3,
    )
    assert (outcome.rank, outcome.host, outcome.exit_code, outcome.cause) == (1, "node1", ExitCode.FAILED, Cause.CODE)
    assert (outcome.message, outcome.place) == ("RuntimeError: index 7 is out of range", "a.py:3 in f")
    assert outcome.step == 7 and outcome.may_be_tried_again
    assert [(follower.rank, follower.is_same) for follower in outcome.followers] == [(0, False), (2, False)]
    assert outcome.followers[0].message == "RuntimeError: Read error [10.0.0.1]:3: Connection closed by peer."


def test_an_error_made_on_purpose_keeps_its_text_and_exit_code() -> None:
    message = "step-00000001: rank 1: no space; Connection reset by peer"
    told = failure(1, message, 5, exit_code=3, expected=True, cause="storage")
    outcome = first_failure([told], WorkerGroupError({}), 2)
    assert (outcome.exit_code, outcome.message, outcome.place) == (ExitCode.INFRASTRUCTURE, message, "")
    assert outcome.followers == [Follower(0, "ended with it")], "it had no time to say anything"


def test_of_an_error_that_all_ranks_raise_the_rank_where_it_happened_is_named() -> None:
    message = "rank 1: cannot write shard-00001: No space left on device"
    together = {"exit_code": 3, "expected": True, "cause": "storage"}
    failures = [failure(0, message, 5, follows=True, **together), failure(1, message, 9, follows=False, **together)]
    outcome = first_failure(failures, WorkerGroupError({}), 2)
    assert (outcome.rank, outcome.host, outcome.message) == (1, "node1", message)
    assert outcome.followers == [Follower(0, "ended with it", "node0")]


def test_a_killed_worker_is_told_from_those_that_lost_it() -> None:
    followers = [failure(0, "Connection reset by peer", 100)]
    # Ray's text names the kernel's OOM killer whatever it was.
    ray_says = (
        "A worker health check failed. hostname='node1', The actor died (1) killed by the OOM killer due to high memory"
    )
    died = WorkerGroupError({0: RuntimeError("gloo"), 1: gone(ray_says)})
    outcome = first_failure(followers, died, 2)
    assert (outcome.rank, outcome.exit_code, outcome.cause) == (1, ExitCode.INFRASTRUCTURE, Cause.NODE_LOST)
    assert outcome.message.startswith("the worker process died") and outcome.host == "node1"
    assert [follower.rank for follower in outcome.followers] == [0]


@pytest.mark.parametrize(
    ("reason", "kernel_killed", "killer"),
    [("The actor died", True, "the kernel"), ("killed due to the node running low on memory.", False, "Ray")],
)
def test_a_worker_that_is_killed_for_want_of_memory(reason: str, kernel_killed: bool, killer: str) -> None:
    outcome = first_failure([], WorkerGroupError({1: gone(reason)}), 2, kernel_killed)
    assert (outcome.rank, outcome.exit_code, outcome.cause) == (1, ExitCode.FAILED, Cause.OUT_OF_MEMORY)
    assert outcome.message == f"the worker process was killed by {killer} because memory ran out"


def test_a_worker_that_could_tell_ray_alone_is_not_called_dead() -> None:
    """Its disk is full, and so it has no log; the mailbox is away."""
    error = WorkerGroupError({0: OSError(errno.ENOSPC, "No space left on device")})
    outcome = first_failure([], error, 2)
    assert (outcome.rank, outcome.cause, outcome.exit_code) == (0, Cause.STORAGE, ExitCode.INFRASTRUCTURE)
    assert outcome.message == "OSError: [Errno 28] No space left on device"


def test_a_worker_that_ray_train_waits_for_in_vain_hangs() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    outcome = first_failure([], WorkerGroupError({1: WorkerHealthCheckTimeoutError("no answer")}), 2)
    assert (outcome.rank, outcome.cause, outcome.exit_code) == (1, Cause.HANG, ExitCode.INFRASTRUCTURE)


def test_a_kill_for_want_of_memory_on_this_host_explains_nothing_on_another() -> None:
    outcome = first_failure([], WorkerGroupError({1: gone("hostname='elsewhere'")}), 2, kernel_killed=True)
    assert (outcome.host, outcome.cause) == ("elsewhere", Cause.NODE_LOST)


def test_workers_that_only_waited_for_another_one() -> None:
    waiting = failure(0, "[gloo] Timed out waiting 1800000ms for recv", 100, cause="hang")
    outcome = first_failure([waiting], WorkerGroupError({0: RuntimeError("gloo")}), 2)
    assert (outcome.cause, outcome.exit_code) == (Cause.HANG, ExitCode.INFRASTRUCTURE)


def test_a_failure_without_any_worker_is_infrastructure() -> None:
    outcome = first_failure([], ConnectionError("\n\nthe head node has gone\ntrace"), 2)
    assert (outcome.rank, outcome.exit_code, outcome.cause) == (None, ExitCode.INFRASTRUCTURE, Cause.INFRASTRUCTURE)
    assert outcome.message == "ConnectionError: the head node has gone"


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (OutOfMemoryError("CUDA"), Cause.OUT_OF_MEMORY, 1),
        (MemoryError(), Cause.OUT_OF_MEMORY, 1),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
         Cause.OUT_OF_MEMORY, 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Cause.OUT_OF_MEMORY, 1),
        (OSError(errno.ENOSPC, "No space left on device"), Cause.STORAGE, 3),
        (RuntimeError("safetensors: I/O error: No space left on device (os error 28)"), Cause.STORAGE, 3),
        (CheckpointError("x"), Cause.STORAGE, 3),
        (NonFiniteLossError("x"), Cause.DIVERGENCE, 1),
        (InputError(Problem("x", "training.seed")), Cause.CONFIGURATION, 1),
        (InputError(Problem("x", "data.train.0.paths"), Problem("y", "data.train")), Cause.USER_DATA, 1),
        (InputError(Problem("x", "data.train.0.paths"), Problem("y", "seed")), Cause.CONFIGURATION, 1),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), Cause.USER_DATA, 1),
        (ConnectionResetError("x"), Cause.INFRASTRUCTURE, 3),
        (IndexError("index out of range in self"), Cause.CODE, 1),
    ],
)  # fmt: skip
def test_classes_of_causes(error: Exception, cause: Cause, code: int) -> None:
    assert cause_of(error) == cause
    assert exit_code_of_cause(cause) == code


def test_a_worker_tells_where_it_was_raised() -> None:
    try:
        load_tree({})
    except InputError as error:
        message = failure_message(error, rank=3, incarnation=2)
    assert message["place"].startswith("load.py:") and message["place"].endswith(" in _validate")
    assert (message["rank"], message["incarnation"], message["exit_code"]) == (3, 2, ExitCode.BAD_INPUT)
    assert "Traceback" in message["details"]


def test_advice_names_the_keys_that_can_still_help() -> None:
    tree: dict[str, Any] = {
        "model": {"config": {}}, "data": {"train": [{"source": "python-docs"}]}, "training": {"max_steps": 9},
        "resources": {"num_workers": 2},
    }  # fmt: skip
    text = advice(Cause.OUT_OF_MEMORY, load_tree(tree).config)
    assert "training.per_device_train_batch_size (now 8)" in text and "deepspeed.zero_stage (now 2)" in text
    tree |= {"deepspeed": {"zero_stage": 3}, "training": {"max_steps": 9, "gradient_checkpointing": True}}
    text = advice(Cause.OUT_OF_MEMORY, load_tree(tree).config)
    assert "zero_stage" not in text and "gradient_checkpointing" not in text and "resources.num_workers=2" in text
    tree |= {"deepspeed": {"zero_stage": 2}, "resources": {"num_workers": [1, 4]}}
    assert "zero_stage (now 2)" in advice(Cause.OUT_OF_MEMORY, load_tree(tree).config)
    assert advice(None, load_tree(tree).config) == ""


# --- the screen -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    return RunFolder.create(tmp_path / "runs", "20260131-235959-3fa9c1")


def screen(run: RunFolder, outcome: Outcome) -> list[str]:
    attempt = run.new_attempt()
    write_result(attempt, outcome, started=0.0)
    return ending(run, read_json(attempt.result_json))


def test_one_line_has_rank_host_cause_key_and_log_and_the_noise_is_folded_under_it(run: RunFolder) -> None:
    lost = [Follower(rank, "RuntimeError: Connection closed by peer", f"node{rank}") for rank in (0, 2, 3, 4, 7)]
    outcome = Outcome(
        ExitCode.FAILED, "RuntimeError: can't allocate", 1, "node1", "trace", Cause.OUT_OF_MEMORY, "bert.py:9 in f",
        "lower training.per_device_train_batch_size (now 8)", lost,
    )  # fmt: skip
    assert screen(run, outcome) == [
        "failed on rank 1 (node1): out of memory: RuntimeError: can't allocate (bert.py:9 in f); lower "
        "training.per_device_train_batch_size (now 8); log: "
        "runs/20260131-235959-3fa9c1/attempts/001/logs/rank-00001.log",
        "  ranks 0, 2-4, 7 only followed: RuntimeError: Connection closed by peer",
        "  start anew: distlm submit run:20260131-235959-3fa9c1 KEY=VALUE; or resume with more sharding or workers: "
        "distlm resume 20260131-235959-3fa9c1 KEY=VALUE",
    ]


def test_an_error_of_all_ranks_is_said_once(run: RunFolder) -> None:
    same = [Follower(rank, "the loss is nan", "node", is_same=True) for rank in (0, 2)]
    outcome = Outcome(ExitCode.FAILED, "the loss is nan", 1, "node", "", Cause.DIVERGENCE, followers=same)
    first, *others = screen(run, outcome)
    assert first.startswith("failed on all 3 ranks alike: divergence: the loss is nan; log: ")
    assert others == ["  start anew with other values: distlm submit run:20260131-235959-3fa9c1 KEY=VALUE"]


def test_a_run_elsewhere_is_resumed_with_its_folder_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(tmp_path / "my runs", "20260131-235959-3fa9c1")
    (first, second) = screen(run, Outcome(ExitCode.PREEMPTED, "stopped after step 9, which is saved (SIGTERM)"))
    assert first == "preempted: stopped after step 9, which is saved (SIGTERM)"
    assert second == "resume with: distlm resume 'my runs/20260131-235959-3fa9c1'"


def test_of_a_long_message_the_end_stays_which_says_what_to_do(run: RunFolder) -> None:
    long = f"cannot write {'x' * 2000}: No space left on device; make room, then resume the run"
    first, *_ = screen(run, Outcome(ExitCode.INFRASTRUCTURE, long, 0, "node0", "", Cause.STORAGE))
    assert first.startswith("failed on rank 0 (node0): storage: cannot write xxx") and len(first) < 600
    assert "No space left on device; make room, then resume the run; log: " in first
