"""Work that needs torch and is done once for a run: in a process beside the controller, or as a task of the cluster.

The controller itself imports no torch. On this machine the helper starts before Ray does and works while Ray starts;
a cluster's head node may be too small for that, so there the work is a task on any of its nodes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

from distlm.errors import InfrastructureError
from distlm.processes import end_with_parent
from distlm.stop_count import signals_held
from distlm.temporary import temporary_root


class Helper(Protocol):
    """Computes one function at a time."""

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start to compute; function and arguments are pickled."""

    def is_done(self, timeout_s: float) -> bool:
        """Whether it is computed, after waiting for up to `timeout_s`."""

    def result(self) -> Any:
        """What the function has returned; raises what it has raised."""

    def close(self) -> None:
        """End it, whatever it does."""


class LocalHelper:
    """A process on this machine. It ends with the controller, however that ends."""

    def __init__(self) -> None:
        self._scope = ExitStack()
        folder = self._scope.enter_context(temporary_root())
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(folder)), name="distlm-helper")
        # What asks to stop may be sent to every process of the run; the controller decides what ends, and when.
        with signals_held():
            resource_tracker.ensure_running()  # it lets SIGINT and SIGTERM in, in this thread
        with signals_held():
            self._process.start()
        theirs.close()

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._pipe.send((function, arguments))
        except OSError:
            raise self._died() from None

    def is_done(self, timeout_s: float) -> bool:
        return self._pipe.poll(timeout_s)

    def result(self) -> Any:
        try:
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not succeeded:
            error, text = value
            raise error from RemoteTraceback(text)
        return value

    def _died(self) -> InfrastructureError:
        self._process.join()
        code = self._process.exitcode
        return InfrastructureError(
            f"the process that prepares and exports died without an error of its own (exit code {code}; killed or "
            "out of memory?)"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._scope.close()


class ClusterHelper:
    """Tasks on the Ray cluster that the controller is connected to."""

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        import ray

        self._task = ray.remote(num_cpus=1, max_retries=0)(function).remote(*arguments)

    def is_done(self, timeout_s: float) -> bool:
        import ray

        return bool(ray.wait([self._task], timeout=timeout_s)[0])

    def result(self) -> Any:
        import ray

        try:
            return ray.get(self._task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the text of Ray's own error is a traceback

    def close(self) -> None:
        return


class RemoteTraceback(Exception):
    """The traceback in the process where an error was raised; its cause."""


def _serve(pipe: Connection, folder: str) -> None:
    """`folder`: for temporary files, which this process cannot remove when it is killed."""
    end_with_parent()
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    # As in any process that was not spawned. Libraries make locks by the default; those of spawned processes have names
    # in /dev/shm, which stay there if all is killed at once.
    multiprocessing.set_start_method("fork", force=True)
    while True:
        function, arguments = pipe.recv()
        try:
            answer = (True, function(*arguments))
        except BaseException as error:  # noqa: BLE001 - the controller tells the user, whatever it is
            traceback.print_exc()
            answer = (False, (_portable(error), traceback.format_exc()))
        pipe.send(answer)


def _portable(error: BaseException) -> Exception:
    """The error, or its text where it cannot be sent or would end the controller instead of the attempt."""
    if isinstance(error, Exception):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))  # noqa: S301 - what this process has just written
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")
