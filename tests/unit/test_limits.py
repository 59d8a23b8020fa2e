"""What is left of a machine to a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distlm import limits


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the control group that the process is in, of version 2."""
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/pods/one\n")
    (mount / "pods" / "one").mkdir(parents=True)
    found = limits.cgroups
    monkeypatch.setattr(limits, "cgroups", lambda controller: found(controller, proc, mount))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return mount / "pods" / "one"


@pytest.mark.parametrize(
    ("own", "outer", "cpus"),
    [
        ("max 100000", "max 100000", 8),
        ("200000 100000", "max 100000", 2),
        ("max 100000", "300000 100000", 3),
        ("400000 100000", "150000 100000", 2),  # one and a half are worth two
        ("50000 100000", "max 100000", 1),
        ("1600000 100000", "max 100000", 8),
        ("nonsense", "max 100000", 8),
    ],
)
def test_a_container_has_its_share_of_the_cpus(group: Path, own: str, outer: str, cpus: int) -> None:
    (group / "cpu.max").write_text(f"{own}\n")
    (group.parent / "cpu.max").write_text(f"{outer}\n")
    assert limits.available_cpus() == cpus


def test_without_control_groups_all_are_there(group: Path) -> None:
    assert limits.available_cpus() == 8
    assert limits.memory_limit_bytes() is None


def test_the_least_memory_counts(group: Path) -> None:
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("4294967296\n")
    assert limits.memory_limit_bytes() == 4 * 2**30
