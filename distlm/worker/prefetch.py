"""The batches of the next step, made while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `make(step)` in a thread, one step ahead; what it raises, `get` raises."""

    def __init__(self, make: Callable[[int], T], last_step: int) -> None:
        self._make, self._last_step = make, last_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[T]] | None = None

    def get(self, step: int) -> T:
        """What `make` made for this step; it begins with that for the step after."""
        wanted, future = self._next or (step, self._thread.submit(self._make, step))
        if wanted != step:
            future = self._thread.submit(self._make, step)
        result = future.result()
        self._next = (step + 1, self._thread.submit(self._make, step + 1)) if step < self._last_step else None
        return result
