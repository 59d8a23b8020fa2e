"""When the controller has workers save and make room for more of them, for others, or for nobody."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from distlm.controller import attempt
from distlm.controller.attempt import AttemptController
from distlm.controller.capacity import Node
from distlm.controller.hang import WorkerProcess
from distlm.controller.stop import StopRequest


def node(name: str, num_cpus: int = 1, is_draining: bool = False) -> Node:
    return Node(id=name, host=f"host-{name}", num_cpus=num_cpus, num_gpus=0, is_draining=is_draining)


class Scene:
    """A controller whose workers are in training, one on each of the nodes named."""

    def __init__(self, workers_on: Sequence[str], possible: Sequence[int]) -> None:
        self.now_s = 100.0
        self.said: list[str] = []
        self.num_stops = 0
        self.controller = AttemptController.__new__(AttemptController)
        self.controller.stop = StopRequest()
        self.controller.progress = SimpleNamespace(say=self.said.append)  # type: ignore[assignment]
        self.controller._possible_sizes = list(possible)
        self.controller._is_training, self.controller._has_passed_on_stop = True, False
        self.controller._resizing, self.controller._grows_since_s = False, None
        self.controller._workers = {
            rank: WorkerProcess(rank, 100 + rank, f"host-{name}", name) for rank, name in enumerate(workers_on)
        }
        self._mailbox = SimpleNamespace(want_stop=SimpleNamespace(remote=self._want_stop))
        self._cluster: Any = SimpleNamespace(device="cpu", cpus_per_worker=1, replaces_nodes=False)

    def _want_stop(self) -> None:
        self.num_stops += 1

    def look(self, *nodes: Node, after_s: float = 0.0) -> None:
        self.now_s += after_s
        watch: Any = SimpleNamespace(nodes=nodes)
        self.controller._follow_nodes(self._cluster, watch, self._mailbox, len(self.controller._workers))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make_scene(*workers_on: str, possible: Sequence[int]) -> Scene:
        scene = Scene(workers_on, possible)
        monkeypatch.setattr(attempt, "time", SimpleNamespace(monotonic=lambda: scene.now_s))
        return scene

    return make_scene


def test_nodes_that_come_are_waited_for_until_they_have_settled(make: Any) -> None:
    scene = make("a", possible=[1, 2, 4])
    scene.look(node("a"), node("b"))
    scene.look(node("a"), node("b"), after_s=4)
    assert scene.num_stops == 0
    scene.look(node("a"), node("b"), node("c"), node("d"), after_s=2)
    assert scene.num_stops == 1 and scene.controller._resizing and not scene.controller.stop.is_asked
    assert scene.said == ["nodes have come: the workers save, and 4 go on in place of 1"]
    scene.look(node("a"), node("b"), node("c"), node("d"), after_s=10)
    assert scene.num_stops == 1, "asked once"


def test_a_node_that_comes_and_goes_changes_nothing(make: Any) -> None:
    scene = make("a", possible=[1, 2])
    for seconds in range(10):
        scene.look(node("a"), *([node("b")] if seconds % 4 else []), after_s=1)
    assert scene.num_stops == 0


def test_room_for_no_other_size_changes_nothing(make: Any) -> None:
    scene = make("a", "b", possible=[1, 2, 4])
    scene.look(node("a"), node("b"), node("c"))
    scene.look(node("a"), node("b"), node("c"), after_s=60)
    scene.look(after_s=60)  # nothing has been seen yet
    assert scene.num_stops == 0


def test_workers_leave_a_node_that_is_drained_at_once(make: Any) -> None:
    scene = make("a", "b", possible=[1, 2])
    scene.look(node("a"), node("b", is_draining=True))
    assert scene.num_stops == 1 and scene.controller._resizing
    assert scene.said == ["Ray drains host-b: the workers save, and 1 go on in place of 2"]


def test_a_drained_node_without_workers_is_nobodys_affair(make: Any) -> None:
    scene = make("a", possible=[1])
    scene.look(node("a"), node("b", is_draining=True))
    assert scene.num_stops == 0


def test_without_room_elsewhere_the_attempt_is_preempted(make: Any) -> None:
    scene = make("a", "b", possible=[2])
    scene.look(node("a"), node("b", is_draining=True))
    assert scene.controller.stop.is_asked and not scene.controller.stop.is_urgent
    assert str(scene.controller.stop.error("stopped")) == "stopped (Ray drains host-b, and there is no room elsewhere)"
    assert not scene.controller._resizing


def test_where_nodes_are_replaced_another_one_is_waited_for(make: Any) -> None:
    """As on Kubernetes."""
    scene = make("a", "b", possible=[2])
    scene._cluster.replaces_nodes = True
    scene.look(node("a"), node("b", is_draining=True))
    assert scene.num_stops == 1 and scene.controller._resizing and not scene.controller.stop.is_asked
    assert scene.said == ["Ray drains host-b: the workers save, and they go on when another one has come"]
    scene.look(node("a"), after_s=10)
    assert scene.num_stops == 1


def test_who_does_not_train_yet_or_stops_anyway_is_left_alone(make: Any) -> None:
    scene = make("a", possible=[1, 2])
    scene.controller._is_training = False
    scene.look(node("a", is_draining=True), node("b", 2))
    scene.controller._is_training = True
    scene.controller.stop.announced("SIGTERM")
    scene.look(node("a", is_draining=True), node("b", 2))
    assert scene.num_stops == 0
