"""The process that computes beside the controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing

import psutil
import pytest

from distlm.controller.helper import LocalHelper
from distlm.errors import InfrastructureError, InputError, Problem
from distlm.stop_count import STOP_SIGNALS


def refuse(message: str) -> None:
    raise InputError(Problem(message, "data.train"))


def test_it_computes_one_thing_after_the_other_in_one_process() -> None:
    with closing(LocalHelper()) as helper:
        pids = set()
        for _ in range(2):
            helper.begin(os.getpid)
            assert helper.is_done(60.0)
            pids.add(helper.result())
    assert len(pids) == 1 and os.getpid() not in pids and not psutil.pid_exists(pids.pop())


def test_what_it_raises_is_raised_and_it_lives_on() -> None:
    with closing(LocalHelper()) as helper:
        helper.begin(refuse, "no such file")
        with pytest.raises(InputError) as raised:
            helper.result()
        assert raised.value.problems == (Problem("no such file", "data.train"),)
        helper.begin(abs, -1)
        assert helper.result() == 1


class Odd(Exception):
    """Pickles, but cannot be made again from its text."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def raise_odd() -> None:
    raise Odd("nothing", "particular")


def raise_what_cannot_be_sent() -> None:
    error = ValueError("it holds a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


def raise_exit() -> None:
    sys.exit(0)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (raise_odd, "Odd: nothing in particular"),
        (raise_what_cannot_be_sent, "ValueError: it holds a lock"),
        (raise_exit, "SystemExit: 0"),
    ],
)
def test_errors_that_cannot_be_sent_or_would_end_the_controller_come_as_text(
    function: Callable[[], None], text: str
) -> None:
    with closing(LocalHelper()) as helper:
        helper.begin(function)
        with pytest.raises(RuntimeError, match=text) as raised:
            helper.result()
        assert f"in {function.__name__}" in str(raised.value.__cause__)


def test_signals_to_the_whole_session_are_left_to_the_controller() -> None:
    with closing(LocalHelper()) as helper:
        helper.begin(os.getpid)
        pid = helper._process.pid
        assert pid is not None
        for number in STOP_SIGNALS:  # also before it has imported anything
            os.kill(pid, number)
        assert helper.result() == pid
        for number in STOP_SIGNALS:
            os.kill(pid, number)
        helper.begin(os.getpid)
        assert helper.result() == pid


def test_a_helper_that_died_while_it_had_nothing_to_do_is_told() -> None:
    with closing(LocalHelper()) as helper:
        helper.begin(os.getpid)
        os.kill(helper.result(), signal.SIGKILL)
        helper._process.join()
        with pytest.raises(InfrastructureError, match=r"exit code -9"):
            helper.begin(os.getpid)
            helper.result()


def test_its_death_is_told() -> None:
    with closing(LocalHelper()) as helper:
        helper.begin(os.getpid)
        pid = helper.result()
        helper.begin(time.sleep, 600)
        assert not helper.is_done(0.1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InfrastructureError, match=r"exit code -9; killed or out of memory"):
            helper.result()


def test_it_ends_with_a_controller_that_is_killed() -> None:
    script = """
import os, time
from distlm.controller.helper import LocalHelper
if __name__ == "__main__":
    helper = LocalHelper()
    helper.begin(os.getpid)
    print(helper.result(), flush=True)
    helper.begin(time.sleep, 600)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    helper = psutil.Process(int(killed.stdout)) if psutil.pid_exists(int(killed.stdout)) else None
    assert killed.returncode == -signal.SIGKILL
    assert helper is None or not psutil.wait_procs([helper], timeout=10)[1]
