"""Options of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    chaos = parser.getgroup("chaos", "tests/integration/test_chaos.py")
    chaos.addoption("--chaos-seed", type=int, default=None, help="seed of the faults (default: another one each time)")
    chaos.addoption("--chaos-faults", type=int, default=10, help="how many faults; 100 for a night")
