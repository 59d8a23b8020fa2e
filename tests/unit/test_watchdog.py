"""Signs of life: what a worker tells, when it counts as hung, and who of several keeps the others waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distlm.config.schema import RecoveryConfig
from distlm.controller import hang
from distlm.controller.hang import Sight, WorkerProcess, end_hung_workers, look_and_kill
from distlm.controller.watchdog import Watchdog
from distlm.errors import Cause
from distlm.run_folder import AttemptFolder
from distlm.worker.pulse import Pulse


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Life:
    """A worker whose beats a watchdog hears."""

    def __init__(self, **config: float) -> None:
        self.clock = Clock()
        self.watchdog = Watchdog(RecoveryConfig(**config), self.clock)
        self.told: list[dict[str, Any]] = []
        self.pulse = Pulse(1, self._tell, self.clock)

    def _tell(self, message: dict[str, Any]) -> None:
        self.told.append(message)
        self.watchdog.heard(message)

    def beat(self, activity: Any, step: int, after_s: float) -> None:
        self.clock.now_s += after_s
        self.pulse.beat(activity, step)

    def complaint_after(self, seconds: float) -> str:
        self.clock.now_s += seconds
        complaint = self.watchdog.complaint()
        self.clock.now_s -= seconds
        return complaint


def test_while_nothing_is_measured_the_limit_is_that_of_a_start() -> None:
    life = Life(start_timeout_s=50.0)
    assert not life.complaint_after(50)
    assert life.complaint_after(51) == "no progress for 51 s (starting; recovery.start_timeout_s = 50)"
    life.beat("training", 1, after_s=49)
    assert not life.complaint_after(50)
    assert "(training, step 1; recovery.start_timeout_s = 50)" in life.complaint_after(51)


def test_the_limit_follows_from_the_longest_beat_so_far() -> None:
    life = Life()
    for step, after_s in enumerate((20, 300, 5, 4, 1), 1):  # the one of 300 s, that compiles, is the first of its kind
        life.beat("training", step, after_s)
    assert life.watchdog.timeout_s == 50
    assert not life.complaint_after(50)
    limit = "the longest so far took 5.0 s; recovery.step_timeout_s sets a limit"
    assert life.complaint_after(51) == f"no progress for 51 s (training, step 5; {limit})"


def test_short_beats_are_given_half_a_minute() -> None:
    life = Life()
    for step in range(1, 60):
        life.beat("training", step, 0.1)
    assert not life.complaint_after(29)
    assert life.complaint_after(31)


def test_a_limit_that_is_given_is_the_limit() -> None:
    life = Life(step_timeout_s=3.0)
    for step in range(1, 4):
        life.beat("training", step, 2.0)
    assert not life.complaint_after(3)
    assert "recovery.step_timeout_s = 3" in life.complaint_after(3.1)


def test_each_activity_has_its_own_measure() -> None:
    life = Life(start_timeout_s=1000.0)
    for step in range(1, 5):
        life.beat("training", step, 2.0)
    life.beat("evaluating", 4, 2.0)
    assert life.watchdog.timeout_s == 1000  # the first evaluation
    life.beat("training", 5, 400.0)
    assert life.watchdog.timeout_s == 30
    life.beat("evaluating", 5, 2.0)
    life.beat("evaluating", 5, 40.0)
    life.beat("training", 6, 1.0)
    life.beat("evaluating", 6, 1.0)
    assert life.watchdog.timeout_s == 400


def test_beats_are_told_once_per_second_and_at_once_where_the_activity_changes() -> None:
    life = Life()
    for step in range(1, 31):
        life.beat("training", step, 0.25)
    life.beat("saving", 30, 0.01)
    assert [message["step"] for message in life.told] == [1, 5, 9, 13, 17, 21, 25, 29, 30]
    assert life.pulse.step == 30


def test_the_end_of_a_phase_of_the_start_is_a_sign_of_life() -> None:
    life = Life(start_timeout_s=50.0)
    life.clock.now_s += 40
    life.watchdog.heard({"kind": "event", "event": "phase", "phase": "import"})
    assert not life.complaint_after(49)


# --- who hangs -------------------------------------------------------------------------------------------------------

IN_COLLECTIVE = """Thread 0x01 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 1 in all_reduce
  File "/site-packages/distlm/worker/entry.py", line 1 in run_worker"""
IN_DATA = """Thread 0x01 (most recent call first):
  File "/site-packages/distlm/data/readers.py", line 7 in read
  File "/site-packages/distlm/worker/entry.py", line 1 in run_worker"""
WORKERS = [WorkerProcess(rank, 100 + rank, f"host{rank}", f"node{rank}") for rank in range(3)]


@pytest.mark.parametrize(
    ("sights", "rank", "message"),
    [
        ([Sight("S", IN_COLLECTIVE), Sight("S", IN_DATA), Sight("S", IN_COLLECTIVE)], 1, "it is in readers.py:7, read"),
        ([Sight("S", IN_DATA), Sight("S", IN_COLLECTIVE), Sight("T", IN_COLLECTIVE)], 2, "it is stopped (by SIGSTOP"),
        ([Sight("S", IN_DATA), Sight("S", IN_COLLECTIVE), Sight("T", IN_DATA)], 2, "it is stopped (by SIGSTOP"),
        ([Sight("S", IN_COLLECTIVE), Sight("S", IN_COLLECTIVE), Sight("")], 2, "its host does not answer"),
        ([Sight("S", IN_COLLECTIVE), Sight("R"), Sight("S", IN_COLLECTIVE)], 1, "it does not answer"),
        ([Sight("D", IN_DATA), Sight("S", IN_COLLECTIVE), Sight("S", IN_COLLECTIVE)], 0, "it waits for a disk"),
        ([Sight("S", IN_COLLECTIVE)] * 3, None, "all wait for each other"),
        ([Sight("S", IN_DATA)] * 3, None, "all wait for each other"),
    ],
)
def test_the_one_that_the_others_wait_for_is_named(
    sights: list[Sight], rank: int | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hang, "end_workers", lambda workers, attempt: dict(enumerate(sights)))
    outcome = end_hung_workers(WORKERS, AttemptFolder(tmp_path), "no progress for 31 s")
    assert (outcome.rank, outcome.cause) == (rank, Cause.HANG)
    assert message in outcome.message and "no progress for 31 s" in outcome.message
    if rank is not None:
        assert outcome.host == f"host{rank}"
        assert (sights[rank].stack or "unknown") in outcome.details
        assert {follower.rank for follower in outcome.followers} == {0, 1, 2} - {rank}


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_process_is_asked_for_its_stack_and_killed(is_stopped: bool, tmp_path: Path) -> None:
    """Also one that is stopped, and cannot answer as long as it is, and one that holds the interpreter's lock."""
    package = tmp_path / "worker"
    package.mkdir()
    (package / "entry.py").write_text(
        "import faulthandler, re, sys\n"
        "from distlm.worker.entry import STACK_SIGNAL\n"
        "def hang_in_one_call():\n"
        "    print('ready', flush=True)\n"
        "    re.match(r'(a|aa)+$', 'a' * 60 + 'b')\n"  # takes for ever, with the lock held
        "faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)\n"
        "hang_in_one_call()\n"
    )
    log = tmp_path / "rank-00000.log"
    log.write_text("what was there before\n")
    with open(log, "ab") as stderr:
        process = subprocess.Popen([sys.executable, package / "entry.py"], stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if is_stopped:
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        sights = look_and_kill({5: (process.pid, str(log))})
        assert process.wait(10) == -signal.SIGKILL
    finally:
        process.kill()
    assert sights[5].state == ("T" if is_stopped else "R")
    assert "in hang_in_one_call" in sights[5].stack and "what was there before" not in sights[5].stack
    assert sights[5].describe().startswith("it is stopped" if is_stopped else "it is in ")


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert look_and_kill({0: (process.pid, "/nowhere")})[0].describe() == "its process has ended"
