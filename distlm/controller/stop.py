"""The request that the attempt end before its time, from a signal or from the end of the command that waits for it.

Asked once, the workers finish their step and save. Asked again, everything ends at once.
"""

from __future__ import annotations

import signal
import socket
import threading
from contextlib import suppress
from types import FrameType

from distlm.errors import Cancelled, DistlmError, Preempted
from distlm.stop_count import STOP_SIGNALS, StopCount

_TIME_TO_SAVE_S = 15.0
"""After the death of the command: nobody is there any more to ask again."""


class StopRequest:
    """Who has asked to stop, and how often. Set in signal handlers and threads, looked at by the controller's loop."""

    def __init__(self) -> None:
        self._count = StopCount()
        self._reason = ""
        self._is_cancelled = False
        self._is_out_of_time = False

    def signalled(self, number: int) -> None:
        """A signal has come. Takes no lock."""
        self._note("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name, number == signal.SIGINT)
        self._count.add(number)

    def abandoned(self) -> None:
        """The command that waited has gone."""
        self._note("the distlm command was killed", is_cancelled=False)
        self._count.value = max(1, self._count.value)

    def preempted(self, reason: str) -> None:
        """What the attempt runs on is about to be taken away."""
        self._note(reason, is_cancelled=False)
        self._count.value = max(1, self._count.value)

    def out_of_time(self) -> None:
        self._is_out_of_time = True

    def _note(self, reason: str, is_cancelled: bool) -> None:
        if not self._reason:
            self._reason, self._is_cancelled = reason, is_cancelled

    @property
    def num_requests(self) -> int:
        return self._count.value

    @property
    def is_asked(self) -> bool:
        return self.num_requests > 0

    @property
    def is_urgent(self) -> bool:
        """Stop without saving."""
        return self.num_requests > 1 or self._is_out_of_time

    def error(self, what: str) -> DistlmError:
        """How the attempt ends for it. `what` tells what was stopped, and what has become of it.

        The user who presses Ctrl-C cancels; everybody else who stops a run preempts it.
        """
        return (Cancelled if self._is_cancelled else Preempted)(f"{what} ({self._reason})")


def stop_on_signals(stop: StopRequest) -> None:
    """Also let in what the command has blocked until now, lest a signal at start-up end it without a result."""

    def ask(number: int, _: FrameType | None) -> None:
        stop.signalled(number)

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stop_with_command(stop: StopRequest, connection: socket.socket) -> None:
    """Stop when the command at the other end has died, even by SIGKILL: the kernel closes its end. It never sends."""

    def watch() -> None:
        with suppress(OSError):  # a reset, where it had not read everything
            connection.recv(1)
        stop.abandoned()
        threading.Event().wait(_TIME_TO_SAVE_S)
        stop.out_of_time()

    threading.Thread(target=watch, name="command-liveness", daemon=True).start()
