"""What the tests on a cluster begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, place_on, slurm_lab
from place import Place


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    assert os.getuid() == 0, "these tests make hosts of namespaces, which only root may"
    with slurm_lab(tmp_path_factory.getbasetemp()) as lab:
        yield lab


@pytest.fixture
def place(lab: Lab, tmp_path: Path) -> Place:
    return place_on(lab, tmp_path / "place")
