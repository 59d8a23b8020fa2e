"""Options of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    chaos = parser.getgroup("chaos", "tests/integration/test_chaos.py")
    chaos.addoption("--chaos-seed", type=int, default=1, help="seed of the faults and their moments")
    chaos.addoption("--chaos-faults", type=int, default=5, help="how many faults; 100 for a night")


def pytest_report_header(config: pytest.Config) -> str:
    return f"chaos: --chaos-seed {config.getoption('--chaos-seed')} --chaos-faults {config.getoption('--chaos-faults')}"
