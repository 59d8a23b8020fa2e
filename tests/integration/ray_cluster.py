"""A real Ray cluster of nodes on this machine, which come, are drained, fall silent and are killed."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from hosts import Host
from place import wait_until

from distlm.processes import descendants

START_TIMEOUT_S = 90.0
DEADLINE_IN_S = 600


class RayCluster:
    """Its head and its other nodes, with token authentication."""

    def __init__(
        self,
        folder: Path,
        num_cpus: int = 2,
        host: Host | None = None,
        dashboard_port: int | None = None,
        packages: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """The head has `num_cpus`, and is on `host` or on this machine. The folder's path is short, as Ray needs it.
        `dashboard_port`: of its Jobs API; None: it has none. `packages`: a folder with those that this one needs.
        `environ`: further variables of all nodes."""
        self._folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environ |= {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0", "HOME": str(folder),
        }  # fmt: skip
        self.environ |= environ or {}
        if packages is not None:
            self.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(packages))))
        self._num_nodes = 0
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        dashboard = ["--include-dashboard=false"]
        if dashboard_port is not None:
            dashboard = [
                "--include-dashboard=true", "--dashboard-host=0.0.0.0", f"--dashboard-port={dashboard_port}",
            ]  # fmt: skip
        head = self._start("--head", f"--port={port}", f"--temp-dir={folder}", *dashboard, num_cpus=num_cpus, host=host)
        self.gcs = wait_until(lambda: self._child(head, "gcs_server"), START_TIMEOUT_S, "Ray's head")
        address = next(part for part in self._command(self.gcs) if part.startswith("--node-ip-address="))
        self.address = f"{address.partition('=')[2]}:{port}"

    def _start(self, *arguments: str, num_cpus: int, host: Host | None) -> subprocess.Popen[Any]:
        self._num_nodes += 1
        where: tuple[str, ...] = host.command if host else ()
        if host:
            arguments = (*arguments, f"--node-ip-address={host.address}")
        with open(self._folder / f"node-{self._num_nodes}.log", "wb") as log:
            process = subprocess.Popen(
                [
                    *where, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
                    f"--num-cpus={num_cpus}", f"--object-store-memory={100 * 2**20}", f"--memory={2**30}", *arguments,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environ,
            )  # fmt: skip
        return process

    def add_node(self, num_cpus: int, *arguments: str, host: Host | None = None) -> psutil.Process:
        """The raylet of a new node."""
        node = self._start(f"--address={self.address}", *arguments, num_cpus=num_cpus, host=host)
        raylet: psutil.Process = wait_until(lambda: self._child(node, "raylet"), START_TIMEOUT_S, "a raylet")
        return raylet

    @property
    def environ_of_driver(self) -> dict[str, str]:
        """What a process needs to connect to it."""
        return {name: self.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")} | {
            "RAY_ADDRESS": self.address
        }

    def node_id(self, raylet: psutil.Process) -> str:
        """Ray's name of a node, as its raylet was told."""
        return next(part for part in raylet.cmdline() if part.startswith("--node_id=")).partition("=")[2]

    def _child(self, node: subprocess.Popen[Any], name: str) -> psutil.Process | None:
        assert node.poll() is None, sorted(path.read_text() for path in self._folder.glob("node-*.log"))
        return next(
            (c for c in descendants(psutil.Process(node.pid)) if self._command(c)[0].endswith(f"/{name}")), None
        )

    def _command(self, process: psutil.Process) -> list[str]:
        with suppress(psutil.Error):
            return process.cmdline() or [""]
        return [""]

    def drain(self, node_id: str) -> None:
        subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}",
                f"--node-id={node_id}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test",
                f"--deadline-remaining-seconds={DEADLINE_IN_S}",
            ],
            env=self.environ, check=True, capture_output=True,
        )  # fmt: skip
