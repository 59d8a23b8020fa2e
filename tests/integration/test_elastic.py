"""A run follows the nodes of its cluster: 1 worker, 3, 2 and 1 again, by nodes that come, are killed and are drained;
and its losses are those of a run on one worker that nothing has happened to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_runs import SETTINGS, losses, make_place, require_each_step_once, wait_for_steps
from hosts import Host
from place import START_TIMEOUT_S, Place, wait_until
from ray_cluster import RayCluster

from distlm.errors import ExitCode
from distlm.processes import no_descendants_left
from distlm.run_folder import read_json
from distlm.temporary import temporary_root


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    with temporary_root() as folder, no_descendants_left():
        yield RayCluster(folder, num_cpus=1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path / "place")


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("no", 5e-5), pytest.param("bf16", 5e-3, marks=pytest.mark.nightly)]
)
def test_1_3_2_1_workers_by_nodes_that_come_and_go(
    place: Place, ray_cluster: RayCluster, precision: str, tolerance: float
) -> None:
    settings = (*SETTINGS, f"training.mixed_precision={precision}", "training.max_steps=3000")
    place.environ |= ray_cluster.environ_of_driver
    command = place.start("submit", "run.yaml", *settings, "resources.num_workers=[1,3]")
    wait_for_steps(command, 1, 10)
    killed, drained = ray_cluster.add_node(1), ray_cluster.add_node(1)
    wait_for_steps(command, 3, 10)
    killed.kill()
    wait_for_steps(command, 2, 10)
    ray_cluster.drain(ray_cluster.node_id(drained))
    wait_until(lambda: command.out.count("starting 1 worker") == 2, START_TIMEOUT_S, "one worker again")
    wait_for_steps(command, 1, 10)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == ExitCode.PREEMPTED, (command.out, command.err)

    result = read_json(command.run.attempts()[-1].result_json)
    assert [retry["cause"] for retry in result["retries"]] == ["node lost"]
    assert "nodes have come: the workers save, and 3 go on in place of 1" in command.out
    assert "Ray drains" in command.out and "1 go on in place of 2" in command.out
    found = require_each_step_once(place, command.run)
    last_step = max(found)

    for name in ray_cluster.environ_of_driver:
        del place.environ[name]
    straight = place.start("submit", "run.yaml", *settings, f"training.max_steps={last_step}", "tracking.report_to=[]")
    assert straight.wait() == ExitCode.SUCCEEDED, straight.err
    assert found == pytest.approx(losses(straight.run), rel=tolerance)


@pytest.mark.skipif(os.getuid() != 0, reason="a folder can be hidden from a node by root only")
def test_a_node_that_does_not_share_the_folder_is_not_used(place: Place, ray_cluster: RayCluster) -> None:
    place.environ |= ray_cluster.environ_of_driver
    command = place.start("submit", "run.yaml", *SETTINGS, "training.max_steps=3000", "resources.num_workers=[1,2]")
    wait_for_steps(command, 1, 1)
    hide = f'mount -t tmpfs tmpfs {place.folder}; exec "$@"'
    address = ray_cluster.address.partition(":")[0]
    ray_cluster.add_node(2, host=Host(address, ("unshare", "--mount", "sh", "-c", hide, "sh")))
    command.wait_for(f"warning: a node is not used: every node must share {place.runs_dir}, but ")
    ray_cluster.add_node(1)
    wait_for_steps(command, 2, 10)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == ExitCode.PREEMPTED, (command.out, command.err)
    assert read_json(command.run.attempts()[-1].result_json)["retries"] == []
    require_each_step_once(place, command.run)
