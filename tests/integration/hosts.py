"""Hosts made of namespaces on this machine, each with a network, a name, processes and a folder of its own. As root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SUBNET = "10.78.0"


@dataclass(frozen=True)
class Host:
    """A host on a network that all hosts of a test share."""

    address: str
    command: tuple[str, ...]
    """Runs on the host the command that is put behind it."""
    link: str = ""
    """This machine's end of the host's cable; empty: it has none of its own."""

    def cut_off(self) -> None:
        """As if the cable was pulled: no connection is reset."""
        _run("ip", "link", "set", self.link, "down")

    def connect_again(self) -> None:
        _run("ip", "link", "set", self.link, "up")


@contextmanager
def hosts(count: int, private: Path) -> Iterator[list[Host]]:
    """So many hosts. The first shows its processes to this machine, so that a test can ask and kill them, and shares
    its files; the others share them but for the folder `private`. The processes on them are to end before."""
    prefix = f"d{os.getpid()}"
    made: list[tuple[str, ...]] = []
    try:
        bridge = f"{prefix}br"
        _run("ip", "link", "add", bridge, "type", "bridge")
        made.append(("ip", "link", "del", bridge))
        _run("ip", "link", "set", bridge, "up")
        found = []
        for number in range(count):
            name, address = f"{prefix}h{number}", f"{_SUBNET}.{number + 1}"
            _run("ip", "netns", "add", name)
            made.append(("ip", "netns", "del", name))
            _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            made.append(("ip", "link", "del", name))  # connections that nobody has answered keep a network for minutes
            _run("ip", "link", "set", name, "master", bridge, "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", device, "up")
            # Ray takes the address by which it would reach the world.
            _run("ip", "-n", name, "route", "add", "default", "via", f"{_SUBNET}.254")
            own = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
            begin = f'hostname host{number}; mount -t tmpfs tmpfs {private}; exec "$@"'
            alone = (*own, "sh", "-c", begin, "sh") if number else ()
            found.append(Host(address, ("ip", "netns", "exec", name, *alone), name))
        yield found
    finally:
        for command in reversed(made):
            _run(*command)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
