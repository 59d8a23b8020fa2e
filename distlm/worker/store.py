"""How workers find each other: those on CPUs by a store, which is one listening socket in the process of rank 0; and
by gloo at the addresses that Ray knows their nodes by.

torch would make the store by itself, on all addresses of the host and on a port that somebody else may have taken
meanwhile.
"""

from __future__ import annotations

import os
import socket

import psutil

_listener: socket.socket | None = None
"""Of this process, until torch is imported and takes it over."""
_store: object = None
"""Lives as long as the process."""


def listen(address: str) -> int:
    """Take a port of `address`, and tell which. Who connects before `serve` waits for it."""
    global _listener
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _listener = socket.socket(family)
    try:
        _listener.bind((address, 0))
    except OSError:  # behind a translation of addresses, a node does not have its own
        _listener.bind(("", 0))
    _listener.listen(socket.SOMAXCONN)
    return int(_listener.getsockname()[1])


def meet_at(address: str, port: int) -> None:
    """What torchrun tells its workers, too: where the store is, and that none of them is to make one."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


def listen_at(address: str) -> None:
    """Have gloo, which saves checkpoints on GPUs, too, listen where others reach this host. By itself it takes the
    address that the host's name stands for, often loopback."""
    if (interface := _interface_with(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface_with(address: str) -> str | None:
    """The name of the network interface with that address; None: behind a translation of addresses, there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def serve() -> None:
    """Make the store of the socket, where this process has one. Imports torch."""
    global _listener, _store
    if _listener is None:
        return
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    descriptor, _listener = _listener.detach(), None
    _store = dist.TCPStore(  # type: ignore[attr-defined]  # it is documented
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor
    )
