"""How Ray is set up where distlm starts it: for an attempt on this machine, and on the nodes of a Slurm job."""

from __future__ import annotations

OF_EVERY_NODE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A thread that is late, when Ray has been shut down, would start another one.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray's default of 15 lets every other process here starve the workers; those of torchrun have 0.
    "RAY_worker_niceness": "0",
}
"""Environment variables. They also have to be set where a driver connects to such a Ray."""

OBJECT_STORE_BYTES = 100 * 2**20
"""distlm sends no data through Ray's object store; Ray's own minimum is 75 MiB."""


def without_dashboard() -> None:
    """From now on Ray starts its agents here as if its dashboard was not installed: without servers and
    metrics that nobody asks for, and that take seconds to import on every node. Imports ray."""
    from ray._private import utils

    utils.get_dashboard_dependency_error = lambda: ImportError("distlm does without")
