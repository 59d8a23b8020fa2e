"""Ray for one attempt: one started here for it and removed after it, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from distlm.config.schema import ResourcesConfig
from distlm.devices import visible_gpu_count
from distlm.errors import InfrastructureError
from distlm.processes import descendants, end_processes

_OBJECT_STORE_BYTES = 100 * 2**20  # distlm sends no data through Ray's object store; Ray's own minimum is 75 MiB
_HELPER_CPUS = 1  # for the tasks that prepare and export

# Ray Train notices a dead worker at its next poll; its default of 2 s is also the least that every end of a run costs.
_RAY_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A thread that is late, when Ray has been shut down, would start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A Ray that the controller is connected to."""

    device: str
    """What workers compute on: cpu or cuda."""
    cpus_per_worker: int
    logs: Path | None = None
    """Ray's own logs, where they vanish with the cluster; None: they stay on the cluster."""


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the handlers that `ray.init` replaces: its own for SIGTERM would end the controller at once."""
    from ray._private import utils

    set_sigterm_handler = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_sigterm_handler
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def connect(resources: ResourcesConfig, temporary_root: Path | None) -> Iterator[Cluster]:
    """Connect to RAY_ADDRESS, or start Ray below `temporary_root` and end all of its processes afterwards."""
    os.environ.update(_RAY_SETTINGS)
    if address := os.environ.get("RAY_ADDRESS"):
        yield from _join(resources, address)
    else:
        assert temporary_root is not None
        yield from _start(resources, temporary_root)


def _join(resources: ResourcesConfig, address: str) -> Iterator[Cluster]:
    import ray

    try:
        with _own_signal_handlers():
            ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="distlm")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InfrastructureError(f"cannot connect to the Ray cluster at RAY_ADDRESS = {address}: {error}") from error
    try:
        total = ray.cluster_resources()
        device = resources.device
        if device == "auto":
            device = "cuda" if total.get("GPU", 0) > 0 else "cpu"
        share = max(1, int((total.get("CPU", 1) - _HELPER_CPUS) // resources.num_workers))
        yield Cluster(device, resources.cpus_per_worker or (1 if device == "cuda" else share))
    finally:
        ray.shutdown()


def _start(resources: ResourcesConfig, temporary_root: Path) -> Iterator[Cluster]:
    os.environ.update(
        {
            # Ray looks for a running cluster below its default temp root, where other runs may have left stale files.
            "RAY_TMPDIR": str(temporary_root),
            # By a strange name: a node's address is loopback. Every process of this Ray is on this machine.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Otherwise Ray makes a token of its own and writes it to the home folder.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Ray's default of 15 lets every other process here starve the workers; those of torchrun have 0.
            "RAY_worker_niceness": "0",
            # Nobody drains the one node of a Ray that ends with this run; watching for it is a process of its own.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        }
    )
    for library in ("GLOO", "NCCL"):  # their sockets, between the workers
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    import ray

    cores = len(os.sched_getaffinity(0))
    gpus = visible_gpu_count()
    if gpus is None:
        gpus = _count_gpus_with_torch()
    device = resources.device if resources.device != "auto" else ("cuda" if gpus else "cpu")
    cpus_per_worker = resources.cpus_per_worker or max(1, cores // resources.num_workers)
    others = psutil.Process().children(recursive=True)
    try:
        with _own_signal_handlers():
            ray.init(
                num_cpus=resources.num_workers * cpus_per_worker,
                num_gpus=gpus,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                namespace="distlm",
            )
    except Exception as error:  # whatever Ray raises, the attempt has no cluster
        _stop_ray(others)
        raise InfrastructureError(f"Ray did not start on this machine: {error}") from error
    try:
        yield Cluster(device, cpus_per_worker, temporary_root / "ray" / "session_latest" / "logs")
    finally:
        _stop_ray(others)


def _stop_ray(others: list[psutil.Process]) -> None:
    """End Ray and all that it has started: every child of the controller but `others`, which were there before, and
    what those have started."""
    import ray

    kept = {*others, *(child for process in others if process.is_running() for child in descendants(process))}
    processes = [process for process in descendants(psutil.Process()) if process not in kept]
    ray.shutdown()
    end_processes(processes)


def _count_gpus_with_torch() -> int:
    import torch

    return torch.cuda.device_count()


def node_addresses() -> list[dict[str, Any]]:
    """Ray's description of each living node."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
