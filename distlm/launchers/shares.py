"""What each of a job's hosts, nodes or pods, has to have for the workers that come to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distlm.config.schema import RunConfig
from distlm.errors import Problem


@dataclass(frozen=True)
class Hosts:
    """What a job asks its target for, each by the key of the config that says it."""

    noun: str
    """One of them."""
    count_key: str
    count: int
    gpus_key: str
    gpus: int
    """On each."""
    cpus_key: str
    cpus: int | None
    """On each; None: all that it has."""


def check_hosts(config: RunConfig, hosts: Hosts) -> Iterator[Problem]:
    """Whether each has what its workers need, and none is idle."""
    resources = config.resources
    workers = resources.workers_per_host(hosts.count)
    if resources.max_workers < hosts.count:
        message = f"some of them would have nothing to do: resources.num_workers is {resources.num_workers}"
        yield Problem(message, hosts.count_key, str(hosts.count))
    if resources.device == "cuda" and not hosts.gpus:
        yield Problem(f"resources.device is cuda; each {hosts.noun} needs {workers}", hosts.gpus_key, "0")
    if resources.device == "cpu" and hosts.gpus:
        message = "resources.device is cpu, and the GPUs would have nothing to do"
        yield Problem(message, hosts.gpus_key, str(hosts.gpus))
    if resources.device != "cpu" and hosts.gpus and workers > hosts.gpus:
        message = f"{workers} workers are to be on each {hosts.noun}, and each needs one"
        yield Problem(message, hosts.gpus_key, str(hosts.gpus))
    needed = workers * (resources.cpus_per_worker or 1)
    if hosts.cpus is not None and hosts.cpus < needed:
        message = f"{workers} workers with resources.cpus_per_worker = {resources.cpus_per_worker or 1} need {needed}"
        yield Problem(message, hosts.cpus_key, str(hosts.cpus))
