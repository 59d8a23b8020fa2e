"""Ray for one attempt: one started here for it and removed after it, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from distlm.config.schema import ResourcesConfig
from distlm.controller.capacity import Node, answers, choose_world_size, living_nodes
from distlm.controller.cluster_watch import ClusterWatch
from distlm.controller.fitness import NodeFitness
from distlm.devices import visible_gpu_count
from distlm.errors import InfrastructureError, RayLostError
from distlm.limits import available_cpus
from distlm.processes import descendants, end_processes, kill_processes
from distlm.ray_settings import OBJECT_STORE_BYTES, OF_EVERY_NODE, without_extras
from distlm.run_folder import NUM_OWN_NODES, REPLACES_NODES
from distlm.stop_count import signals_held

_OWN_NODES_TIMEOUT_S, _LOOK_INTERVAL_S = 120.0, 0.2
_HELPER_CPUS = 1  # for the tasks that prepare and export

# Ray Train notices a dead worker at its next poll; its default of 2 s is also the least that every end of a run costs.
_RAY_SETTINGS = {
    **OF_EVERY_NODE,
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers are asked for where there is room for them: who waits longer has seen a node that is gone by now, or waits
    # for others' use of it to end, and asks anew.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # A worker process that does not answer; our own watchdog is earlier, unless its host is gone.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # Nodes that are drained are looked for by our own loop, which knows how to go on without them.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A Ray that the controller is connected to."""

    device: str
    """What workers compute on: cpu or cuda."""
    cpus_per_worker: int
    fitness: NodeFitness
    """Knows which nodes may have workers."""
    logs: Path | None = None
    """Ray's own logs, where they vanish with the cluster; None: they stay on the cluster."""
    processes: Sequence[psutil.Process] = ()
    """Those of Ray that it cannot do without, where they were started here."""
    watch: ClusterWatch | None = None
    """Of a cluster that was joined, whose nodes come and go."""
    spreads_workers: bool = False
    """Its nodes are for this attempt alone, and each is to have some of the workers."""
    replaces_nodes: bool = False
    """A node that leaves is replaced by another one."""

    @property
    def needs_of_worker(self) -> str:
        """What each worker is given, in words."""
        return f"{self.cpus_per_worker} CPU{' and 1 GPU' if self.device == 'cuda' else ''}"

    def unfit_nodes(self) -> list[str]:
        """Where no worker is to be: nodes that are not fit, or do not answer."""
        return self.fitness.unfit() + (self.watch.missing() if self.watch else [])

    def require_alive(self) -> None:
        """Raises RayLostError where Ray has lost what it cannot do without."""
        if self.watch:
            self.watch.require_head()
        for process in self.processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise RayLostError(f"Ray's {process.name()} has ended (killed or crashed)")


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
def connect(
    resources: ResourcesConfig,
    possible: Sequence[int],
    run_folder: Path,
    temporary_root: Path | None,
    while_waiting: Callable[[], None] = lambda: None,
) -> Iterator[Cluster]:
    """Connect to RAY_ADDRESS, or start Ray below `temporary_root` and end all of its processes afterwards. `possible`:
    the numbers of workers that `resources` allow; Ray is started for the largest that this machine has room for. Nodes
    are to share `run_folder`. `while_waiting` is called again and again while nodes are not there yet."""
    os.environ.update(_RAY_SETTINGS)
    with closing(NodeFitness(run_folder, resources.network_interface)) as fitness:
        if address := os.environ.get("RAY_ADDRESS"):
            num_own_nodes = int(os.environ.get(NUM_OWN_NODES, 0))
            if num_own_nodes:
                _wait_for_head(address, while_waiting)
            yield from _join(resources, fitness, address, num_own_nodes, while_waiting)
        else:
            assert temporary_root is not None
            yield from _start(resources, possible, fitness, temporary_root)


def _wait_for_head(address: str, while_waiting: Callable[[], None]) -> None:
    """Until it listens: Ray itself gives up sooner. Raises InfrastructureError."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _OWN_NODES_TIMEOUT_S
    while not answers(host, int(port)):
        while_waiting()
        if time.monotonic() > deadline:
            raise InfrastructureError(f"Ray's head at {address} has not come up in {_OWN_NODES_TIMEOUT_S:.0f} s")
        time.sleep(_LOOK_INTERVAL_S)


def _join(
    resources: ResourcesConfig,
    fitness: NodeFitness,
    address: str,
    num_own_nodes: int,
    while_waiting: Callable[[], None],
) -> Iterator[Cluster]:
    import ray

    try:
        with _own_signal_handlers():
            ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="distlm")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InfrastructureError(f"cannot connect to the Ray cluster at RAY_ADDRESS = {address}: {error}") from error
    watch = None
    try:
        own_nodes: Sequence[Node] = ()
        if num_own_nodes:
            own_nodes = _wait_for_nodes(num_own_nodes, not resources.is_elastic, while_waiting)
        watch = ClusterWatch(fitness)
        total = ray.cluster_resources()
        device = resources.device
        if device == "auto":
            device = "cuda" if total.get("GPU", 0) > 0 else "cpu"
        if own_nodes and not resources.is_elastic:
            share = share_of_cpus([node.num_cpus for node in own_nodes], resources.world_size)
        elif device == "cuda" or resources.is_elastic:  # whose share would depend on the nodes that there are now
            share = 1
        else:
            share = max(1, int((total.get("CPU", 1) - _HELPER_CPUS) // resources.world_size))
        cpus_per_worker = resources.cpus_per_worker or share
        yield Cluster(
            device, cpus_per_worker, fitness, watch=watch,
            spreads_workers=num_own_nodes > 0, replaces_nodes=REPLACES_NODES in os.environ,
        )  # fmt: skip
    finally:
        if watch:
            watch.close()
        ray.shutdown()


def _wait_for_nodes(count: int, is_least: bool, while_waiting: Callable[[], None]) -> Sequence[Node]:
    """Those that have come. Raises InfrastructureError where fewer do in time, unless the run may do with them."""
    deadline = time.monotonic() + _OWN_NODES_TIMEOUT_S
    while len(nodes := living_nodes()) < count:
        while_waiting()
        if time.monotonic() > deadline:
            if not is_least:
                break
            raise InfrastructureError(
                f"{len(nodes)} of {count} Ray nodes have come up in {_OWN_NODES_TIMEOUT_S:.0f} s, on "
                f"{', '.join(node.host for node in nodes) or 'no host'}; see the others' ray-NODE.log beside this log"
            )
        time.sleep(_LOOK_INTERVAL_S)
    return nodes


def share_of_cpus(cpus: Sequence[float], num_workers: int) -> int:
    """The most CPUs per worker with which so many workers fit on nodes that have these numbers of CPUs; 1 at least."""
    share = max(1, int(sum(cpus) // num_workers))
    while share > 1 and sum(int(each // share) for each in cpus) < num_workers:
        share -= 1
    return share


def _start(
    resources: ResourcesConfig, possible: Sequence[int], fitness: NodeFitness, temporary_root: Path
) -> Iterator[Cluster]:
    os.environ.update(
        {
            # Ray looks for a running cluster below its default temp root, where other runs may have left stale files.
            "RAY_TMPDIR": str(temporary_root),
            # By a strange name: a node's address is loopback. Every process of this Ray is on this machine.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Otherwise Ray makes a token of its own and writes it to the home folder.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    )
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # its sockets, between the workers
    import ray

    without_extras()
    cores = available_cpus()
    gpus = visible_gpu_count()
    if gpus is None:
        gpus = _count_gpus_with_torch()
    device = resources.device if resources.device != "auto" else ("cuda" if gpus else "cpu")
    room = gpus if device == "cuda" else cores // (resources.cpus_per_worker or 1)
    num_workers = choose_world_size(possible, room) or possible[0]  # on CPUs workers may share cores
    cpus_per_worker = resources.cpus_per_worker or max(1, cores // num_workers)
    others = psutil.Process().children(recursive=True)
    try:
        # What is sent to all processes of a run must not end its workers, nor the Ray that they need, before they have
        # saved. Ray's processes keep what is blocked while they start; its handlers for SIGTERM would end them at once.
        with _own_signal_handlers(), signals_held():
            ray.init(
                num_cpus=num_workers * cpus_per_worker,
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                namespace="distlm",
            )
    except Exception as error:  # whatever Ray raises, the attempt has no cluster
        _stop_ray(others)
        raise InfrastructureError(f"Ray did not start on this machine: {error}") from error
    try:
        logs = temporary_root / "ray" / "session_latest" / "logs"
        yield Cluster(device, cpus_per_worker, fitness, logs, _vital_processes(others))
    finally:
        _stop_ray(others)


def _vital_processes(others: list[psutil.Process]) -> list[psutil.Process]:
    children = [child for child in psutil.Process().children(recursive=True) if child not in others]
    return [child for child in children if child.name() in ("gcs_server", "raylet")]


def _stop_ray(others: list[psutil.Process]) -> None:
    """End Ray and all that it has started: every child of the controller but `others`, which were there before, and
    what those have started."""
    import ray
    from ray._private import worker

    kept = {*others, *(child for process in others if process.is_running() for child in descendants(process))}
    processes = [process for process in descendants(psutil.Process()) if process not in kept]
    daemons = [process for process in descendants(psutil.Process(), recursive=False) if process not in kept]
    workers = [process for daemon in daemons for process in descendants(daemon, recursive=False)]
    if (node := worker._global_node) is not None:
        node.kill_all_processes = lambda **_: None  # by SIGTERM, which they do not get: a second for each
    ray.shutdown()
    kill_processes([*daemons, *workers])
    end_processes(processes)  # what workers have started ends by itself, and a resource tracker cleans up before


def _count_gpus_with_torch() -> int:
    import torch

    return torch.cuda.device_count()
