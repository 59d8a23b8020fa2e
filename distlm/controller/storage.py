"""Storage that every node shares: each is asked to write a file into the run's folder, and it has to be seen here."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distlm.controller.capacity import Node, on_node


class SharedStorage:
    """Which nodes share a folder with this one. Each is asked once, when it is seen first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._tasks: dict[Any, Node] = {}
        """Those that have not answered."""
        self._problems: dict[str, str] = {}
        """By node, of those that have answered; empty: it shares the folder."""

    def ask(self, nodes: Sequence[Node]) -> None:
        """Without waiting. Ray gives a node that is to leave nothing to do."""
        import ray

        write = ray.remote(num_cpus=0, max_retries=0)(_write)
        with self._lock:
            asked = self._problems.keys() | {node.id for node in self._tasks.values()}
            for node in nodes:
                if node.id not in asked and not node.is_draining:
                    task = write.options(scheduling_strategy=on_node(node.id)).remote(str(self._file(node)))
                    self._tasks[task] = node

    def collect(self, timeout_s: float = 0.0) -> None:
        """Take the answers that there are by then."""
        import ray

        with self._lock:
            tasks = list(self._tasks)
            done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=timeout_s) if tasks else ([], [])
            for task in done:
                node = self._tasks.pop(task)
                with suppress(ray.exceptions.RayError):  # it has gone; if it comes back, it is asked again
                    self._problems[node.id] = self._problem(node, ray.get(task))

    def problems(self) -> list[str]:
        """What is wrong with nodes that have answered, one line each, in the order of their answers."""
        return [problem for problem in self._problems.values() if problem]

    def silent(self) -> list[Node]:
        """Those that have not answered yet."""
        return list(self._tasks.values())

    def shares(self, node: Node) -> bool:
        """Whether it has answered, and well."""
        return self._problems.get(node.id) == ""

    def unfit(self) -> list[str]:
        """The nodes that have not."""
        return [name for name, problem in self._problems.items() if problem] + [node.id for node in self.silent()]

    def close(self) -> None:
        """Remove what was written by nodes that were not waited for."""
        for file in self._folder.glob(f".probe-{self._token}-*"):
            file.unlink(missing_ok=True)

    def _file(self, node: Node) -> Path:
        return self._folder / f".probe-{self._token}-{node.id}"

    def _problem(self, node: Node, failure: str) -> str:
        if failure:
            return f"{node.host} cannot write there ({failure})"
        try:
            self._file(node).unlink()
        except FileNotFoundError:
            return f"{node.host} writes to another folder of that name; it is not shared"
        return ""


def _write(path: str) -> str:
    try:
        Path(path).write_text("distlm", encoding="utf-8")
    except OSError as error:
        return error.strerror or str(error)
    return ""
