"""The request that the attempt end before its time: from a signal, from `distlm cancel`, from the time limit, or from
the end of the command that waits for it.

Asked once, the workers finish their step and save. Asked again, everything ends at once.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from distlm.config.schema import ResourcesConfig
from distlm.errors import Cancelled, DistlmError, InputError, Preempted
from distlm.run_folder import AttemptFolder, is_there, read_json
from distlm.stop_count import STOP_SIGNALS, StopCount

_TIME_TO_SAVE_S = 15.0
"""After the death of the command: nobody is there any more to ask again."""
_LOOK_INTERVAL_S = 0.5


class StopRequest:
    """Who has asked to stop, and how often. Set in signal handlers and threads, looked at by the controller's loop."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        """When the controller has started, nearly."""
        self._count = StopCount()
        self.reason = ""
        """Who has asked; empty: nobody."""
        self._what_cut_it_off = ""
        self._is_cancelled = False
        self._is_out_of_time = False

    def signalled(self, number: int) -> None:
        """A signal has come. Takes no lock."""
        self._note("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name, number == signal.SIGINT)
        self._count.add(number)

    def announced(self, reason: str) -> None:
        """The end is near: save, to be continued. However often it is said, that is one request."""
        self._note(reason, is_cancelled=False)
        if not self.is_asked:
            self._count.value = 1

    def cancelled(self, reason: str) -> None:
        """The user wants the end now and nothing saved, whatever was asked before."""
        self.reason, self._is_cancelled = reason, True
        self._count.value = max(2, self._count.value)

    def out_of_time(self, what_cut_it_off: str = "") -> None:
        self._what_cut_it_off = what_cut_it_off
        self._is_out_of_time = True

    def _note(self, reason: str, is_cancelled: bool) -> None:
        if not self.reason:
            self.reason, self._is_cancelled = reason, is_cancelled

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

        The user who presses Ctrl-C or calls `distlm cancel` cancels; everybody else who stops a run preempts it.
        """
        why = "; ".join(filter(None, (self.reason, self._what_cut_it_off)))
        return (Cancelled if self._is_cancelled else Preempted)(f"{what} ({why})")


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
        stop.announced("the distlm command was killed")
        threading.Event().wait(_TIME_TO_SAVE_S)
        stop.out_of_time()

    threading.Thread(target=watch, name="command-liveness", daemon=True).start()


def stop_on_cancel(stop: StopRequest, attempt: AttemptFolder) -> None:
    """Stop as `distlm cancel` asks in the attempt's folder, which it may do from another host; the last one counts."""

    def watch() -> None:
        never = threading.Event()
        while not never.wait(_LOOK_INTERVAL_S):
            match _cancel_request(attempt):
                case {"save": True, "reason": str(reason)}:
                    stop.announced(reason)
                case {"save": True}:
                    stop.announced("distlm cancel --checkpoint")
                case {"save": False}:
                    return stop.cancelled("distlm cancel")

    threading.Thread(target=watch, name="cancel-request", daemon=True).start()


def _cancel_request(attempt: AttemptFolder) -> Any:
    """The content of the request; None: there is none that can be read."""
    with suppress(OSError, InputError):
        return read_json(attempt.cancel_json) if is_there(attempt.cancel_json) else None
    return None


def stop_before_limit(stop: StopRequest, resources: ResourcesConfig) -> None:
    """Stop in time to be saved before the time limit, and at the limit without that."""
    if resources.time_limit_s is None:
        return
    limit_s, to_save_s = resources.time_limit_s, resources.time_to_save_s

    def wait_until(seconds: float) -> None:
        left_s = stop.started_s + seconds - time.monotonic()
        threading.Event().wait(min(max(0.0, left_s), threading.TIMEOUT_MAX))

    def watch() -> None:
        wait_until(limit_s - to_save_s)
        stop.announced(f"resources.time_limit_s = {limit_s:g}")
        wait_until(limit_s)
        stop.out_of_time(
            "the time limit was reached before more was saved; give more time for it with resources.time_to_save_s"
        )

    threading.Thread(target=watch, name="time-limit", daemon=True).start()
