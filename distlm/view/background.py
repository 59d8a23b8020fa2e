"""Shows events without waiting for them to be shown."""

from __future__ import annotations

import queue
import threading

from distlm.view import Event, View

_MAX_WAITING = 100_000
_LAST_EVENTS_TIMEOUT_S = 5.0


class InBackground:
    """Shows events in a thread, in order: a terminal that is halted, or a reader that lags, holds nobody up. Where too
    many wait, the newest are left out."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._waiting: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)
        self._thread.start()

    def show(self, event: Event) -> None:
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put(event)

    def stop_requested(self, count: int) -> None:
        self._view.stop_requested(count)

    def close(self) -> None:
        """Wait for what is left to be shown, for a while."""
        self._waiting.put(None)
        self._thread.join(_LAST_EVENTS_TIMEOUT_S)

    def _run(self) -> None:
        while (event := self._waiting.get()) is not None:
            self._view.show(event)
        self._view.close()
