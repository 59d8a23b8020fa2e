"""What living_nodes and places say of a real Ray cluster while its nodes come, are drained, and are killed; and what
an elastic run takes of this machine.

The driver is a process of its own: Ray ends the process that loses its head.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from place import Place, wait_until
from ray_cluster import DEADLINE_IN_S, START_TIMEOUT_S, RayCluster

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode
from distlm.processes import no_descendants_left
from distlm.run_status import run_status
from distlm.temporary import temporary_root

LOSS_IS_KNOWN_IN_S = 8.0
"""Ray's head takes 13 s for a node that was killed, and 62 s for one that is silent."""
DRAIN_IS_KNOWN_IN_S = 3.0
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


class Driver:
    """A process that is connected to a cluster, and asked what it sees of it."""

    def __init__(self, cluster: RayCluster, timeout_s: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address, str(timeout_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=cluster.environ, text=True,
        )  # fmt: skip

    def ask(self, *words: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):  # and not what Ray prints
                return json.loads(line.removeprefix("answer "))
        raise AssertionError("the driver has ended")


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    with temporary_root() as folder, no_descendants_left():
        yield RayCluster(folder)


def test_nodes_come_are_drained_and_are_killed(ray_cluster: RayCluster) -> None:
    driver = Driver(ray_cluster, timeout_s=8.0)
    assert driver.ask("places", "cpu", "1") == 2

    ray_cluster.add_node(3)
    wait_until(lambda: driver.ask("places", "cpu", "1") == 5, START_TIMEOUT_S, "a second node")
    assert driver.ask("places", "cpu", "2") == 2
    killed = ray_cluster.add_node(4, "--num-gpus=2")
    wait_until(lambda: driver.ask("places", "cuda", "1") == 2, START_TIMEOUT_S, "a third node")
    assert driver.ask("places", "cpu", "1") == 9

    (node,) = [node for node in driver.ask("nodes") if node["num_cpus"] == 3.0]
    assert driver.ask("hold", node["id"])
    ray_cluster.drain(node["id"])
    wait_until(lambda: driver.ask("places", "cpu", "1") == 6, DRAIN_IS_KNOWN_IN_S, "the drained node")
    (node,) = [node for node in driver.ask("nodes") if node["is_draining"]]
    assert node["num_cpus"] == 3.0 and 0 < node["drain_deadline_s"] - time.time() <= DEADLINE_IN_S

    killed.send_signal(signal.SIGSTOP)
    wait_until(lambda: driver.ask("places", "cpu", "1") == 2, LOSS_IS_KNOWN_IN_S, "the silent node")
    killed.send_signal(signal.SIGCONT)
    wait_until(lambda: driver.ask("places", "cpu", "1") == 6, LOSS_IS_KNOWN_IN_S, "the node again")
    killed.kill()
    wait_until(lambda: driver.ask("places", "cpu", "1") == 2, LOSS_IS_KNOWN_IN_S, "the killed node")
    assert len(driver.ask("nodes")) == 2

    ray_cluster.gcs.send_signal(signal.SIGSTOP)
    assert "has not answered in 8 s" in driver.ask("nodes")["error"]
    ray_cluster.gcs.send_signal(signal.SIGCONT)
    wait_until(lambda: driver.ask("places", "cpu", "1") == 2, START_TIMEOUT_S, "the head again")


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
