"""How workers on CPUs are told where to meet, so that they form a process group, as torchrun would tell them."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from pathlib import Path

from ray.train.backend import Backend, BackendConfig


class RendezvousConfig(BackendConfig):
    """Tells every worker the address of rank 0; the group is formed by the worker itself, when the engine is built.

    Ray's TorchConfig does the same, and forms the group, but has torch imported by the controller, by Ray Train's
    controller and before the workers' own libraries: 4 s of every start. On GPUs it does more, which is needed there.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return _Rendezvous


class _Rendezvous(Backend):
    def on_start(self, worker_group: object, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _free_address)  # type: ignore[attr-defined]
        worker_group.execute(_set_address, address, port)  # type: ignore[attr-defined]


def _free_address() -> tuple[str, int]:
    import ray

    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # The port is taken seconds later, when torch is imported; the system gives its ephemeral ports away until then.
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in [*random.SystemRandom().sample(range(10_000, max(first_ephemeral, 11_000)), 20), 0]:
        with socket.socket(family) as listener, suppress(OSError):
            listener.bind(("", port))
            return address, listener.getsockname()[1]
    raise OSError("no port is free")


def _set_address(address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
