"""Signs of life of one worker: what it does and how far it is, so that a hang is noticed and its place is known.

The controller compares the time since rank 0's last beat with what beats of the same activity have taken so far (see
`distlm.controller.watchdog`). One rank's beats tell of all: a step ends on every rank or on none.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

Activity = Literal["starting", "training", "evaluating", "saving"]

_TELL_INTERVAL_S = 1.0
_NUM_REMEMBERED = 200


class Pulse:
    """`beat` is called before each forward pass, each batch of an evaluation, and each save."""

    def __init__(
        self, incarnation: int, tell: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`tell` sends a message to the controller without waiting."""
        self.step: int | None = None
        """The step that this worker is in; None: none yet."""
        self._incarnation, self._tell, self._clock = incarnation, tell, clock
        self._activity: Activity = "starting"
        self._began_s = self._told_s = clock()
        self._durations_s: dict[str, deque[float]] = {}

    def beat(self, activity: Activity, step: int) -> None:
        """From now on this worker does `activity` in `step`. Tells the controller, at most once per second."""
        now_s = self._clock()
        is_new = activity != self._activity
        # The first of a kind is no measure: it compiles, allocates, or reads what later ones find.
        durations = self._durations_s.setdefault(self._activity, deque(maxlen=_NUM_REMEMBERED))
        durations.append(now_s - self._began_s)
        self._activity, self._began_s, self.step = activity, now_s, step
        if is_new or now_s - self._told_s >= _TELL_INTERVAL_S:
            self._told_s = now_s
            self._tell(self._message())

    def _message(self) -> dict[str, Any]:
        measured = list(self._durations_s.get(self._activity, ()))[1:]
        return {
            "kind": "pulse",
            "incarnation": self._incarnation,
            "activity": self._activity,
            "step": self.step,
            "longest_s": max(measured, default=None),
        }
