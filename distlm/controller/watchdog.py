"""Notices that the workers of an incarnation do not go on, by the beats of rank 0 (see `distlm.worker.pulse`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from distlm.config.schema import RecoveryConfig

_FACTOR = 10.0
_LEAST_TIMEOUT_S = 30.0


class Watchdog:
    """The deadline of the next beat. It follows from how long beats of the same activity have taken so far."""

    def __init__(self, config: RecoveryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._activity = "starting"
        self.step: int | None = None
        """The step that the workers are in; None: they have not begun one."""
        self._longest_s: float | None = None
        self._heard_s = clock()

    def heard(self, message: Mapping[str, Any]) -> None:
        """A message of a worker has come."""
        if message["kind"] == "pulse":
            self._activity, self.step, self._longest_s = message["activity"], message["step"], message["longest_s"]
            self._heard_s = self._clock()
        elif message.get("event") == "phase":
            self._heard_s = self._clock()

    @property
    def timeout_s(self) -> float:
        """How long the workers may take until the next beat."""
        if self._longest_s is None:
            return self._config.start_timeout_s
        return self._config.step_timeout_s or max(_LEAST_TIMEOUT_S, _FACTOR * self._longest_s)

    def complaint(self) -> str:
        """Empty: they go on. Otherwise since when they do not, and the key that sets the limit."""
        silent_s = self._clock() - self._heard_s
        if silent_s <= self.timeout_s:
            return ""
        where = self._activity if self.step is None else f"{self._activity}, step {self.step}"
        if self._longest_s is None:
            limit = f"recovery.start_timeout_s = {self._config.start_timeout_s:g}"
        elif self._config.step_timeout_s:
            limit = f"recovery.step_timeout_s = {self._config.step_timeout_s:g}"
        else:
            limit = f"the longest so far took {self._longest_s:.1f} s; recovery.step_timeout_s sets a limit"
        return f"no progress for {silent_s:.0f} s ({where}; {limit})"
