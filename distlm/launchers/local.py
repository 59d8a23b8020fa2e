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
from pathlib import Path
from types import FrameType
from typing import Any

from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.data.sources import check_source
from distlm.devices import visible_gpu_count
from distlm.errors import ExitCode, InfrastructureError, Problem
from distlm.launchers.base import Request
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json

LIVENESS_FD = "DISTLM_LIVENESS_FD"


class LocalLauncher:
    """See `distlm.launchers.base.Launcher`."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        if "RAY_ADDRESS" in os.environ:  # the workers run elsewhere: preflight will tell
            yield from contradictions(config)
            return
        yield from contradictions(config, visible_gpu_count())
        for section, sources in (("train", config.data.train), ("validation", config.data.validation)):
            for index, source in enumerate(sources):
                for problem in check_source(source):
                    yield Problem(_with_place(problem), f"data.{section}.{index}")
        for key, name in (
            ("model.name_or_path", config.model.name_or_path),
            ("tokenizer.name_or_path", config.tokenizer.name_or_path),
        ):
            if name and name.startswith((".", "/", "~")) and not Path(name).is_dir():
                yield Problem("there is no such folder", key)

    def build(self, config: RunConfig, run: RunFolder) -> Request:
        return Request((sys.executable, "-m", "distlm.controller", str(run.path)), tuple(config.env))

    def submit(self, request: Request, attempt: AttemptFolder, detach: bool) -> int:
        if detach:
            with open(attempt.controller_log, "ab") as log:
                subprocess.Popen(
                    request.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            return ExitCode.SUCCEEDED
        reading, writing = os.pipe()
        controller = subprocess.Popen(
            request.command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(reading,),
            env={**os.environ, LIVENESS_FD: str(reading)},
        )
        os.close(reading)
        previous = _forward_signals(controller)
        try:
            code = controller.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(writing)
        if read_json(attempt.result_json) is None:
            _clean_up_after(attempt)
            raise InfrastructureError(
                f"the controller ended without a result (exit code {code}); see {attempt.controller_log}"
            )
        return code


def _with_place(problem: Problem) -> str:
    """The problem of a data file as one text: the key of the config is said by the caller."""
    return f"{problem.location}: {problem.message}" if problem.location else problem.message


def _forward_signals(controller: subprocess.Popen[bytes]) -> dict[signal.Signals, Any]:
    """The first Ctrl-C or SIGTERM asks the controller to stop; the third kills it."""
    count = 0

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal count
        count += 1
        controller.send_signal(number if count < 3 else signal.SIGKILL)
        if count == 1:
            print("stopping (again, and a third time, to kill)", file=sys.stderr, flush=True)

    return {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def _clean_up_after(attempt: AttemptFolder) -> None:
    """Remove what a killed controller could not remove itself. Its Ray processes end with it."""
    handle = read_json(attempt.handle_json)
    if handle and handle["temporary_root"]:
        shutil.rmtree(handle["temporary_root"], ignore_errors=True)
    write_json(
        attempt.result_json,
        {
            "state": ExitCode.INFRASTRUCTURE.name.lower(),
            "exit_code": int(ExitCode.INFRASTRUCTURE),
            "message": "the controller was killed",
            "problems": [],
            "log": str(attempt.controller_log),
        },
    )
