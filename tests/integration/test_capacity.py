"""What living_nodes and places say of a real Ray cluster while its nodes come, are drained, and are killed; and what
an elastic run takes of this machine.

The driver is a process of its own: Ray ends the process that loses its head.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from place import Place, wait_until

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode
from distlm.processes import descendants, no_descendants_left
from distlm.run_status import run_status
from distlm.temporary import temporary_root

START_TIMEOUT_S = 90.0
LOSS_IS_KNOWN_IN_S = 8.0
"""Ray's head takes 13 s for a node that was killed, and 62 s for one that is silent."""
DRAIN_IS_KNOWN_IN_S = 3.0
DEADLINE_IN_S = 600
DRIVER = """
import json, sys
from dataclasses import asdict
import ray
from distlm.controller import capacity
from distlm.errors import InfrastructureError

ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False, namespace="test")
capacity._TIMEOUT_S = float(sys.argv[2])
holders = []

@ray.remote(num_cpus=1)
class Holder:
    def is_there(self):
        return True

for line in sys.stdin:
    verb, *arguments = line.split()
    try:
        if verb == "hold":  # a node that is drained goes as soon as nothing runs on it
            affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(arguments[0], soft=False)
            holders.append(Holder.options(scheduling_strategy=affinity).remote())
            answer = ray.get(holders[-1].is_there.remote())
        elif verb == "nodes":
            answer = [asdict(node) for node in capacity.living_nodes()]
        else:
            answer = capacity.places(capacity.living_nodes(), arguments[0], int(arguments[1]))
    except InfrastructureError as error:
        answer = {"error": str(error)}
    print("answer " + json.dumps(answer), flush=True)
"""


class Ray:
    """A Ray cluster of nodes on this machine, and a driver that is connected to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environ |= {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0", "HOME": str(folder),
        }  # fmt: skip
        self._num_nodes = 0
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        head = self._start("--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false")
        self.gcs = wait_until(lambda: self._child(head, "gcs_server"), START_TIMEOUT_S, "Ray's head")
        host = next(part for part in self._command(self.gcs) if part.startswith("--node-ip-address="))
        self.address = f"{host.partition('=')[2]}:{port}"

    def _start(self, *arguments: str, num_cpus: int = 2) -> subprocess.Popen[Any]:
        self._num_nodes += 1
        with open(self._folder / f"node-{self._num_nodes}.log", "wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
                    f"--num-cpus={num_cpus}", f"--object-store-memory={100 * 2**20}", f"--memory={2**30}", *arguments,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environ,
            )  # fmt: skip
        return process

    def add_node(self, num_cpus: int, *arguments: str) -> psutil.Process:
        """The raylet of a new node."""
        node = self._start(f"--address={self.address}", *arguments, num_cpus=num_cpus)
        raylet: psutil.Process = wait_until(lambda: self._child(node, "raylet"), START_TIMEOUT_S, "a raylet")
        return raylet

    def _child(self, node: subprocess.Popen[Any], name: str) -> psutil.Process | None:
        assert node.poll() is None, sorted(path.read_text() for path in self._folder.glob("node-*.log"))
        return next(
            (c for c in descendants(psutil.Process(node.pid)) if self._command(c)[0].endswith(f"/{name}")), None
        )

    def _command(self, process: psutil.Process) -> list[str]:
        with suppress(psutil.Error):
            return process.cmdline() or [""]
        return [""]

    def connect(self, timeout_s: float) -> None:
        self._driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, self.address, str(timeout_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=self._environ, text=True,
        )  # fmt: skip

    def ask(self, *words: str) -> Any:
        assert self._driver.stdin is not None and self._driver.stdout is not None
        self._driver.stdin.write(" ".join(words) + "\n")
        self._driver.stdin.flush()
        for line in self._driver.stdout:
            if line.startswith("answer "):  # and not what Ray prints
                return json.loads(line.removeprefix("answer "))
        raise AssertionError("the driver has ended")

    def drain(self, node_id: str) -> None:
        subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}",
                f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test",
                f"--deadline-remaining-seconds={DEADLINE_IN_S}",
            ],
            env=self._environ, check=True, capture_output=True,
        )  # fmt: skip


@pytest.fixture
def ray_cluster() -> Iterator[Ray]:
    with temporary_root() as folder, no_descendants_left():
        yield Ray(folder)


def test_nodes_come_are_drained_and_are_killed(ray_cluster: Ray) -> None:
    ray_cluster.connect(timeout_s=8.0)
    assert ray_cluster.ask("places", "cpu", "1") == 2

    ray_cluster.add_node(3)
    wait_until(lambda: ray_cluster.ask("places", "cpu", "1") == 5, START_TIMEOUT_S, "a second node")
    assert ray_cluster.ask("places", "cpu", "2") == 2
    killed = ray_cluster.add_node(4, "--num-gpus=2")
    wait_until(lambda: ray_cluster.ask("places", "cuda", "1") == 2, START_TIMEOUT_S, "a third node")
    assert ray_cluster.ask("places", "cpu", "1") == 9

    (node,) = [node for node in ray_cluster.ask("nodes") if node["num_cpus"] == 3.0]
    assert ray_cluster.ask("hold", node["id"])
    ray_cluster.drain(node["id"])
    wait_until(lambda: ray_cluster.ask("places", "cpu", "1") == 6, DRAIN_IS_KNOWN_IN_S, "the drained node")
    (node,) = [node for node in ray_cluster.ask("nodes") if node["is_draining"]]
    assert node["num_cpus"] == 3.0 and 0 < node["drain_deadline_s"] - time.time() <= DEADLINE_IN_S

    killed.send_signal(signal.SIGSTOP)
    wait_until(lambda: ray_cluster.ask("places", "cpu", "1") == 2, LOSS_IS_KNOWN_IN_S, "the silent node")
    killed.send_signal(signal.SIGCONT)
    wait_until(lambda: ray_cluster.ask("places", "cpu", "1") == 6, LOSS_IS_KNOWN_IN_S, "the node again")
    killed.kill()
    wait_until(lambda: ray_cluster.ask("places", "cpu", "1") == 2, LOSS_IS_KNOWN_IN_S, "the killed node")
    assert len(ray_cluster.ask("nodes")) == 2

    ray_cluster.gcs.send_signal(signal.SIGSTOP)
    assert "has not answered in 8 s" in ray_cluster.ask("nodes")["error"]
    ray_cluster.gcs.send_signal(signal.SIGCONT)
    wait_until(lambda: ray_cluster.ask("places", "cpu", "1") == 2, START_TIMEOUT_S, "the head again")


def test_on_this_machine_an_elastic_run_takes_the_largest_size_that_fits(tmp_path: Path) -> None:
    place = Place(tmp_path / "place")
    steps = ("training.max_steps=2", "training.warmup_steps=0", "training.eval_steps=null", "tracking.report_to=[]")
    command = place.start("submit", "run.yaml", "resources.num_workers=[1,16]", *steps)
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    expected = max(size for size in (1, 2, 4) if size <= len(os.sched_getaffinity(0)))  # of 4 micro batches
    assert f"starting {expected} workers on cpu" in command.out
    store = CheckpointStore(command.run.checkpoints)
    assert store.manifest(store.checkpoints()[0]).world_size == expected
    (attempt,) = run_status(command.run).attempts
    assert attempt.num_workers == [1, 16]
