"""What this process may use of its machine: what a container, a job or a service manager has left it of that. Standard
library only."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cpus() -> int:
    """CPUs that are worth a process or a thread each: those that this process is bound to, or fewer where it gets less
    time than that."""
    bound, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return bound if quota is None else max(1, min(bound, math.ceil(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of time that a cgroup allows; None: no limit."""
    found = []
    for folder in cgroups("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(found, default=None)


def memory_limit_bytes() -> int | None:
    """What cgroups allow this process; None: no limit."""
    found = []
    for folder in cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                found.append(int((folder / name).read_text()))
            except (OSError, ValueError):  # it is not there, or "max"
                continue
    return min(found, default=None)


def cgroups(controller: str, proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[Path]:
    """The folders of this process's control group and of those around it, of version 2 and 1. In a container some may
    be unknown; the outermost one is then the container's."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = mount if number == "0" else mount / controller
        inner = root / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))
