"""How an attempt runs within a job: its controller on the first node, with a Ray of its own on all of them."""

from __future__ import annotations

import os
import signal
from typing import Any

from distlm.launchers.base import Request
from distlm.launchers.local import LocalLauncher
from distlm.leftovers import clear_leftovers
from distlm.run_folder import NUM_OWN_NODES, AttemptFolder
from distlm.slurm.allocation import Allocation
from distlm.slurm.ray_nodes import RayNodes
from distlm.stop_count import signals_held
from distlm.view import View, make_event


class AllocationLauncher(LocalLauncher):
    """See `distlm.launchers.local.LocalLauncher`."""

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation

    def run(self, request: Request, attempt: AttemptFolder, view: View) -> dict[str, Any]:
        has_told = False

        def stop() -> None:
            # Slurm tells only the steps of a job that it is about to preempt, each of them.
            nonlocal has_told
            if not has_told:
                has_told = True
                os.kill(os.getpid(), signal.SIGTERM)

        def warn(text: str) -> None:
            view.show(make_event("warning", message=text))

        with signals_held(), RayNodes(self._allocation, attempt.logs, warn, stop) as nodes:
            os.environ.update(nodes.environ, **{NUM_OWN_NODES: str(len(self._allocation.nodes))})
            result = super().run(request, attempt, view)
        clear_leftovers(attempt)
        return result
