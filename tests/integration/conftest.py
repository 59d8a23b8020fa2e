"""What the tests of data preparation begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_settings import Data, write_corpus


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """One source of 400 short documents."""
    return Data([write_corpus(tmp_path / "corpus.jsonl")])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where preparing puts its results; it does not exist yet."""
    return tmp_path / "runs" / "cache"
