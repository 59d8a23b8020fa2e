"""A run follows the nodes of its cluster: 1 worker, 3, 2 and 1 again, by nodes that come, are killed and are drained;
and its losses are those of a run on one worker that nothing has happened to."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from place import CONFIG, START_TIMEOUT_S, Command, Place, wait_until
from ray_cluster import RayCluster

from distlm.errors import ExitCode
from distlm.processes import no_descendants_left
from distlm.run_folder import RunFolder, read_json
from distlm.temporary import temporary_root
from distlm.tracking.records import read_metrics

SETTINGS = (
    "training.global_train_batch_size=12", "training.per_device_train_batch_size=2", "training.logging_steps=1",
    "training.save_steps=20", "training.eval_steps=null", "resources.cpus_per_worker=1",
    "training.learning_rate=1e-3",  # at higher ones rounding grows: the gradient has spikes
)  # fmt: skip


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    with temporary_root() as folder, no_descendants_left():
        yield RayCluster(folder, num_cpus=1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    config["model"]["config"] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return Place(tmp_path / "place", config)


def losses(run: RunFolder) -> dict[int, float]:
    return {r.step: r.values["train/loss"] for r in read_metrics(run) if "train/loss" in r.values}


def wait_for_steps(command: Command, num_workers: int, count: int) -> None:
    """Wait until the newest incarnation has that many workers and has done so many steps."""
    command.wait_for(f"starting {num_workers} worker")
    before = max(losses(command.run), default=0)
    wait_until(
        lambda: command.process.poll() is not None or max(losses(command.run), default=0) >= before + count,
        START_TIMEOUT_S, f"{count} steps on {num_workers} workers",
    )  # fmt: skip
    assert command.process.poll() is None, (command.out, command.err)


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
    found = losses(command.run)
    last_step = max(found)
    assert sorted(found) == list(range(1, last_step + 1))
    points = place.client.get_metric_history(place.mlflow_run(command.run).info.run_id, "train/loss")
    assert sorted(point.step for point in points) == sorted(found)

    for name in ray_cluster.environ_of_driver:
        del place.environ[name]
    straight = place.start("submit", "run.yaml", *settings, f"training.max_steps={last_step}", "tracking.report_to=[]")
    assert straight.wait() == ExitCode.SUCCEEDED, straight.err
    assert found == pytest.approx(losses(straight.run), rel=tolerance)
