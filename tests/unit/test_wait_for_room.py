"""A run waits for what others use of a cluster, and says so; what workers share of nodes that are theirs alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from distlm.controller import attempt
from distlm.controller.attempt import AttemptController
from distlm.controller.capacity import Node
from distlm.controller.cluster import Cluster, share_of_cpus
from distlm.controller.stop import StopRequest
from distlm.errors import InfrastructureError, Preempted

NODES = [Node(name, f"host-{name}", 4.0, 0.0) for name in "ab"]


class Scene:
    """A controller in front of two nodes with four CPUs each, of which `free` are free at each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, possible: list[int], free: list[float]) -> None:
        self.now_s, self.said, self.free = 0.0, [], free
        self.nodes = NODES
        self.controller = AttemptController.__new__(AttemptController)
        self.controller.stop = StopRequest()
        self.controller.progress = SimpleNamespace(say=self.said.append)  # type: ignore[assignment]
        self.controller.config = SimpleNamespace(recovery=SimpleNamespace(start_timeout_s=600.0))  # type: ignore[assignment]
        self.controller._possible_sizes, self.controller._has_begun = possible, False
        self.controller._when = lambda: "here"  # type: ignore[method-assign]
        watch: Any = SimpleNamespace(nodes=NODES, look=self._look, new_problems=list, require_head=lambda: None)
        nothing: Any = None
        self.cluster: Any = Cluster("cpu", 1, fitness=nothing, watch=watch)
        monkeypatch.setattr(attempt, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep))
        monkeypatch.setattr(attempt, "free_nodes", self._free_nodes)

    def _look(self) -> None:
        self.cluster.watch.nodes = self.nodes

    def _sleep(self, seconds: float) -> None:
        self.now_s += 100 * seconds  # each look is 50 s after the one before

    def _free_nodes(self, nodes: list[Node]) -> list[Node]:
        left = self.free.pop(0) if len(self.free) > 1 else self.free[0]
        return [replace(node, num_cpus=left / len(nodes)) for node in nodes]

    def wait(self) -> int:
        return self.controller._wait_for_room(self.cluster)


def test_what_is_free_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [8], [8.0])
    assert (scene.wait(), scene.now_s, scene.said) == (8, 0.0, [])


def test_what_others_use_is_waited_for_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [6], [2.0] * 100 + [6.0])
    assert scene.wait() == 6
    assert scene.now_s > 600.0
    assert scene.said[0].startswith(
        "waiting for room: the cluster has room for 8 workers, and others use it but for 2;"
    )
    assert scene.said[0].endswith("6 are needed, of 1 CPU each")


def test_an_elastic_run_begins_with_what_is_free_when_that_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [2, 4, 8], [4.0])
    assert scene.wait() == 4 and scene.now_s > 0
    soon = Scene(monkeypatch, [2, 4, 8], [6.0, 8.0])
    assert soon.wait() == 8, "a task of its own had just ended"


def test_what_its_own_workers_had_before_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [8], [0.0])
    scene.controller._has_begun = True
    assert (scene.wait(), scene.said) == (8, [])


def test_nodes_that_are_missing_are_waited_for_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [8], [8.0])
    scene.nodes = NODES[:1]
    with pytest.raises(InfrastructureError, match="room for 4 workers, and 8 are needed; waited 600 s"):
        scene.wait()
    assert scene.said == ["waiting for nodes: there is room for 4 workers, and 8 are needed"]


def test_who_waits_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, [8], [2.0])
    scene.controller.stop.announced("the end is near")
    with pytest.raises(Preempted):
        scene.wait()


@pytest.mark.parametrize(
    ("cpus", "num_workers", "share"),
    [
        ([4, 4], 2, 4),
        ([4, 4], 3, 2),
        ([3, 3], 3, 1),
        ([8, 2], 3, 2),
        ([64] * 4, 32, 8),
        ([1, 1], 4, 1),
        ([5], 1, 5),
    ],
)
def test_workers_share_the_cpus_of_nodes_that_are_theirs(cpus: list[float], num_workers: int, share: int) -> None:
    assert share_of_cpus(cpus, num_workers) == share
