"""How often the user has asked to stop, counted alike by the command and by the controller that it passes signals to.

1  finish the step, save, stop          2  stop now          3  kill
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""SIGUSR2 is what schedulers are told to send ahead of the end: libraries such as NCCL may take SIGUSR1."""

_ANNOUNCEMENTS = (signal.SIGTERM, signal.SIGUSR2)

_SAME_EVENT_S = 1.0
"""Who closes a terminal, a session or a service sends SIGHUP and SIGTERM together, or one of them twice; who signals
all processes of a run reaches the controller twice, since the command passes on what it gets."""


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals that ask to stop wait until the block ends or lets them in; threads and processes that it starts never
    get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """In the block SIGTERM, SIGUSR2 and the end of the terminal do what Ctrl-C does; that one too where a shell script
    has put the process into the background, and so had it ignored."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    numbers = [n for n in STOP_SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]  # by nohup
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopCount:
    """Not every signal is a new request: only another Ctrl-C, or a SIGTERM or SIGUSR2 that comes some time after the
    first one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_s: float | None = None
        self.value = 0

    def add(self, number: int) -> bool:
        """A signal has come; whether it counts. Safe in a signal handler."""
        now_s = self._clock()
        # The first signal may tell what the controller knows from elsewhere, such as a time limit that both have.
        is_same = self._first_s is None or now_s - self._first_s < _SAME_EVENT_S
        if self._first_s is None:
            self._first_s = now_s
        if self.value > 0 and (number == signal.SIGHUP or (number in _ANNOUNCEMENTS and is_same)):
            return False
        self.value += 1
        return True
