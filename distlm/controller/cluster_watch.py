"""Looks at the nodes of a joined cluster again and again, so that the controller's loop need not wait for answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from distlm.controller.capacity import Node, living_nodes
from distlm.controller.fitness import NodeFitness
from distlm.errors import InfrastructureError, RayLostError

_INTERVAL_S = 1.0
_HEAD_TIMEOUT_S = 30.0
_NUM_MISSES = 3
"""Looks in which a node is not seen until it counts as gone: a busy one may be late."""


class ClusterWatch:
    """The nodes that there are, as seen by a thread."""

    def __init__(self, fitness: NodeFitness, look: Callable[[], Sequence[Node]] = living_nodes) -> None:
        self._look, self._fitness = look, fitness
        self._nodes: Sequence[Node] = ()
        self._num_told = 0
        self._num_misses: dict[str, int] = {}
        self._seen_s = time.monotonic()
        self._problem = ""
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="cluster-watch", daemon=True).start()

    @property
    def nodes(self) -> Sequence[Node]:
        """Those that are alive and fit; empty before the first look."""
        return self._nodes

    def new_problems(self) -> list[str]:
        """What is wrong with nodes that have come, each told once."""
        problems = self._fitness.problems()[self._num_told :]
        self._num_told += len(problems)
        return problems

    def is_gone(self, node_id: str) -> bool:
        return self._num_misses.get(node_id, 0) >= _NUM_MISSES

    def missing(self) -> list[str]:
        """Nodes that were there, and were not at the last look. Ray may place workers on them for a minute yet."""
        return [node for node, misses in self._num_misses.items() if misses]

    def require_head(self) -> None:
        """Raises RayLostError where the head has been silent for long."""
        silent_s = time.monotonic() - self._seen_s
        if self._problem and silent_s > _HEAD_TIMEOUT_S:
            raise RayLostError(f"{self._problem} ({silent_s:.0f} s)")

    def close(self) -> None:
        self._closed.set()

    def look(self) -> None:
        """Once; also called by the thread."""
        try:
            nodes = self._look()
        except InfrastructureError as error:
            self._problem = str(error)
            return
        here = {node.id for node in nodes}
        known = here | self._num_misses.keys()
        self._num_misses = {node: 0 if node in here else self._num_misses.get(node, 0) + 1 for node in known}
        self._fitness.ask(nodes)
        self._fitness.collect()
        self._nodes = [node for node in nodes if self._fitness.is_fit(node)]
        self._seen_s, self._problem = time.monotonic(), ""

    def _run(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            self.look()
