"""Which nodes are fit for workers: they share the run's folder with this one, have the same packages, and are reached
by the others. Each is asked when it is seen first, by a process that looks from there."""

from __future__ import annotations

import hashlib
import platform
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

import distlm
from distlm.controller.capacity import Node, on_node
from distlm.controller.environment import versions

_PACKAGES = ("torch", "ray", "deepspeed", "accelerate", "transformers", "peft")
"""Those that compute what the workers have in common; distlm and Python are compared, too."""
_CONNECT_TIMEOUT_S = 5.0
_MAX_PEERS = 32
"""That a node connects to: of more nodes, those that follow it."""


@dataclass(frozen=True)
class NodeAnswer:
    """What a node's process has found."""

    storage_failure: str
    """Why it could not write; empty: it could."""
    versions: Mapping[str, str]
    address: tuple[str, int] | None
    """Where it listens, for the other nodes."""
    interface_failure: str
    """Why it does not listen where the workers on it are to; empty: it does."""


class NodeProbe:
    """Actor on a node."""

    def look(self, path: str, interface: str | None) -> NodeAnswer:
        """Write a file, and listen as workers do: on a port that the system chooses."""
        failure, address, interface_failure = "", None, ""
        try:
            Path(path).write_text("distlm", encoding="utf-8")
        except OSError as error:
            failure = error.strerror or str(error)
        host = _address_of(interface)
        if host is None:
            interface_failure = f"has no network interface {interface} with an address; it has {_interfaces()}"
        else:
            self._listener = socket.create_server((host, 0), backlog=128)  # the system takes connections for us
            address = (host, self._listener.getsockname()[1])
        return NodeAnswer(failure, code_versions(), address, interface_failure)

    def unreachable(self, peers: Sequence[tuple[str, int]]) -> list[int]:
        """The indices of those that cannot be connected to."""

        def is_deaf(peer: tuple[str, int]) -> bool:
            try:
                socket.create_connection(peer, _CONNECT_TIMEOUT_S).close()
            except OSError:
                return True
            return False

        with ThreadPoolExecutor(_MAX_PEERS) as threads:
            return [index for index, deaf in enumerate(threads.map(is_deaf, peers)) if deaf]


def code_versions() -> dict[str, str]:
    """Of Python and the packages that decide what is computed, as this process would import them."""
    ours = {"python": platform.python_version(), "distlm": f"{distlm.__version__} ({_code_digest()})"}
    return {**ours, **versions(_PACKAGES)}


def _code_digest() -> str:
    """Of distlm's own source files: two working trees of one version may differ."""
    folder, digest = Path(distlm.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _address_of(interface: str | None) -> str | None:
    """The address of a network interface; without one, that which Ray knows this node by."""
    if interface is None:
        import ray

        return str(ray.util.get_node_ip_address())
    for family in (socket.AF_INET, socket.AF_INET6):
        for each in psutil.net_if_addrs().get(interface, ()):
            if each.family == family:
                return str(each.address.partition("%")[0])
    return None


def _interfaces() -> str:
    return ", ".join(sorted(psutil.net_if_addrs()))


class NodeFitness:
    """What is known of the nodes. `folder`: the run's; `interface`: by which workers talk; None: not said."""

    def __init__(self, folder: Path, interface: str | None = None) -> None:
        self._folder, self._interface = folder, interface
        self._token = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._keeps_probes = True
        """The network is still to be checked."""
        self._waiting: dict[Any, Node] = {}
        """Answers that have not come."""
        self._probes: dict[str, Any] = {}
        """Handles of the processes, by node."""
        self._answers: dict[str, tuple[Node, NodeAnswer]] = {}
        self._problems: dict[str, str] = {}
        """By node, of those that have answered; empty: it is fit."""

    @cached_property
    def _versions(self) -> dict[str, str]:
        """Of this node. A run on this machine alone needs none."""
        return code_versions()

    def ask(self, nodes: Sequence[Node]) -> None:
        """Without waiting. Ray gives a node that is to leave nothing to do."""
        import ray

        make = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe)
        with self._lock:
            asked = self._problems.keys() | {node.id for node in self._waiting.values()}
            for node in nodes:
                if node.id not in asked and not node.is_draining:
                    self._probes[node.id] = probe = make.options(scheduling_strategy=on_node(node.id)).remote()
                    self._waiting[probe.look.remote(str(self._file(node)), self._interface)] = node

    def collect(self, timeout_s: float = 0.0) -> None:
        """Take the answers that there are by then."""
        import ray

        with self._lock:
            waiting = list(self._waiting)
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s) if waiting else ([], [])
            for reference in done:
                node = self._waiting.pop(reference)
                with suppress(ray.exceptions.RayError):  # it has gone; if it comes back, it is asked again
                    answer: NodeAnswer = ray.get(reference)
                    self._answers[node.id] = (node, answer)
                    self._problems[node.id] = self._problem(node, answer)
                if not self._keeps_probes:
                    ray.kill(self._probes.pop(node.id))

    def check_network(self, timeout_s: float) -> list[str]:
        """Have every node that has answered connect to the others; what is wrong, one line for each node that does not
        hear, or is not heard. The processes on the nodes end with it."""
        import ray

        listening = {
            node_id: (node.host, answer.address)
            for node_id, (node, answer) in self._answers.items()
            if answer.address is not None and node_id in self._probes
        }
        ids, deaf = list(listening), []
        peers_of = {node_id: [*ids[place + 1 :], *ids[:place]][:_MAX_PEERS] for place, node_id in enumerate(ids)}
        asked = {
            self._probes[node_id].unreachable.remote([listening[peer][1] for peer in peers]): node_id
            for node_id, peers in peers_of.items()
            if peers
        }
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        missed: dict[str, list[str]] = {}
        for reference in done:
            with suppress(ray.exceptions.RayError):  # it has gone, which others tell
                for index in ray.get(reference):
                    missed.setdefault(peers_of[asked[reference]][index], []).append(listening[asked[reference]][0])
        for node_id, others in sorted(missed.items(), key=lambda item: -len(item[1])):
            deaf.append(f"{listening[node_id][0]} is not reached by {', '.join(sorted(others))}")
        deaf += [f"{listening[asked[reference]][0]} did not answer in {timeout_s:.0f} s" for reference in late]
        with self._lock:
            self._keeps_probes = False
            for node_id in listening:
                ray.kill(self._probes.pop(node_id))
        return deaf

    def problems(self) -> list[str]:
        """What is wrong with nodes that have answered, one line each, in the order of their answers."""
        return [problem for problem in self._problems.values() if problem]

    def silent(self) -> list[Node]:
        """Those that have not answered yet."""
        return list(self._waiting.values())

    def is_fit(self, node: Node) -> bool:
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

    def _problem(self, node: Node, answer: NodeAnswer) -> str:
        shared = f"every node must share {self._folder.parent}, but {node.host}"
        if answer.storage_failure:
            return f"{shared} cannot write there ({answer.storage_failure})"
        try:
            self._file(node).unlink()
        except FileNotFoundError:
            return f"{shared} writes to another folder of that name; it is not shared"
        if answer.interface_failure:
            return f"{node.host} {answer.interface_failure} (resources.network_interface)"
        if differing := differing_versions(self._versions, answer.versions):
            return f"every node must have the same packages, but {node.host} has {differing}"
        return ""


def differing_versions(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """What is another version there, in words; empty: nothing."""
    return ", ".join(
        f"{name} {there.get(name, 'not at all')} and this node {here.get(name, 'not at all')}"
        for name in dict.fromkeys((*here, *there))
        if here.get(name) != there.get(name)
    )
