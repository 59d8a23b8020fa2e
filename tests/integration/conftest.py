"""What tests of several files begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_settings import Data, write_corpus
from labelled_runs import LabelledRun, make_runs


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """One source of 400 short documents."""
    return Data([write_corpus(tmp_path / "corpus.jsonl")])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where preparing puts its results; it does not exist yet."""
    return tmp_path / "runs" / "cache"


@pytest.fixture(scope="session")
def labelled_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LabelledRun]:
    """Trained runs of each kind of label; not to be changed."""
    return make_runs(tmp_path_factory.mktemp("labelled"))
