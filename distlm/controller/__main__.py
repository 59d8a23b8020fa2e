"""`python -m distlm.controller RUN_FOLDER`: run the newest attempt of a run to its end. The same on every target.

Exits with the codes of distlm.errors and writes attempts/NNN/result.json, the truth about how the attempt ended. An
attempt that has a result already is not run again: the process exits with its code.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from distlm.causes import cause_of, exit_code_of_cause
from distlm.compile_caches import keep_compile_caches
from distlm.config.attempt import Attempt
from distlm.config.load import locate
from distlm.controller.progress import Progress
from distlm.controller.stop import (
    StopRequest,
    stop_before_limit,
    stop_on_cancel,
    stop_on_signals,
    stop_with_command,
)
from distlm.errors import Cause, DistlmError, ExitCode, InputError, Problem
from distlm.leftovers import clear_leftovers
from distlm.outcome import Outcome, write_result
from distlm.run_folder import COMMAND_FD, AttemptFolder, RunFolder, lease, read_json, write_json
from distlm.temporary import temporary_root
from distlm.view import View
from distlm.view.background import InBackground
from distlm.view.plain import JsonView, PlainView
from distlm.worker.entry import redirect_output

_RESULT_BYTES = 64 * 1024


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (run := RunFolder(Path(arguments[0]).absolute())).attempts():
        print("usage: python -m distlm.controller RUN_FOLDER (a folder with run.yaml and attempts/)", file=sys.stderr)
        return ExitCode.BAD_INPUT
    folder = run.attempts()[-1]
    if (result := read_json(folder.result_json)) is not None:
        return int(result["exit_code"])
    stop = StopRequest()
    stop_on_signals(stop)
    stop_on_cancel(stop, folder)
    started = time.time()
    with _view(folder, stop) as view:
        try:
            with lease(run):
                with _room_for_result(folder):
                    outcome, problems = _run(run, folder, Progress(view), stop)
                if not os.environ.get("RAY_ADDRESS"):  # else workers of the cluster may still be ending
                    clear_leftovers(folder)
                write_result(folder, outcome, started, problems)
        except InputError as error:  # another controller has the run
            outcome, problems = _refused(folder, error)
            write_result(folder, outcome, started, problems)
    return int(outcome.exit_code)


def _run(
    run: RunFolder, folder: AttemptFolder, progress: Progress, stop: StopRequest
) -> tuple[Outcome, list[dict[str, str]]]:
    """The outcome of the attempt, whatever happens, and what is wrong with the user's input."""
    try:
        return _execute(run, folder, progress, stop), []
    except InputError as error:
        return _refused(folder, error)
    except DistlmError as error:
        traceback.print_exc()
        return Outcome.of(error, traceback.format_exc()), []
    except Exception as error:  # noqa: BLE001 - a fault of ours or of a library: still an outcome, with its cause
        traceback.print_exc()
        return _unexpected(error), []


def _refused(folder: AttemptFolder, error: InputError) -> tuple[Outcome, list[dict[str, str]]]:
    traceback.print_exc()
    problems = _located(folder, error.problems)
    outcome = replace(Outcome.of(error), message="\n".join(map(str, problems)))
    return outcome, [problem.to_json() for problem in problems]


def _unexpected(error: Exception) -> Outcome:
    """Only what the operating system or Ray says may be otherwise next time."""
    if isinstance(error, ModuleNotFoundError):
        message = f"{error.name} is not installed here; run: pip install 'distlm[train]'"
        return Outcome(ExitCode.BAD_INPUT, message, cause=Cause.CONFIGURATION)
    cause = cause_of(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return Outcome(
        exit_code_of_cause(cause),
        f"{type(error).__name__}: {lines[0] if lines else ''}",
        details=traceback.format_exc(),
        cause=cause,
    )


def _located(folder: AttemptFolder, problems: tuple[Problem, ...]) -> list[Problem]:
    """The problems with the place in the user's file that their key was written at."""
    origins = Attempt.read(folder).origins
    return [replace(problem, location=problem.location or locate(origins, problem.key)) for problem in problems]


def _execute(run: RunFolder, folder: AttemptFolder, progress: Progress, stop: StopRequest) -> Outcome:
    from distlm.controller.attempt import AttemptController

    keep_compile_caches(run)
    controller = AttemptController(run, folder, progress, stop)
    stop_before_limit(stop, controller.config.resources)
    with nullcontext(None) if os.environ.get("RAY_ADDRESS") else temporary_root() as root:
        handle = {"host": socket.gethostname(), "pid": os.getpid(), "temporary_root": str(root or "")}
        write_json(folder.handle_json, handle)
        return controller.execute(root)


@contextmanager
def _room_for_result(folder: AttemptFolder) -> Iterator[None]:
    """Hold some of the storage, so that a run which fills it can still say how it ended."""
    reserve = folder.reserve("result.json")
    with suppress(OSError), open(reserve, "wb") as file:
        file.write(bytes(_RESULT_BYTES))
    yield
    with suppress(OSError):
        reserve.unlink(missing_ok=True)


@contextmanager
def _view(folder: AttemptFolder, stop: StopRequest) -> Iterator[View]:
    """Who watches: the command that waits for the attempt, else whoever reads the standard output. Everything that
    libraries print goes to controller.log."""
    with ExitStack() as scope:
        if (descriptor := os.environ.pop(COMMAND_FD, None)) is not None:
            os.set_inheritable(int(descriptor), False)
            connection = socket.socket(fileno=int(descriptor))
            stop_with_command(stop, connection)
            stream = connection.makefile("w", encoding="utf-8", errors="backslashreplace")
            scope.callback(_hang_up, connection, stream)
            view: View = JsonView(stream)
        else:
            view = PlainView(scope.enter_context(os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")))
        redirect_output(folder.controller_log)
        background = scope.enter_context(closing(InBackground(view)))
        yield background


def _hang_up(connection: socket.socket, stream: TextIO) -> None:
    """Also on a command that reads no more, for which a thread waits in the middle of a line."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError, ValueError):
        stream.close()
    connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
