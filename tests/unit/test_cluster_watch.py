"""What is made of looks at the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from distlm.controller import cluster_watch
from distlm.controller.capacity import Node
from distlm.controller.cluster_watch import ClusterWatch
from distlm.errors import InfrastructureError, RayLostError

ONE, TWO = (Node(id=name, host=name, num_cpus=1, num_gpus=0) for name in ("one", "two"))


class Looks:
    """What each look finds; None: the head does not answer."""

    def __init__(self) -> None:
        self.found: Sequence[Node] | None = (ONE, TWO)

    def __call__(self) -> Sequence[Node]:
        if self.found is None:
            raise InfrastructureError("the head does not answer")
        return self.found


class Storage:
    """Which nodes share it, and what is told of others."""

    def __init__(self) -> None:
        self.shared: set[str] = {"one", "two"}
        self.told: list[str] = []
        self.asked: list[Sequence[Node]] = []

    def ask(self, nodes: Sequence[Node]) -> None:
        self.asked.append(nodes)

    def collect(self) -> None:
        pass

    def problems(self) -> list[str]:
        return self.told

    def is_fit(self, node: Node) -> bool:
        return node.id in self.shared


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def looks() -> Looks:
    return Looks()


@pytest.fixture
def watch(looks: Looks, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterWatch]:
    monkeypatch.setattr(cluster_watch, "_INTERVAL_S", 1e6)  # the tests look themselves
    watch = ClusterWatch(storage, looks)  # type: ignore[arg-type]
    yield watch
    watch.close()


def test_a_node_is_gone_after_three_looks_without_it(looks: Looks, watch: ClusterWatch) -> None:
    assert not watch.nodes and not watch.is_gone("two"), "before the first look nothing is known"
    watch.look()
    looks.found = (ONE,)
    for expected in (False, False, True):
        watch.look()
        assert (watch.is_gone("one"), watch.is_gone("two")) == (False, expected)
        assert watch.missing() == ["two"]
    assert watch.nodes == [ONE]
    looks.found = (ONE, TWO)
    watch.look()
    assert not watch.is_gone("two") and watch.missing() == []


def test_a_node_that_does_not_share_the_folder_is_not_there_and_is_told_of_once(
    storage: Storage, watch: ClusterWatch
) -> None:
    storage.shared = {"one"}
    watch.look()
    assert watch.nodes == [ONE] and watch.new_problems() == [] and storage.asked == [(ONE, TWO)]
    storage.told = ["two cannot write there"]
    watch.look()
    assert watch.nodes == [ONE] and not watch.is_gone("two")
    assert (watch.new_problems(), watch.new_problems()) == (["two cannot write there"], [])
    storage.shared.add("two")
    watch.look()
    assert watch.nodes == [ONE, TWO]


def test_a_node_that_is_seen_now_and_then_is_not_gone(looks: Looks, watch: ClusterWatch) -> None:
    for found in [(ONE, TWO), (ONE,), (ONE,), (ONE, TWO), (ONE,), (ONE,)]:
        looks.found = found
        watch.look()
        assert not watch.is_gone("two")


def test_a_silent_head_makes_no_node_gone_and_is_given_up_after_a_while(
    looks: Looks, watch: ClusterWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.look()
    looks.found = None
    for _ in range(5):
        watch.look()
    watch.require_head()
    assert watch.nodes == [ONE, TWO] and not watch.is_gone("two")
    monkeypatch.setattr(cluster_watch, "_HEAD_TIMEOUT_S", 0.0)
    with pytest.raises(RayLostError, match="the head does not answer"):
        watch.require_head()
    looks.found = (ONE,)
    watch.look()
    watch.require_head()
