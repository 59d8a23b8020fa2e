"""How many workers fit on the nodes of a cluster, and which number of workers follows."""

from __future__ import annotations

import socket
import threading

import pytest

from distlm.controller.capacity import Node, _in_time, answers, choose_world_size, places
from distlm.errors import InfrastructureError


def node(num_cpus: float, num_gpus: float = 0.0, is_draining: bool = False) -> Node:
    return Node(f"{num_cpus}-{num_gpus}", "host", num_cpus, num_gpus, is_draining)


@pytest.mark.parametrize(
    ("nodes", "device", "cpus_per_worker", "expected"),
    [
        ([], "cpu", 1, 0),
        ([node(4), node(3)], "cpu", 1, 7),
        ([node(4), node(3)], "cpu", 2, 3),  # a worker has its cores on one node
        ([node(1.5), node(0)], "cpu", 1, 1),
        ([node(4), node(8, is_draining=True)], "cpu", 1, 4),
        ([node(16, num_gpus=4), node(16)], "cuda", 2, 4),
        ([node(3, num_gpus=4)], "cuda", 1, 3),  # each needs a core, too
        ([node(16, num_gpus=4), node(16, num_gpus=4, is_draining=True)], "cuda", 1, 4),
        ([node(16, num_gpus=4)], "cpu", 4, 4),
    ],
)
def test_places(nodes: list[Node], device: str, cpus_per_worker: int, expected: int) -> None:
    assert places(nodes, device, cpus_per_worker) == expected


@pytest.mark.parametrize(
    ("places", "expected"), [(0, None), (1, None), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (100, 8)]
)  # fmt: skip
def test_the_largest_possible_size_that_fits_is_chosen(places: int, expected: int | None) -> None:
    assert choose_world_size([2, 4, 8], places) == expected


def test_a_head_that_does_not_answer_does_not_hang_the_caller() -> None:
    answers = threading.Event()
    try:
        with pytest.raises(InfrastructureError, match="has not answered in 0 s"):
            _in_time(answers.wait, timeout_s=0.05)
    finally:
        answers.set()
    assert _in_time(lambda: 3, timeout_s=60.0) == 3


def test_an_error_of_ray_is_one_of_the_infrastructure() -> None:
    def ask() -> None:
        raise ConnectionError("no route")

    with pytest.raises(InfrastructureError, match="does not answer: no route"):
        _in_time(ask, timeout_s=60.0)


def test_a_node_that_is_killed_or_silent_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not answers("127.0.0.1", port, timeout_s=0.1), (
            "the kernel takes connections for a process that is stopped"
        )

        def hang_up() -> None:
            for _ in range(2):
                server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert answers("127.0.0.1", port, timeout_s=60.0)
        thread.join()
    assert not answers("127.0.0.1", port, timeout_s=60.0)
