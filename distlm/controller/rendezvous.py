"""How workers on CPUs are told where to meet, so that they form a process group, as torchrun would tell them."""

from __future__ import annotations

from ray.train.backend import Backend, BackendConfig

from distlm.worker.store import listen, meet_at


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
        address, port = worker_group.execute_single(0, _listen)  # type: ignore[attr-defined]
        worker_group.execute(meet_at, address, port)  # type: ignore[attr-defined]


def _listen() -> tuple[str, int]:
    import ray

    address = ray.util.get_node_ip_address()
    return address, listen(address)
