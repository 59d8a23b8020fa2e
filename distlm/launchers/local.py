"""Target local: the controller is a process on this machine.

It runs in a session of its own, so that Ctrl-C in the terminal reaches the command alone, which passes it on. Through
a socket it sends its events to the command, and learns when the command has died.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from types import FrameType
from typing import Any, Self

from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.devices import visible_gpu_count
from distlm.errors import Cause, ExitCode, InputError, Problem
from distlm.launchers.base import Request
from distlm.launchers.files import check_files
from distlm.leftovers import clear_leftovers
from distlm.outcome import Outcome, result_of, write_result
from distlm.processes import OomKills, no_descendants_left
from distlm.run_folder import COMMAND_FD, AttemptFolder, RunFolder, read_json
from distlm.stop_count import STOP_SIGNALS, StopCount
from distlm.view import Event, View, decode_event

_WORKER_GIB = 0.5
_SYNC_TIMEOUT_S = 20.0


class LocalLauncher:
    """See `distlm.launchers.base.Launcher`."""

    first_signal: int | None = None
    """The first one that has asked the last attempt to stop."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        yield from contradictions(config)

    def check_here(self, config: RunConfig) -> Iterator[Problem]:
        if os.environ.get("RAY_ADDRESS"):  # the workers run elsewhere: preflight will tell
            yield from contradictions(config)
            return
        yield from contradictions(config, visible_gpu_count())
        yield from check_files(config)
        memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if config.resources.min_workers * _WORKER_GIB > memory_gib:
            yield Problem(
                f"each worker needs {_WORKER_GIB} GiB of memory for its libraries alone, and this machine has "
                f"{memory_gib:.0f} GiB; use fewer workers", "resources.num_workers",
            )  # fmt: skip

    def build(self, config: RunConfig, run: RunFolder) -> Request:
        return Request((sys.executable, "-m", "distlm.controller", str(run.path)))

    def run(self, request: Request, attempt: AttemptFolder, view: View) -> dict[str, Any]:
        """Run the attempt to its end and show its events; the content of its result.json."""
        ours, theirs = socket.socketpair()
        oom_kills = OomKills()
        with _Signals(view) as signals:
            with no_descendants_left(), ours:
                signals.controller = subprocess.Popen(
                    request.command,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, COMMAND_FD: str(theirs.fileno())},
                )
                theirs.close()
                signals.let_in()
                for event in _events(ours):
                    oom_kills.sample()
                    _show(event, view)
                code = signals.controller.wait()
                self.first_signal = signals.first
            result: dict[str, Any] | None = read_json(attempt.result_json)
            if result is None:
                outcome = _how_it_ended(code, signals.count.value, oom_kills.happened_lately())
                result = result_of(attempt, outcome, started=None)
                with suppress(OSError):  # the storage may be what failed
                    end_abandoned(attempt, outcome)
                    if not outcome.needs_new_attempt:
                        tell_mlflow(attempt)
        return result


def require_packages() -> None:
    """Raises InputError where this machine has the client alone."""
    if missing := [name for name in ("ray", "psutil") if find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} is not installed here; run: pip install 'distlm[train]'")


def _events(connection: socket.socket) -> Iterator[Event]:
    """What the controller tells, until it has ended."""
    with connection.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # else it died while it wrote
                yield decode_event(line)


def _show(event: Event, view: View) -> None:
    """A mistake in showing a run must not end it."""
    try:
        view.show(event)
    except Exception:  # noqa: BLE001 - whatever it is
        traceback.print_exc()


class _Signals:
    """Passes what asks to stop on to the controller; the third request kills it. While it is in force, no signal ends
    this process, which has to clean up after the controller."""

    def __init__(self, view: View) -> None:
        self.count = StopCount()
        self.first: int | None = None
        self.controller: subprocess.Popen[bytes] | None = None
        self._view = view
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # A signal that comes before the controller has its handlers waits there; it lets it in when it is ready.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def let_in(self) -> None:
        """The controller is there: what has come meanwhile is passed on."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.let_in()

    def _handle(self, number: int, _: FrameType | None) -> None:
        counts = self.count.add(number)
        self.first = self.first or number
        if self.controller is not None and self.controller.returncode is None:
            self.controller.send_signal(number if self.count.value < 3 else signal.SIGKILL)
        if counts:
            self._view.stop_requested(self.count.value)


def _how_it_ended(code: int, num_requests: int, kernel_killed: bool) -> Outcome:
    """Of a controller that could not say it itself."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if num_requests > 2:
        return Outcome(ExitCode.CANCELLED, "the controller was killed on request", cause=Cause.CANCELLATION)
    if code < 0 and kernel_killed:
        text = "the controller was killed by the kernel because memory ran out"
        return Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.OUT_OF_MEMORY, needs_new_attempt=num_requests == 0)
    text = f"the controller ended without a result ({how})"
    return Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.INFRASTRUCTURE, needs_new_attempt=num_requests == 0)


def end_abandoned(attempt: AttemptFolder, outcome: Outcome) -> None:
    """Do in its folder what a killed controller could not do any more. Its processes have ended with it."""
    handle = read_json(attempt.handle_json)
    if handle and handle["temporary_root"]:
        shutil.rmtree(handle["temporary_root"], ignore_errors=True)
    clear_leftovers(attempt)
    write_result(attempt, outcome, started=None)


def tell_mlflow(attempt: AttemptFolder) -> None:
    """How an attempt has ended that could not say so itself: else it would be RUNNING for ever. Where MLflow does not
    answer, `distlm sync` does the same later."""
    if not attempt.metrics_jsonl.exists():
        return
    sync = ("distlm.commands.data_plane", "distlm.tracking.sync", "--without-model", str(attempt.run.path))
    command = [sys.executable, "-m", *sync]
    with open(attempt.controller_log, "ab") as log, suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=_SYNC_TIMEOUT_S)
