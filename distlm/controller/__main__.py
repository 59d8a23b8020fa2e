"""`python -m distlm.controller RUN_FOLDER`: run the newest attempt of a run to its end. The same on every target.

Exits with the codes of distlm.errors and writes attempts/NNN/result.json, the truth about how the attempt ended. An
attempt that has a result already is not run again: the process exits with its code.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from distlm.config.attempt import Attempt
from distlm.config.load import locate
from distlm.controller.policy import Outcome
from distlm.controller.progress import Progress
from distlm.errors import DistlmError, ExitCode, InputError, Problem
from distlm.run_folder import LIVENESS_FD, AttemptFolder, RunFolder, lease, read_json, write_json
from distlm.temporary import make_temporary_root
from distlm.worker.entry import redirect_output

_RESULT_BYTES = 64 * 1024


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (run := RunFolder(Path(arguments[0]).absolute())).attempts():
        print("usage: python -m distlm.controller RUN_FOLDER (a folder with run.yaml and attempts/)", file=sys.stderr)
        return ExitCode.BAD_INPUT
    folder = run.attempts()[-1]
    if (result := read_json(folder.result_json)) is not None:
        return int(result["exit_code"])
    stop = threading.Event()
    _stop_on_signals(stop)
    _stop_when_the_cli_dies(stop)
    with _output_to_log(folder) as terminal:
        progress = Progress(terminal)
        started = time.time()
        with _room_for_result(folder):
            outcome, problems = _run(run, folder, progress, stop)
        write_result(folder, outcome, started, problems)
    return int(outcome.exit_code)


def _run(
    run: RunFolder, folder: AttemptFolder, progress: Progress, stop: threading.Event
) -> tuple[Outcome, list[dict[str, str]]]:
    """The outcome of the attempt, whatever happens, and what is wrong with the user's input."""
    try:
        with lease(run):
            return _execute(run, folder, progress, stop), []
    except InputError as error:
        traceback.print_exc()
        problems = _located(folder, error.problems)
        return Outcome(error.exit_code, "\n".join(map(str, problems))), [problem.to_json() for problem in problems]
    except DistlmError as error:
        traceback.print_exc()
        return Outcome(error.exit_code, str(error)), []
    except Exception as error:  # noqa: BLE001 - a fault of ours or of a library: still an outcome, with its cause
        traceback.print_exc()
        return _unexpected(error), []


def _unexpected(error: Exception) -> Outcome:
    """Only what the operating system or Ray says may be otherwise next time."""
    if isinstance(error, ModuleNotFoundError):
        return Outcome(ExitCode.BAD_INPUT, f"{error.name} is not installed here; run: pip install 'distlm[train]'")
    is_infrastructure = isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "ray"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Outcome(
        ExitCode.INFRASTRUCTURE if is_infrastructure else ExitCode.FAILED,
        f"{type(error).__name__}: {lines[0] if lines else ''}",
        details=traceback.format_exc(),
    )


def _located(folder: AttemptFolder, problems: tuple[Problem, ...]) -> list[Problem]:
    """The problems with the place in the user's file that their key was written at."""
    origins = Attempt.read(folder).origins
    return [replace(problem, location=problem.location or locate(origins, problem.key)) for problem in problems]


_CACHES = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
}
"""Where libraries keep what they compile; by default in the home folder or in /tmp."""


def _execute(run: RunFolder, folder: AttemptFolder, progress: Progress, stop: threading.Event) -> Outcome:
    from distlm.controller.attempt import AttemptController

    for variable, name in _CACHES.items():
        os.environ.setdefault(variable, str(run.cache / "libraries" / name))
    controller = AttemptController(run, folder, progress, stop)
    temporary_root = None if os.environ.get("RAY_ADDRESS") else make_temporary_root()
    try:
        write_json(
            folder.handle_json,
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "temporary_root": str(temporary_root or ""),
            },
        )
        return controller.execute(temporary_root)
    finally:
        if temporary_root is not None:
            shutil.rmtree(temporary_root, ignore_errors=True)


@contextmanager
def _room_for_result(folder: AttemptFolder) -> Iterator[None]:
    """Hold some of the storage, so that a run which fills it can still say how it ended."""
    reserve = folder.path / ".reserve"
    with suppress(OSError), open(reserve, "wb") as file:
        file.write(bytes(_RESULT_BYTES))
    yield
    with suppress(OSError):
        reserve.unlink(missing_ok=True)


def write_result(
    folder: AttemptFolder, outcome: Outcome, started: float, problems: list[dict[str, str]] | None = None
) -> None:
    """result.json: how the attempt ended."""
    write_json(
        folder.result_json,
        {
            "state": outcome.state,
            "exit_code": int(outcome.exit_code),
            "message": outcome.message,
            "problems": problems or [],
            "rank": outcome.rank,
            "host": outcome.host,
            "details": outcome.details,
            "log": str(folder.worker_log(outcome.rank) if outcome.rank is not None else folder.controller_log),
            "started_at": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def _stop_on_signals(stop: threading.Event) -> None:
    """Also let in what the CLI has blocked until now: a signal at start-up would end the process without a result."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: stop.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _stop_when_the_cli_dies(stop: threading.Event) -> None:
    """The other end of the pipe is closed by the kernel when the CLI is gone, even by SIGKILL."""
    descriptor = os.environ.pop(LIVENESS_FD, None)
    if descriptor is None:
        return

    def watch() -> None:
        os.read(int(descriptor), 1)
        stop.set()

    threading.Thread(target=watch, name="cli-liveness", daemon=True).start()


@contextmanager
def _output_to_log(folder: AttemptFolder) -> Iterator[TextIO]:
    """Everything that libraries print goes to controller.log; what is for people goes to the returned stream."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as terminal:
        os.set_inheritable(terminal.fileno(), False)
        redirect_output(folder.controller_log)
        yield terminal


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
