"""What Slurm has given to a job, from its environment."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from distlm.errors import InfrastructureError, InputError

PORTS_PER_JOB, NUM_HEAD_PORTS = 200, 20
"""The size of a job's block of ports, and how many at its beginning are for Ray's head."""
_PORTS_FROM, _NUM_BLOCKS = 20000, 60
"""Blocks lie below the ports that the kernel gives to connections, which begin at 32768."""


@dataclass(frozen=True)
class Allocation:
    """The job that this process is the batch script of."""

    job_id: str
    num_restarts: int
    """How often it has begun before."""
    nodes: tuple[str, ...]
    """Their names; the first is this one."""
    addresses: tuple[str, ...]
    """By which Slurm reaches them: names of hosts, or IP addresses."""
    cpus: tuple[int, ...]
    """On each node."""
    memory_mib: int | None
    """On each node; None: all that it has."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Raises InputError outside of a batch job."""
        try:
            job_id, node_list = environ["SLURM_JOB_ID"], environ["SLURM_JOB_NODELIST"]
            cpus = expand_counts(environ["SLURM_JOB_CPUS_PER_NODE"])
        except KeyError as error:
            raise InputError(
                f"{error.args[0]} is not set: this is for batch scripts of Slurm, which "
                "`distlm render CONFIG --target slurm` prints"
            ) from None
        try:
            shown = subprocess.run(
                ("scontrol", "show", "hostnames", node_list), capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise InfrastructureError(f"scontrol does not tell the nodes of {node_list}: {error}") from None
        nodes = tuple(shown.stdout.split())
        known = _addresses(node_list)
        addresses = tuple(known.get(node, node) for node in nodes)
        per_node, per_cpu = (environ.get(f"SLURM_MEM_PER_{which}", "") for which in ("NODE", "CPU"))
        memory = int(per_node) if per_node else int(per_cpu) * min(cpus) if per_cpu else 0
        return cls(job_id, int(environ.get("SLURM_RESTART_COUNT") or 0), nodes, addresses, cpus, memory or None)

    @property
    def first_port(self) -> int:
        """Of the block of ports that is this job's: jobs that share a node do not meet."""
        return _PORTS_FROM + int(self.job_id) % _NUM_BLOCKS * PORTS_PER_JOB


def _addresses(node_list: str) -> dict[str, str]:
    """Of the nodes that Slurm knows by another address than their name."""
    shown = subprocess.run(
        ("scontrol", "show", "node", "--oneliner", node_list), capture_output=True, text=True, check=False
    )
    found = (dict(re.findall(r"(NodeName|NodeAddr)=(\S+)", line)) for line in shown.stdout.splitlines())
    return {node["NodeName"]: node["NodeAddr"] for node in found if len(node) == 2}


def is_free(port: int) -> bool:
    """Whether nobody on this node has a port, such as another job with the same block."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def expand_counts(text: str) -> tuple[int, ...]:
    """ "4(x2),8" -> (4, 4, 8)"""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise InputError(f"SLURM_JOB_CPUS_PER_NODE = {text}: is none of Slurm's lists of counts")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def own_address(others: tuple[str, ...]) -> str:
    """The address of this node that the others of the job reach it by; alone, loopback, which nobody else reaches.

    A host's own name often stands for loopback, so the address is the one by which this node reaches another one.
    Raises InfrastructureError where none of them is known.
    """
    if not others:
        return "127.0.0.1"
    problems = []
    for other in others:
        try:
            family, _, _, _, target = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect(target)  # sends nothing
                return str(sock.getsockname()[0])
        except OSError as error:
            problems.append(f"{other}: {error}")
    raise InfrastructureError(f"{os.uname().nodename} does not know how to reach {'; '.join(problems)}")
