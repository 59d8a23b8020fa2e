"""Ray on every node of a job, one Ray node on each, for as long as an attempt lasts.

Each is a step of the job: `srun python -m distlm.slurm.node`, which is told by a line on its standard input what to be,
and ends, with all that it has started, when that input ends: so they end with this process, however that ends.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from distlm.errors import InfrastructureError
from distlm.slurm.allocation import NUM_HEAD_PORTS, Allocation, is_free, own_address

_SHARE_FOR_RAY = 0.8
"""Of a node's memory, what Ray may promise; nothing that distlm starts asks Ray for memory."""
_MIB = 2**20
_END_TIMEOUT_S = 10.0
_MAX_STARTS, _PAUSE_S, _LONG_S = 3, 2.0, 600.0


@dataclass(frozen=True)
class NodeOrder:
    """What a node is to be: the line that it gets."""

    node: str
    head: str
    """host:port of Ray's head."""
    is_head: bool
    others: tuple[str, ...]
    """The addresses of the job's other nodes."""
    first_port: int
    num_cpus: int
    memory_bytes: int | None

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Self:
        content = json.loads(line)
        return cls(**{**content, "others": tuple(content["others"])})


class RayNodes:
    """A context: begins to start them all, and ends them all. It does not wait until they are there: the controller
    does, with what else there is to do."""

    def __init__(self, allocation: Allocation, logs: Path, say: Callable[[str], None], on_stop: Callable[[], None]):
        """`logs`: the folder for what Ray prints, a file for each node. `on_stop` is called, in a thread, when a node
        has been told that the job is about to end."""
        self._allocation, self._logs, self._say, self._on_stop = allocation, logs, say, on_stop
        self._token = secrets.token_hex(32)
        self._steps: dict[str, subprocess.Popen[str]] = {}
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        nodes, port = self._allocation.nodes, _free_port(self._allocation.first_port)
        self.address = f"{own_address(self._allocation.addresses[1:])}:{port}"
        self._logs.mkdir(parents=True, exist_ok=True)
        for index in range(len(nodes)):
            thread = threading.Thread(target=self._keep, args=(index,), name=f"ray-on-{nodes[index]}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    @property
    def environ(self) -> dict[str, str]:
        """What a process needs to connect to this Ray."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        with self._lock:
            steps = list(self._steps.values())
        for step in steps:
            with suppress(OSError):  # it has ended
                assert step.stdin is not None
                step.stdin.close()
        deadline = time.monotonic() + _END_TIMEOUT_S
        for step in steps:
            try:
                step.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # of a node that does not answer; Slurm ends what is on it with the job
                step.kill()
                step.wait()
        for thread in self._threads:
            thread.join(_END_TIMEOUT_S)

    def _keep(self, index: int) -> None:
        """Run a node's step, and again if it has ended by itself, unless that happens again and again."""
        node = self._allocation.nodes[index]
        num_starts = 0
        while True:
            began_s = time.monotonic()
            if (code := self._run_step(index)) is None:
                return
            num_starts = 1 if time.monotonic() - began_s > _LONG_S else num_starts + 1
            log = f"see {self._log(node)}"
            if num_starts == _MAX_STARTS:
                return self._say(f"Ray on {node} has ended again ({code}) and stays away; {log}")
            self._say(f"Ray on {node} has ended ({code}) and is started again; {log}")
            if self._ending.wait(_PAUSE_S):
                return

    def _run_step(self, index: int) -> str | None:
        """How it has ended; None: we end."""
        node, order = self._allocation.nodes[index], self._order(index)
        with open(self._log(node), "ab") as log, self._lock:
            if self._ending.is_set():
                return None
            step = self._steps[node] = subprocess.Popen(
                _step_command(node, order.num_cpus), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True, env=_environ(os.environ, self.environ),
            )  # fmt: skip
        assert step.stdin is not None and step.stdout is not None
        with suppress(OSError):  # it has ended
            step.stdin.write(order.to_line())
            step.stdin.flush()
        for line in step.stdout:
            if line.strip() == STOP_LINE:
                self._on_stop()
        code = step.wait()
        return None if self._ending.is_set() else f"srun's exit code is {code}"

    def _order(self, index: int) -> NodeOrder:
        allocation = self._allocation
        memory = allocation.memory_mib
        return NodeOrder(
            node=allocation.nodes[index],
            head=self.address,
            is_head=index == 0,
            others=allocation.addresses[:index] + allocation.addresses[index + 1 :],
            first_port=allocation.first_port,
            num_cpus=allocation.cpus[index],
            memory_bytes=None if memory is None else int(memory * _MIB * _SHARE_FOR_RAY),
        )

    def _log(self, node: str) -> Path:
        return self._logs / f"ray-{node}.log"


STOP_LINE = "stop"
"""What a node prints when it has been told that the job is about to end."""


def _step_command(node: str, num_cpus: int) -> tuple[str, ...]:
    # --overlap: the controller uses the same CPUs. Newer versions of srun do not take over --cpus-per-task.
    return (
        "srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", f"--cpus-per-task={num_cpus}",
        "--unbuffered", "--kill-on-bad-exit=0", sys.executable, "-m", "distlm.slurm.node",
    )  # fmt: skip


def _environ(ours: Mapping[str, str], rays: Mapping[str, str]) -> dict[str, str]:
    """Of a step: what srun would take for options of its own is left out, but for what it needs."""
    dropped = ("RAY_ADDRESS", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_DISTRIBUTION")
    kept = {name: value for name, value in ours.items() if name not in dropped}
    return {**kept, **{name: value for name, value in rays.items() if name != "RAY_ADDRESS"}}


def _free_port(first: int) -> int:
    """The first port of the block that nobody has."""
    for port in range(first, first + NUM_HEAD_PORTS):
        if is_free(port):
            return port
    raise InfrastructureError(f"the ports {first} to {first + NUM_HEAD_PORTS - 1} of this node are all taken")
