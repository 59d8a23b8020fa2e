"""Which worker keeps the others waiting, and where it is: asked of the processes themselves, which are then killed."""

from __future__ import annotations

import linecache
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from distlm.controller.capacity import on_node
from distlm.errors import Cause, ExitCode
from distlm.outcome import Follower, Outcome
from distlm.run_folder import AttemptFolder
from distlm.worker.entry import STACK_SIGNAL

_STACK_TIMEOUT_S = 3.0
_NODE_TIMEOUT_S = 15.0
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_NUM_TOP_FRAMES = 8
_OURS = "worker/entry.py"
"""In the stack of the thread that trains."""
_STATES = {
    "T": "it is stopped (by SIGSTOP or a debugger)",
    "t": "it is stopped (by SIGSTOP or a debugger)",
    "D": "it waits for a disk or another device",
    "Z": "its process has ended",
    "X": "its process has ended",
}


@dataclass(frozen=True)
class WorkerProcess:
    """Where a worker is."""

    rank: int
    pid: int
    host: str
    node_id: str
    """Ray's."""
    placement_group_id: str = ""

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Self:
        """From what a worker tells when it has been placed."""
        return cls(**{field.name: message[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Sight:
    """What a process was doing."""

    state: str
    """The letter of /proc/PID/stat; empty: it could not be asked."""
    stack: str = ""
    """Of the thread that trains, the innermost frame first; empty: it did not answer."""

    @property
    def cannot_go_on(self) -> bool:
        return not self.stack or self.state in _STATES

    @property
    def waits_for_others(self) -> bool:
        """Whether it is in a collective operation."""
        frames = list(_FRAME.finditer(self.stack))[:_NUM_TOP_FRAMES]
        if not frames:
            return False
        line = linecache.getline(frames[0]["file"], int(frames[0]["line"]))
        return "wait(" in line or any(part in frame["file"] for frame in frames for part in _COLLECTIVES)

    def describe(self) -> str:
        if not self.state:
            return "its host does not answer"
        if self.state in _STATES:
            return _STATES[self.state]
        if (frame := _FRAME.search(self.stack)) is None:
            return "it does not answer"
        return f"it is in {Path(frame['file']).name}:{frame['line']}, {frame['function']}"


def end_hung_workers(workers: Sequence[WorkerProcess], attempt: AttemptFolder, complaint: str) -> Outcome:
    """Kill all workers, and say which one the others were waiting for: `complaint` says since when."""
    sights = end_workers(workers, attempt)
    # One that is stopped, or silent, cannot go on wherever it is; others may be in the middle of something.
    stuck = [worker for worker in workers if sights[worker.rank].cannot_go_on]
    suspects = stuck or [worker for worker in workers if not sights[worker.rank].waits_for_others]
    if not suspects or len(suspects) == len(workers) > 1:
        stacks = "\n\n".join(f"rank {rank}:\n{sight.stack}" for rank, sight in sorted(sights.items()))
        text = f"the workers do not go on: {complaint}; all wait for each other"
        return Outcome(ExitCode.INFRASTRUCTURE, text, details=stacks, cause=Cause.HANG)
    first = suspects[0]
    sight = sights[first.rank]
    return Outcome(
        ExitCode.INFRASTRUCTURE,
        f"the worker does not go on: {complaint}; {sight.describe()}",
        first.rank,
        first.host,
        f"stack of rank {first.rank}, the innermost call first:\n{sight.stack or 'unknown'}",
        Cause.HANG,
        followers=[
            Follower(worker.rank, "does not go on either" if worker in suspects else "waited for it", worker.host)
            for worker in workers
            if worker is not first
        ],
    )


def end_workers(workers: Sequence[WorkerProcess], attempt: AttemptFolder) -> dict[int, Sight]:
    """Kill all workers, after a look at what each was doing; by rank. On other hosts a task of Ray's does it there."""
    import ray

    of_nodes: dict[str, dict[int, tuple[int, str]]] = defaultdict(dict)
    for worker in workers:
        of_nodes[worker.node_id][worker.rank] = (worker.pid, str(attempt.worker_log(worker.rank)))
    here = ray.get_runtime_context().get_node_id()
    sights = {worker.rank: Sight("") for worker in workers}
    tasks = [
        ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node))(look_and_kill).remote(processes)
        for node, processes in of_nodes.items()
        if node != here
    ]
    if here in of_nodes:
        sights |= look_and_kill(of_nodes[here])
    answers, _ = ray.wait(tasks, num_returns=len(tasks), timeout=_NODE_TIMEOUT_S) if tasks else ([], [])
    for answer in answers:
        with suppress(ray.exceptions.RayError):
            sights |= ray.get(answer)
    return sights


def look_and_kill(processes: Mapping[int, tuple[int, str]]) -> dict[int, Sight]:
    """What workers of this host are doing, by rank, from their process ids and logs. They are killed afterwards:
    a stopped one has to be let go on for an instant to be asked."""
    states = {}
    sizes = {}
    for rank, (pid, log) in processes.items():
        sizes[rank] = Path(log).stat().st_size if Path(log).exists() else 0
        states[rank] = _state(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
            if states[rank] in ("T", "t"):
                os.kill(pid, signal.SIGCONT)
    stacks = {rank: _stack_written(Path(log), sizes[rank]) for rank, (_, log) in processes.items()}
    for pid, _ in processes.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return {rank: Sight(states[rank], stacks[rank]) for rank in processes}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _stack_written(log: Path, start: int) -> str:
    """The stack of the thread that trains, as written to the worker's log from byte `start` on; empty: none."""
    deadline = time.monotonic() + _STACK_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
            file.seek(start)
            threads = re.split(r"\n(?=(?:Current t|T)hread )", file.read())
            if found := next((thread for thread in threads if _OURS in thread and thread.endswith("\n")), None):
                return found.strip()
        time.sleep(0.05)
    return ""
