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
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from distlm.checkpoint.store import CheckpointStore
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.data.sources import check_source
from distlm.devices import visible_gpu_count
from distlm.errors import Cause, CheckpointError, ExitCode, InputError, Problem
from distlm.launchers.base import Request
from distlm.outcome import Outcome, write_result
from distlm.processes import STOP_SIGNALS, count_oom_kills, no_descendants_left
from distlm.run_folder import COMMAND_FD, AttemptFolder, RunFolder, read_json
from distlm.view import View, decode_event, make_event

_WORKER_GIB = 0.5
_SYNC_TIMEOUT_S = 20.0


class LocalLauncher:
    """See `distlm.launchers.base.Launcher`."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        if os.environ.get("RAY_ADDRESS"):  # the workers run elsewhere: preflight will tell
            yield from contradictions(config)
            return
        yield from contradictions(config, visible_gpu_count())
        for section, sources in (("train", config.data.train), ("validation", config.data.validation)):
            for index, source in enumerate(sources):
                for problem in check_source(source):
                    key = ".".join(filter(None, ("data", section, str(index), problem.key)))
                    yield Problem(_with_place(problem), key, problem.value)
        for key, name in (
            ("model.name_or_path", config.model.name_or_path),
            ("tokenizer.name_or_path", config.tokenizer.name_or_path),
        ):
            if name and name.startswith("~"):
                yield Problem("'~' is not expanded here; write ${HOME} for it", key)
            elif name and name.startswith((".", "/")) and not os.path.isdir(name):
                yield Problem("there is no such folder", key)
        yield from _check_runs_dir(Path(config.runs_dir))
        memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        if config.resources.num_workers * _WORKER_GIB > memory_gib:
            yield Problem(
                f"each worker needs {_WORKER_GIB} GiB of memory for its libraries alone, and this machine has "
                f"{memory_gib:.0f} GiB; use fewer workers", "resources.num_workers",
            )  # fmt: skip

    def build(self, config: RunConfig, run: RunFolder) -> Request:
        return Request((sys.executable, "-m", "distlm.controller", str(run.path)), tuple(config.env))

    def submit(self, request: Request, attempt: AttemptFolder, view: View) -> int:
        ours, theirs = socket.socketpair()
        # A signal that comes before both sides have their handlers waits; the controller lets it in when it is ready.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        oom_kills = count_oom_kills()
        with no_descendants_left(), ours:
            controller = subprocess.Popen(
                request.command,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, COMMAND_FD: str(theirs.fileno())},
            )
            theirs.close()
            with _forwarded_signals(controller, view) as received:
                _show_events(ours, view)
                code = controller.wait()
        if read_json(attempt.result_json) is None:
            end_abandoned(attempt, _how_it_ended(code, received, count_oom_kills() != oom_kills))
            _tell_mlflow(attempt)
        result = read_json(attempt.result_json)
        view.show(make_event("result", **result))
        return int(result["exit_code"])


def require_packages() -> None:
    """Raises InputError where this machine has the client alone."""
    if missing := [name for name in ("ray", "psutil") if find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} is not installed here; run: pip install 'distlm[train]'")


def _show_events(connection: socket.socket, view: View) -> None:
    """Show what the controller tells, until it has ended."""
    with connection.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # else it died while it wrote
                try:
                    view.show(decode_event(line))
                except Exception:  # noqa: BLE001 - a mistake in showing a run must not end it
                    traceback.print_exc()


def _with_place(problem: Problem) -> str:
    """The problem of a data file as one text: the key of the config is said by the caller."""
    return f"{problem.location}: {problem.message}" if problem.location else problem.message


def _check_runs_dir(runs_dir: Path) -> Iterator[Problem]:
    nearest = next(path for path in (runs_dir, *runs_dir.parents, Path("/")) if os.path.exists(path))
    if str(runs_dir).startswith("~"):
        yield Problem("'~' is not expanded here; write ${HOME} for it", "runs_dir")
    elif not nearest.is_dir():
        yield Problem(f"{nearest} is a file, and a folder is needed", "runs_dir")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield Problem(f"nothing can be written to the folder {nearest}", "runs_dir")


@contextmanager
def _forwarded_signals(controller: subprocess.Popen[bytes], view: View) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM asks the controller to finish the step and save, the second to stop now; the third
    kills it. Yields the signals that came."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        controller.send_signal(number if len(received) < 3 else signal.SIGKILL)
        view.stop_requested(len(received))

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS if number not in ignored}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _how_it_ended(code: int, received: list[int], kernel_killed: bool) -> Outcome:
    """Of a controller that could not say it itself."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if len(received) > 2:
        return Outcome(ExitCode.CANCELLED, "the controller was killed on request", cause=Cause.CANCELLATION)
    if code < 0 and kernel_killed:
        text = "the controller was killed by the kernel because memory ran out"
        return Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.OUT_OF_MEMORY)
    text = f"the controller ended without a result ({how})"
    return Outcome(ExitCode.INFRASTRUCTURE, text, cause=Cause.INFRASTRUCTURE)


def end_abandoned(attempt: AttemptFolder, outcome: Outcome) -> None:
    """Do in its folder what a killed controller could not do any more. Its processes have ended with it."""
    handle = read_json(attempt.handle_json)
    if handle and handle["temporary_root"]:
        shutil.rmtree(handle["temporary_root"], ignore_errors=True)
    attempt.clear_leftovers()
    with suppress(CheckpointError):
        CheckpointStore(attempt.run.checkpoints).clean()
    write_result(attempt, outcome, started=None)


def _tell_mlflow(attempt: AttemptFolder) -> None:
    """Else it would say RUNNING for ever. Where it does not answer, `distlm sync` does the same later."""
    command = [sys.executable, "-m", "distlm.tracking.sync", "--without-model", str(attempt.run.path)]
    with open(attempt.controller_log, "ab") as log, suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=_SYNC_TIMEOUT_S)
