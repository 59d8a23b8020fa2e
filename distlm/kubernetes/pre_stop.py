"""`python -m distlm.kubernetes.pre_stop SECONDS`, before a pod is told to end, with SECONDS left: its workers save.

On the head pod the controller is asked for it, as by `distlm cancel --checkpoint`, and the head stays until it is known
how the job has ended. On another pod Ray is told that the node leaves; the controller has the workers save and go on
without it. Nothing is done where nothing is trained.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from distlm.run_folder import RunFolder, is_there, write_json

_LOOK_INTERVAL_S = 0.5
_TO_END_S = 10.0
"""Of the time that is left, what the pod needs for its end."""
_SEEN_AFTER_S = 8.0
"""The end of a job: KubeRay asks for it every 3 s, and the submitter reads the last of its output."""
_CONTROLLER, _JOB = ["-m", "distlm.controller"], ["-m", "distlm.ray_job"]
_WORKER = "ray::RayTrainWorker"


def main(arguments: Sequence[str]) -> None:
    deadline_s = time.monotonic() + float(arguments[0]) - _TO_END_S
    for controller in _processes(_is_controller):
        _ask_to_save(RunFolder(Path(controller.cmdline()[-1])))
        _wait_until_ended(_is_job, deadline_s)
        time.sleep(max(0.0, min(_SEEN_AFTER_S, deadline_s - time.monotonic())))
        return
    if list(_processes(_is_worker)):
        _drain(deadline_s - time.monotonic())
        _wait_until_ended(_is_worker, deadline_s)


def _is_controller(command: Sequence[str]) -> bool:
    return list(command[1:3]) == _CONTROLLER


def _is_job(command: Sequence[str]) -> bool:
    return list(command[1:3]) in (_CONTROLLER, _JOB)


def _is_worker(command: Sequence[str]) -> bool:
    return command[0].startswith(_WORKER)


def _processes(is_wanted: Callable[[Sequence[str]], bool]) -> Iterator[psutil.Process]:
    """Those of the pod. One without a command has ended."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if (command := process.cmdline()) and is_wanted(command):
                yield process


def _ask_to_save(run: RunFolder) -> None:
    attempt = run.attempts()[-1]
    if not is_there(attempt.cancel_json):  # the user's request stands
        write_json(attempt.cancel_json, {"save": True, "reason": "the head pod is about to end"})


def _drain(seconds: float) -> None:
    """Raises subprocess.CalledProcessError where Ray does not take it, which the pod's events tell."""
    (raylet,) = _processes(lambda command: Path(command[0]).name == "raylet")
    (node,) = [word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id=")]
    subprocess.run(
        [
            "ray", "drain-node", f"--address={os.environ['RAY_ADDRESS']}", f"--node-id={node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=its pod is about to end",
            f"--deadline-remaining-seconds={max(1, int(seconds))}",
        ],
        check=True,
    )  # fmt: skip


def _wait_until_ended(is_wanted: Callable[[Sequence[str]], bool], deadline_s: float) -> None:
    while list(_processes(is_wanted)) and time.monotonic() < deadline_s:
        time.sleep(_LOOK_INTERVAL_S)


if __name__ == "__main__":
    main(sys.argv[1:])
