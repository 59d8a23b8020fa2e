"""One Ray node of a job: `srun python -m distlm.slurm.node`.

A line on standard input says what it is to be (`distlm.slurm.ray_nodes.NodeOrder`). When the input ends, the node ends
at once with all that it has started, and leaves no file behind. What asks it to stop ends nothing: the workers on it
are to save; it is told to the job.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import psutil

from distlm.devices import visible_gpu_count
from distlm.processes import adopt_orphans, descendants, kill_processes
from distlm.ray_settings import OBJECT_STORE_BYTES, OF_EVERY_NODE, without_extras
from distlm.slurm.allocation import NUM_HEAD_PORTS, PORTS_PER_JOB, is_free, own_address
from distlm.slurm.ray_nodes import STOP_LINE, NodeOrder
from distlm.stop_count import STOP_SIGNALS
from distlm.temporary import temporary_root

_HEAD_TIMEOUT_S, _LOOK_INTERVAL_S = 120.0, 0.1
_MAX_GENERATIONS = 4


def main() -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # for Ray's processes, too, which inherit it
    os.environ.update(OF_EVERY_NODE)
    adopt_orphans()
    threading.Thread(target=_tell_of_signals, name="signals", daemon=True).start()
    with temporary_root() as folder:
        os.environ["RAY_TMPDIR"] = str(folder)
        without_extras()
        from ray.scripts import scripts  # takes 3 s, in which the job may write its line

        order = NodeOrder.from_line(sys.stdin.readline())
        threading.Thread(target=_end_with_input, args=(folder,), name="end-with-input", daemon=True).start()
        if not order.is_head:
            _wait_for_head(order.head)
        try:
            # In this thread: Ray's processes are killed by the kernel when it ends.
            scripts.start.main(_arguments(order, folder), standalone_mode=False)
        finally:
            _end(folder, 1)


def _arguments(order: NodeOrder, folder: Path) -> list[str]:
    """Of `ray start`. Ray would take all CPUs and all the memory of the machine, whatever the job has of it."""
    head, _, port = order.head.rpartition(":")
    if order.is_head:
        what = ["--head", f"--port={port}", f"--node-ip-address={head}", "--include-dashboard=false"]
    else:
        what = [f"--address={order.head}", f"--node-ip-address={own_address(order.others)}"]
    if order.memory_bytes is not None:
        what.append(f"--memory={order.memory_bytes}")
    if (num_gpus := visible_gpu_count()) is not None:
        what.append(f"--num-gpus={num_gpus}")
    return [
        *what, *_ports(order.first_port), f"--num-cpus={order.num_cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}", "--disable-usage-stats", "--block",
    ]  # fmt: skip


def _ports(first_of_block: int) -> list[str]:
    """All from the job's block; where somebody has some of it, Ray looks for free ones itself."""
    names = (
        "node-manager-port", "object-manager-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port",
        "runtime-env-agent-port", "metrics-export-port",
    )  # fmt: skip
    first, end = first_of_block + NUM_HEAD_PORTS, first_of_block + PORTS_PER_JOB
    if not all(is_free(port) for port in range(first, end)):
        return ["--min-worker-port=0", "--max-worker-port=0"]
    numbered = [f"--{name}={first + number}" for number, name in enumerate(names)]
    return [*numbered, f"--min-worker-port={first + len(names)}", f"--max-worker-port={end - 1}"]


def _wait_for_head(address: str) -> None:
    """Until it listens: `ray start` gives up sooner. Raises TimeoutError."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _HEAD_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_LOOK_INTERVAL_S * 10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Ray's head at {address} does not answer: {error}") from None
        time.sleep(_LOOK_INTERVAL_S)


def _tell_of_signals() -> None:
    while True:
        signal.sigwait(STOP_SIGNALS)
        print(STOP_LINE, flush=True)


def _end_with_input(folder: Path) -> None:
    sys.stdin.read()
    _end(folder, 0)


def _end(folder: Path, code: int) -> NoReturn:
    """At once, without what `ray start` would do: it asks its processes to end, which they do not hear."""
    for _ in range(_MAX_GENERATIONS):  # what is killed may leave children
        if found := descendants(psutil.Process()):
            kill_processes(found)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


if __name__ == "__main__":
    main()
