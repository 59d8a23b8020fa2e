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


def without_extras() -> None:
    """From now on Ray starts here what a run needs and no more. Its other daemons take a second or two of CPU each on
    every node: the dashboard and what serves it, Ray Client, the autoscaler's monitor, and the log monitor, which sends
    what workers print to a driver that does not want it. Imports ray, which has options for some of them only."""
    from ray._private import node, utils

    def missing() -> ImportError:
        return ImportError("distlm does without")

    def nothing(*_: object, **__: object) -> None:
        return

    utils.get_dashboard_dependency_error = utils.get_ray_client_dependency_error = missing
    for start in ("start_api_server", "start_log_monitor", "start_monitor"):
        setattr(node.Node, start, nothing)
