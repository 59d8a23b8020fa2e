"""Target local: the controller is a process on this machine.

It runs in a session of its own, so that Ctrl-C in the terminal reaches the CLI alone, which passes it on. A pipe tells
the controller when the CLI has died.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.data.sources import check_source
from distlm.devices import visible_gpu_count
from distlm.errors import Cancelled, ExitCode, InfrastructureError, Problem
from distlm.launchers.base import Request
from distlm.run_folder import LIVENESS_FD, AttemptFolder, RunFolder, read_json, write_json

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WORKER_GIB = 0.5


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

    def submit(self, request: Request, attempt: AttemptFolder, detach: bool) -> int:
        if detach:
            with open(attempt.controller_log, "ab") as log:
                controller = subprocess.Popen(
                    request.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            log_path = os.path.relpath(attempt.controller_log)
            say(f"in the background; follow: tail -f {log_path}; stop: kill {controller.pid}")
            return ExitCode.SUCCEEDED
        reading, writing = os.pipe()
        # A signal that comes before both sides have their handlers waits; the controller lets it in when it is ready.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        controller = subprocess.Popen(
            request.command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(reading,),
            env={**os.environ, LIVENESS_FD: str(reading)},
        )
        os.close(reading)
        with _forwarded_signals(controller) as received:
            code = controller.wait()
        os.close(writing)
        if (result := read_json(attempt.result_json)) is not None:
            return int(result["exit_code"])
        _clean_up_after(attempt)
        if received:
            raise Cancelled("the controller was killed before it could stop in order")
        raise InfrastructureError(
            f"the controller ended without a result ({_how_it_ended(code)}); see {attempt.controller_log}"
        )


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
def _forwarded_signals(controller: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM asks the controller to stop; the third kills it. Yields the signals that came."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        controller.send_signal(number if len(received) < 3 else signal.SIGKILL)
        if len(received) == 1:
            with suppress(OSError):  # the terminal may be what has gone
                say("stopping (again, and a third time, to kill)", file=sys.stderr)

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # by nohup
    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS if number not in ignored}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _how_it_ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _clean_up_after(attempt: AttemptFolder) -> None:
    """Remove what a killed controller could not remove itself. Its Ray processes end with it."""
    handle = read_json(attempt.handle_json)
    if handle and handle["temporary_root"]:
        shutil.rmtree(handle["temporary_root"], ignore_errors=True)
    result = {
        "state": ExitCode.INFRASTRUCTURE.name.lower(),
        "exit_code": int(ExitCode.INFRASTRUCTURE),
        "message": "the controller was killed",
        "problems": [],
        "log": str(attempt.controller_log),
    }
    with suppress(OSError):  # the storage may be what failed
        write_json(attempt.result_json, result)
