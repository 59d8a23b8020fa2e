"""The recorder and its delivery: what is in the file, what the tracker gets, and what an outage or a kill changes."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distlm.controller.recorder import Recorder, RecorderMailbox
from distlm.errors import AttestationError, InfrastructureError
from distlm.metrics_file import encode_line, read_lines
from distlm.redact import redact_uri
from distlm.run_folder import AttemptFolder, RunFolder, read_json
from distlm.tracking import Point, RefusedError
from distlm.tracking.delivery import Delivery, sync
from distlm.tracking.records import Record, read_metrics


class MemoryTracker:
    """A tracker that can be switched off, and refuses keys that begin with "bad"."""

    destination = "memory"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.points: list[Point] = []
        self.is_down = False
        self.fail_after_points: int | None = None
        self.was_tried = threading.Event()

    def log_points(self, points: Any) -> None:
        self._answer()
        if any(point.key.startswith("bad") for point in points):
            raise RefusedError("bad key")
        self.points += points
        if self.fail_after_points is not None and len(self.points) >= self.fail_after_points:
            raise ConnectionError("the answer was lost")

    def log_params(self, params: Any) -> None:
        self._record("params", params)

    def set_tags(self, tags: Any) -> None:
        self._record("tags", tags)

    def log_dataset(self, *args: Any, **dataset: Any) -> None:
        self._record("dataset", dataset)

    def log_artifact(self, path: Path, artifact_path: str | None) -> None:
        self._record("artifact", path)

    def set_status(self, status: str, timestamp_ms: int) -> None:
        self._record("status", status)

    def _record(self, name: str, content: Any) -> None:
        self._answer()
        self.calls.append((name, content))

    def _answer(self) -> None:
        self.was_tried.set()
        if self.is_down:
            raise ConnectionError("http://user:secret@host is down")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


def metrics(step: int, incarnation: int = 0, **values: float) -> dict[str, Any]:
    return Record(step, incarnation, 1000 + step, values or {"loss": float(step)}).to_message()


def write_attempt(run: RunFolder, *messages: dict[str, Any]) -> AttemptFolder:
    attempt = run.new_attempt()
    attempt.metrics_jsonl.write_bytes(b"".join(encode_line(message) for message in messages))
    return attempt


def steps_of(tracker: MemoryTracker) -> list[int]:
    return [point.step for point in tracker.points]


def test_values_survive_the_file_also_those_that_json_lacks(run: RunFolder) -> None:
    attempt = run.new_attempt()
    with Recorder(run, attempt) as recorder:
        recorder.record([metrics(1, loss=math.nan, high=math.inf, low=-math.inf, exact=0.1)])
        recorder.record([{"kind": "failure", "rank": 3, "loss": math.nan, "path": Path("x")}])
    [record] = read_metrics(run)
    assert (record.step, record.timestamp_ms, record.attempt) == (1, 1001, 1)
    assert math.isnan(record.values["loss"])
    assert (record.values["high"], record.values["low"], record.values["exact"]) == (math.inf, -math.inf, 0.1)

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in attempt.metrics_jsonl.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["status", "metrics", "failure", "status"]


def test_restore_supersedes_later_steps_of_earlier_incarnations(run: RunFolder) -> None:
    restore = {"kind": "restore", "step": 2, "incarnation": 1, "timestamp_ms": 0}
    late = metrics(4, 0)
    write_attempt(run, metrics(1), metrics(2), metrics(3), restore, late, metrics(3, 1))
    write_attempt(run, {"kind": "restore", "step": 2, "incarnation": 0, "timestamp_ms": 0}, metrics(3, 0))
    assert [(r.attempt, r.incarnation, r.step) for r in read_metrics(run)] == [(1, 0, 1), (1, 0, 2), (2, 0, 3)]
    superseded = [
        (r.attempt, r.incarnation, r.step) for r in read_metrics(run, include_superseded=True) if r.superseded
    ]
    assert superseded == [(1, 0, 3), (1, 0, 4), (1, 1, 3)]


def test_system_records_are_never_superseded(run: RunFolder) -> None:
    system = Record(50, 0, 1, {"system/0/cpu": 1.0}, kind="system").to_message()
    write_attempt(run, system, {"kind": "restore", "step": 0, "incarnation": 1, "timestamp_ms": 0})
    assert [record.step for record in read_metrics(run)] == [50]


def test_torn_last_line_is_left_out_and_cut_by_the_next_writer(run: RunFolder) -> None:
    attempt = write_attempt(run, metrics(1))
    with open(attempt.metrics_jsonl, "ab") as file:
        file.write(encode_line(metrics(2))[:-5])
    assert [record.step for record in read_metrics(run)] == [1]
    with Recorder(run, attempt) as recorder:
        recorder.record([metrics(3)])
    assert [record.step for record in read_metrics(run)] == [1, 3]


def test_damaged_line_is_left_out_with_a_warning(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    attempt = write_attempt(run, metrics(1))
    with open(attempt.metrics_jsonl, "ab") as file:
        file.write(b"\0\0\0\n" + encode_line(metrics(2)))
    assert [record.step for record in read_metrics(run)] == [1, 2]
    assert "damaged" in caplog.text


def test_every_step_of_a_key_is_delivered_once(run: RunFolder) -> None:
    restore = {"kind": "restore", "step": 2, "incarnation": 1, "timestamp_ms": 0}
    write_attempt(run, metrics(1), metrics(2), metrics(3), restore, metrics(3, 1, loss=9.0, fresh=9.0), metrics(4, 1))
    write_attempt(run, metrics(4), metrics(5))
    tracker = MemoryTracker()
    assert sync(run, tracker) == 6
    assert [(p.key, p.step, p.value) for p in tracker.points] == [
        ("loss", 1, 1.0),
        ("loss", 2, 2.0),
        ("loss", 3, 3.0),
        ("fresh", 3, 9.0),
        ("loss", 4, 4.0),
        ("loss", 5, 5.0),
    ]
    assert tracker.points[0].timestamp_ms == 1001
    assert sync(run, tracker) == 0


def test_an_acknowledgement_counts_for_its_destination_only(run: RunFolder) -> None:
    write_attempt(run, metrics(1), metrics(2))
    assert sync(run, MemoryTracker()) == 2
    other = MemoryTracker()
    other.destination = "elsewhere"
    assert sync(run, other) == 2


def test_acknowledged_lines_still_count_as_seen(run: RunFolder) -> None:
    first = write_attempt(run, metrics(1), metrics(2))
    sync(run, MemoryTracker())
    with open(first.metrics_jsonl, "ab") as file:
        file.write(encode_line(metrics(2, 1)) + encode_line(metrics(3, 1)))
    tracker = MemoryTracker()
    sync(run, tracker)
    assert steps_of(tracker) == [3]


def test_after_a_lost_answer_the_same_points_are_sent_again_and_nothing_else(run: RunFolder) -> None:
    """MLflow ignores a point that it has with the same timestamp, so a repeated chunk must repeat exactly."""
    write_attempt(run, *(metrics(step) for step in range(2500)))
    tracker = MemoryTracker()
    delivery = Delivery(run, tracker)
    tracker.fail_after_points = 2000
    with pytest.raises(ConnectionError):
        delivery.deliver()
    tracker.fail_after_points = None
    delivery.deliver()
    assert steps_of(tracker) == [*range(2000), *range(1000, 2000), *range(2000, 2500)]
    assert len(set(tracker.points)) == 2500


def test_a_refused_point_does_not_hold_the_others(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    write_attempt(run, metrics(1, a=1.0, bad=1.0, b=1.0), metrics(2, a=2.0))
    tracker = MemoryTracker()
    assert sync(run, tracker) == 3
    assert sorted((p.key, p.step) for p in tracker.points) == [("a", 1), ("a", 2), ("b", 1)]
    assert "refuses bad at step 1" in caplog.text


def test_everything_reaches_the_tracker_in_order(run: RunFolder) -> None:
    tracker = MemoryTracker()
    recorder = Recorder(run, run.new_attempt(), lambda: tracker)
    recorder.log_params({"learning_rate": "0.1"})
    recorder.set_tags({"target": "local"})
    recorder.log_dataset("corpus", "abc", "/data", "training", {"text": "string"}, {"num_rows": 5})
    recorder.log_artifact(run.run_yaml)
    recorder.record([metrics(1)])
    assert recorder.check_tracker(timeout_s=30)
    assert recorder.close("FINISHED", timeout_s=30)
    assert [name for name, _ in tracker.calls] == ["status", "params", "tags", "dataset", "artifact", "status"]
    assert tracker.calls[0] == ("status", "RUNNING")
    assert tracker.calls[3][1]["columns"] == {"text": "string"}
    assert tracker.calls[4] == ("artifact", run.run_yaml)
    assert tracker.calls[-1] == ("status", "FINISHED")
    assert steps_of(tracker) == [1]


def test_who_waits_for_a_slow_tracker_may_give_up(run: RunFolder) -> None:
    tracker = MemoryTracker()
    answer = threading.Event()
    recorder = Recorder(run, run.new_attempt(), lambda: answer.wait(60) and tracker)
    began_s = time.monotonic()
    assert not recorder.close("FINISHED", timeout_s=60, give_up=lambda: time.monotonic() > began_s + 0.3)
    assert time.monotonic() < began_s + 20 and recorder.tracker_problem == ""
    answer.set()


def test_a_dead_tracker_holds_nothing_and_gets_all_of_it_later(run: RunFolder) -> None:
    tracker = MemoryTracker()
    tracker.is_down = True
    attempt = run.new_attempt()
    recorder = Recorder(run, attempt, lambda: tracker)
    recorder.record([metrics(1)])
    assert tracker.was_tried.wait(30)
    recorder.record([metrics(2)])
    assert not recorder.close("FAILED", timeout_s=0.01)
    assert "secret" not in recorder.tracker_problem
    assert [record.step for record in read_metrics(run)] == [1, 2]
    assert read_json(attempt.path / "metrics.sent.json") is None

    tracker.is_down = False
    assert sync(run, tracker) == 2
    assert tracker.calls == [("status", "RUNNING"), ("status", "FAILED")]


def test_an_outage_ends_while_the_recorder_runs(run: RunFolder) -> None:
    tracker = MemoryTracker()
    tracker.is_down = True
    recorder = Recorder(run, run.new_attempt(), lambda: tracker)
    recorder.record([metrics(1)])
    assert tracker.was_tried.wait(30)
    tracker.is_down = False
    recorder.record([metrics(2)])
    assert recorder.close("FINISHED", timeout_s=30)
    assert steps_of(tracker) == [1, 2]
    assert recorder.tracker_problem == ""


def test_a_run_that_may_not_be_recorded_is_reported_to_the_controller(run: RunFolder) -> None:
    def connect() -> MemoryTracker:
        raise AttestationError("2 MLflow runs carry the tag")

    recorder = Recorder(run, run.new_attempt(), connect)
    with pytest.raises(AttestationError, match="2 MLflow runs"):
        recorder.check_tracker(timeout_s=30)
    assert not recorder.close("FAILED", timeout_s=30)


def test_without_a_tracker_the_file_is_all(run: RunFolder) -> None:
    recorder = Recorder(run, run.new_attempt())
    assert recorder.check_tracker(timeout_s=0)
    assert recorder.close("FINISHED")


@contextmanager
def small_disk(size_bytes: int) -> Iterator[Callable[[int], None]]:
    """Within it, files may become that large: a write is cut short, then refused, as on a full disk. Yields a function
    that sets another size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def set_size(size_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))

    try:
        set_size(size_bytes)
        yield set_size
    finally:
        # Not in a fixture: pytest writes to its own log before it tears fixtures down.
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def numbers(attempt: AttemptFolder) -> list[int]:
    return [message["number"] for _, message in read_lines(attempt.metrics_jsonl) if message["kind"] == "event"]


def test_while_the_disk_is_full_lines_wait_and_none_is_lost(run: RunFolder) -> None:
    attempt, tracker = run.new_attempt(), MemoryTracker()
    recorder = Recorder(run, attempt, lambda: tracker)
    with small_disk(1000) as set_size:
        for number in range(100):
            recorder.record([{"kind": "event", "number": number, "text": "x" * 50}])
        assert recorder.storage_problem == "File too large"
        assert attempt.metrics_jsonl.stat().st_size == 1000
        seen = numbers(attempt)
        assert 5 < len(seen) < 20 and seen == list(range(len(seen))), "the line that was cut is left out"
        recorder.record([metrics(1)])
        set_size(2000)
        recorder.record([])
        assert len(seen) < len(numbers(attempt)) < 40
    recorder.record([])
    assert numbers(attempt) == list(range(100)) and recorder.storage_problem == ""
    assert recorder.close("FINISHED", timeout_s=30)
    assert steps_of(tracker) == [1]
    lines = [json.loads(line) for line in attempt.metrics_jsonl.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["status", *["event"] * 100, "metrics", "status"]


def test_too_many_waiting_lines_are_an_error(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.controller.recorder._MAX_WAITING_BYTES", 5000)
    attempt = run.new_attempt()
    recorder = Recorder(run, attempt)
    with small_disk(1000):
        recorder.record([{"kind": "event", "number": 0, "text": "x" * 5000}])
        with pytest.raises(InfrastructureError, match=r"cannot append to .*metrics.jsonl: File too large; make room"):
            recorder.record([{"kind": "event", "number": 1, "text": "x" * 5000}])
    recorder.close("FAILED")
    assert numbers(attempt) == [0, 1]


def test_lines_that_still_wait_at_the_end_are_an_error(run: RunFolder) -> None:
    attempt = run.new_attempt()
    recorder = Recorder(run, attempt)
    recorder.record([{"kind": "event", "number": 0}])
    with (
        small_disk(attempt.metrics_jsonl.stat().st_size + 10),
        pytest.raises(InfrastructureError, match="File too large"),
        recorder,
    ):
        recorder.record([{"kind": "event", "number": 1}])
    assert attempt.metrics_jsonl.read_bytes().endswith(b"\n"), "no torn line is left"
    assert numbers(attempt) == [0]


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_storage_error_passes(run: RunFolder, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """EIO, which no limit can bring about."""
    monkeypatch.setattr("distlm.controller.recorder._FSYNC_INTERVAL_S", 0.0)
    attempt = run.new_attempt()
    recorder = Recorder(run, attempt)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        recorder.record([{"kind": "event", "number": 0}])
        assert recorder.storage_problem == "Input/output error"
    recorder.record([{"kind": "event", "number": 1}])
    assert recorder.storage_problem == ""
    assert recorder.close("FINISHED")
    assert numbers(attempt) == [0, 1]


def test_a_killed_controller_loses_nothing_that_it_recorded(run: RunFolder) -> None:
    attempt = run.new_attempt()
    code = f"""
import itertools
from pathlib import Path
from distlm.controller.recorder import Recorder
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.tracking.records import Record
recorder = Recorder(RunFolder(Path({str(run.path)!r})), AttemptFolder(Path({str(attempt.path)!r})))
for step in itertools.count():
    recorder.record([Record(step, 0, step, {{"loss": 1.0}}).to_message()])
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        last_step = next(int(line) for line in output if int(line) >= 200)
        os.kill(process.pid, signal.SIGKILL)
        last_step = max([last_step, *(int(line) for line in output if line.endswith("\n"))])
    process.wait()
    steps = [record.step for record in read_metrics(run)]
    assert steps == list(range(len(steps)))
    assert len(steps) > last_step


def test_a_full_mailbox_drops_the_oldest_metrics_and_keeps_failures() -> None:
    mailbox = RecorderMailbox(max_messages=3)
    failure = {"kind": "failure", "rank": 1}
    for message in [failure, metrics(1), metrics(2), metrics(3), metrics(4)]:
        mailbox.push(message)
    dropped = {"kind": "event", "event": "messages_dropped", "count": 2}
    assert mailbox.drain() == [failure, metrics(3), metrics(4), dropped]
    assert mailbox.drain() == []


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:pa/ss@w@host:5000/x", "https://***@host:5000/x"),
        ("https://token@host", "https://***@host"),
        ("postgresql://u:p@db/mlflow?sslpassword=x&a=1", "postgresql://***@db/mlflow?sslpassword=***&a=1"),
        ("http://host:5000/a", "http://host:5000/a"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("API request to http://u:p@h/api failed, ask me@home", "API request to http://***@h/api failed, ask me@home"),
    ],
)
def test_uris_are_shown_without_secrets(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


@pytest.mark.parametrize("piece", ["?", "&tokens", "://a:80/", "://", "sk-", "a"])
def test_a_long_line_takes_no_minutes(piece: str) -> None:
    line = piece * (2**19 // len(piece))
    began_s = time.process_time()
    assert redact_uri(line) == line
    assert time.process_time() - began_s < 10


def test_the_recorder_imports_neither_ray_nor_mlflow_nor_torch() -> None:
    code = "import sys, distlm.controller.recorder; print({'ray', 'mlflow', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
