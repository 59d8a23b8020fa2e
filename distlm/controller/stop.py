"""The request that the attempt end before its time, from a signal or from the end of the command that waits for it.

Asked once, the workers finish their step and save. Asked again, everything ends at once.
"""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType

from distlm.errors import Cancelled, DistlmError, Preempted
from distlm.processes import STOP_SIGNALS

_TIME_TO_SAVE_S = 20.0
"""After the death of the command: nobody is there any more to ask again."""


class StopRequest:
    """Who has asked to stop, and how often. Set in signal handlers and threads, looked at by the controller's loop."""

    def __init__(self) -> None:
        self._reasons: list[str] = []
        self._first_signal: int | None = None
        self._asked = threading.Event()

    def ask(self, reason: str, signal_number: int | None = None) -> None:
        if not self._reasons:
            self._first_signal = signal_number
        self._reasons.append(reason)
        self._asked.set()

    @property
    def is_asked(self) -> bool:
        return bool(self._reasons)

    @property
    def num_requests(self) -> int:
        return len(self._reasons)

    @property
    def is_urgent(self) -> bool:
        """Asked more than once: stop without saving."""
        return self.num_requests > 1

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody asks, for up to `timeout_s`; whether somebody has."""
        return self._asked.wait(timeout_s)

    def error(self, what: str) -> DistlmError:
        """How the attempt ends for it. `what` tells what was stopped, and what has become of it.

        The user who presses Ctrl-C cancels; everybody else who stops a run in order preempts it.
        """
        in_order = self._first_signal != signal.SIGINT and not self.is_urgent
        return (Preempted if in_order else Cancelled)(f"{what} ({self._reasons[0]})")


def stop_on_signals(stop: StopRequest) -> None:
    """Also let in what the command has blocked until now, lest a signal at start-up end it without a result."""

    def ask(number: int, _: FrameType | None) -> None:
        stop.ask("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name, number)

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def stop_with_command(stop: StopRequest, connection: socket.socket) -> None:
    """Stop when the command at the other end has died, even by SIGKILL: the kernel closes its end. It never sends."""

    def watch() -> None:
        connection.recv(1)
        stop.ask("the distlm command was killed")
        threading.Event().wait(_TIME_TO_SAVE_S)
        stop.ask("no time is left to save")

    threading.Thread(target=watch, name="command-liveness", daemon=True).start()
