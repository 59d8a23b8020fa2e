"""What the cluster has room for: its nodes, how many workers fit on them, and which number of workers follows."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from distlm.errors import InfrastructureError

_TIMEOUT_S = 10.0
_NODE_TIMEOUT_S = 2.0
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client of gRPC sends first; the server answers in the same way, whoever asks."""
_MAX_THREADS = 32
_T = TypeVar("_T")


@dataclass(frozen=True)
class Node:
    """A node of the cluster that the controller is connected to."""

    id: str
    host: str
    num_cpus: float
    """All that the node has, whoever uses them."""
    num_gpus: float
    is_draining: bool = False
    """It is to go, and Ray places nothing new on it. It is alive until then."""
    drain_deadline_s: float | None = None
    """Until when it stays, in seconds since the epoch. None: it does not leave, or no time was given."""


def living_nodes() -> list[Node]:
    """Every node that is alive, those that are draining included. Raises InfrastructureError if the head is silent.

    Ray's head believes in a node that was killed for 13 s, and in one that is silent for 62 s (2.60, with its own
    settings). So each is asked itself, by the port that every node of a cluster must reach.
    """
    return _in_time(_living_nodes, _TIMEOUT_S)


def _living_nodes() -> list[Node]:
    import ray

    # Ray has no public function for it; its own trainer and its data library ask in the same way. It tells no reason.
    draining: dict[str, int] = ray._private.state.state.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(_MAX_THREADS) as threads:
        reached = list(threads.map(lambda node: answers(node["NodeManagerAddress"], node["NodeManagerPort"]), nodes))
    return [
        Node(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"].get("GPU", 0.0),
            is_draining=node["NodeID"] in draining,
            drain_deadline_s=draining.get(node["NodeID"], 0) / 1000 or None,
        )
        for node, is_there in zip(nodes, reached, strict=True)
        if is_there
    ]


def answers(host: str, port: int, timeout_s: float = _NODE_TIMEOUT_S) -> bool:
    """Whether a server of gRPC reacts: with its greeting, or by hanging up, as one with TLS does."""
    try:
        with socket.create_connection((host, port), timeout_s) as connection, suppress(ConnectionError):
            connection.sendall(_HTTP2_GREETING)
            connection.recv(1)
        return True
    except OSError:
        return False


def _in_time(ask: Callable[[], _T], timeout_s: float) -> _T:
    """The answer of `ask`, which waits for a head that is gone as long as Ray does, and that is minutes."""
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # noqa: BLE001 - carried over to the caller's thread
            answer.set_exception(error)

    threading.Thread(target=run, name="ask-ray", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except TimeoutError:
        raise InfrastructureError(f"the head of the Ray cluster has not answered in {timeout_s:.0f} s") from None
    except Exception as error:
        raise InfrastructureError(f"the head of the Ray cluster does not answer: {error}") from error


def places(nodes: Sequence[Node], device: str, cpus_per_worker: int) -> int:
    """How many workers fit on the nodes that stay.

    Counted is what the nodes have, not what is free: Ray tells what is in use, and not by whom, so that between two
    worker groups, when the old one is still being removed, what is free would be too little. What others use on a
    shared cluster counts as ours, and workers that find no room there wait for it.
    """
    return sum(
        min(int(node.num_cpus // cpus_per_worker), int(node.num_gpus) if device == "cuda" else 2**31)
        for node in nodes
        if not node.is_draining
    )


def free_nodes(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with what is free on them now. Raises InfrastructureError if the head is silent."""
    import ray

    free: dict[str, dict[str, float]] = _in_time(ray._private.state.available_resources_per_node, _TIMEOUT_S)

    def of(node: Node, resource: str) -> float:
        return free.get(node.id, {}).get(resource, 0.0)

    return [replace(node, num_cpus=of(node, "CPU"), num_gpus=of(node, "GPU")) for node in nodes]


def choose_world_size(possible: Sequence[int], places: int) -> int | None:
    """The largest of the possible numbers of workers that there are places for; None: there are too few for any."""
    return max((size for size in possible if size <= places), default=None)


def on_node(node_id: str) -> Any:
    """The scheduling strategy of a task or an actor that is to be on that node and on no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def on_this_node() -> Any:
    """Where an actor is to be that must not go with another node."""
    import ray

    return on_node(ray.get_runtime_context().get_node_id())
