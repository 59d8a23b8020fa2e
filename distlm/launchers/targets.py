"""Which launcher sends a run where."""

from __future__ import annotations

from collections.abc import Iterator

from distlm.config.schema import RunConfig
from distlm.errors import Problem
from distlm.launchers.base import Launcher, QueueLauncher
from distlm.launchers.kubernetes import KubernetesLauncher
from distlm.launchers.local import LocalLauncher
from distlm.launchers.ray import RayLauncher
from distlm.launchers.slurm import SlurmLauncher

_WITH_QUEUE: dict[str, type[QueueLauncher]] = {
    "ray": RayLauncher,
    "slurm": SlurmLauncher,
    "kubernetes": KubernetesLauncher,
}


_CARRY_FILES = ("ray", "kubernetes")


def uses_the_folder_here(target: str) -> bool:
    """Whether a run there needs its folder as it is here; else what it needs travels with its job."""
    return target not in _CARRY_FILES


def queue_launcher(target: str) -> QueueLauncher | None:
    """Of a target that takes jobs; None: it has no queue."""
    return _WITH_QUEUE[target]() if target in _WITH_QUEUE else None


def launcher_for(config: RunConfig) -> Launcher:
    return queue_launcher(config.resources.target) or LocalLauncher()


def check_for_target(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with a config for the target that it names, as far as can be seen from here."""
    return launcher_for(config).check_here(config)
