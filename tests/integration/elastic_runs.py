"""Runs whose number of workers follows the nodes that there are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from place import CONFIG, START_TIMEOUT_S, Command, Place, wait_until

from distlm.run_folder import RunFolder
from distlm.tracking.records import read_metrics

SETTINGS = (
    "training.global_train_batch_size=12", "training.per_device_train_batch_size=2", "training.logging_steps=1",
    "training.save_steps=20", "training.eval_steps=null", "resources.cpus_per_worker=1",
    "training.learning_rate=1e-3",  # at higher ones rounding grows: the gradient has spikes
)  # fmt: skip


def make_place(folder: Path) -> Place:
    """With a model that has dropout."""
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    config["model"]["config"] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return Place(folder, config)


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


def require_each_step_once(place: Place, run: RunFolder) -> dict[int, float]:
    """The losses by step, of which the file and MLflow have one for each."""
    found = losses(run)
    assert sorted(found) == list(range(1, max(found) + 1))
    points = place.client.get_metric_history(place.mlflow_run(run).info.run_id, "train/loss")
    assert sorted(point.step for point in points) == sorted(found)
    return found
