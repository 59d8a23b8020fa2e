"""How the wish to stop reaches the training loop, and how all workers agree on the step after which they do."""

from __future__ import annotations

import threading
from typing import Any

import torch

from distlm.errors import InfrastructureError

_POLL_INTERVAL_S = 1.0


class StopFlag:
    """Whether the controller wants the workers to stop; asked for in a thread, so that no step waits for the answer."""

    def __init__(self, mailbox: Any) -> None:
        """`mailbox` is the handle of the recorder's actor."""
        self._mailbox = mailbox
        self._wanted = threading.Event()
        self._lost: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="stop-flag", daemon=True)
        self._thread.start()

    def is_set(self) -> bool:
        """Raises InfrastructureError where nobody is there any more to ask, or to record what is trained."""
        if self._lost is not None:
            raise InfrastructureError("the recorder's mailbox is gone") from self._lost
        return self._wanted.is_set()

    def close(self) -> None:
        self._closed.set()

    def _poll(self) -> None:
        import ray

        while not self._closed.wait(_POLL_INTERVAL_S):
            try:
                if ray.get(self._mailbox.is_stop_wanted.remote()):
                    self._wanted.set()
                    return
            except ray.exceptions.ActorUnavailableError:  # for the moment
                continue
            except ray.exceptions.RayError as error:
                self._lost = error
                return


class Votes:
    """Sums over all workers that arrive on the host without making it wait for the device's newest work."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._on_host = torch.zeros((), pin_memory=self._is_cuda)
        self._arrived: torch.cuda.Event | None = None

    def count(self, total: torch.Tensor) -> None:
        """Begin to fetch the number of workers that want to stop, which all workers have summed up."""
        self._on_host.copy_(total, non_blocking=True)
        if self._is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def want_stop(self) -> bool:
        """The same on every worker. Waits for the sum, which is older than the step that was begun after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._on_host)
