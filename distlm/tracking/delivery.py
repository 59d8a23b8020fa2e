"""Bringing a run's metrics.jsonl files to a tracker: everything once, in order, however often either side fails.

What a tracker gets is a function of the files alone. A point is delivered if and only if its step is greater than every
step recorded before it for the same key, over all attempts: so a step that is trained again after a restore is not
delivered again. attempts/NNN/metrics.sent.json says up to which byte of that attempt's file a destination has
everything; after a crash or an outage the rest is sent with its original timestamps, which adds nothing where the
tracker had a part of it already.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlm.errors import AttestationError, DistlmError, InputError
from distlm.metrics_file import POINT_KINDS, read_lines
from distlm.redact import redact_uri
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json
from distlm.tracking import Point, RefusedError, Tracker

_log = logging.getLogger(__name__)

_POINTS_PER_CHUNK = 1000
_LONGEST_PAUSE_S = 30.0
_LONGEST_PAUSE_WHILE_CLOSING_S = 1.0
_CLOSING_INTERVAL_S = 0.2


def sync(run_folder: RunFolder, tracker: Tracker) -> int:
    """Send all of a run that `tracker` has not had yet; the number of points sent.

    Call it while no controller holds the run. Raises what the tracker raises in an outage; called again, it goes on.
    """
    delivery = Delivery(run_folder, tracker)
    delivery.deliver()
    return delivery.num_points_sent


@dataclass
class _Chunk:
    """What one acknowledgement covers: points, then at most one other message."""

    attempt: AttemptFolder
    end: int = 0
    points: list[Point] = field(default_factory=list)
    message: dict[str, Any] | None = None


class Delivery:
    """The state of one run's delivery to one tracker."""

    def __init__(self, run_folder: RunFolder, tracker: Tracker) -> None:
        self.num_points_sent = 0
        self._run_folder = run_folder
        self._tracker = tracker
        self._highest_step: dict[str, int] = {}
        self._read_to: dict[int, int] = defaultdict(int)  # attempt number -> byte offset in its metrics.jsonl
        self._pending: _Chunk | None = None

    def deliver(self) -> None:
        """Send all that the files hold by now. After an exception the next call goes on where this one failed."""
        while chunk := self._pending or self._next_chunk():
            self._pending = chunk
            _make_durable(chunk.attempt.metrics_jsonl)
            self._send_points(chunk.points)
            if chunk.message:
                self._send_message(chunk.message)
            write_json(chunk.attempt.metrics_sent_json, {"destination": self._tracker.destination, "offset": chunk.end})
            self._pending = None

    def _next_chunk(self) -> _Chunk | None:
        for attempt in self._run_folder.attempts():
            chunk = _Chunk(attempt)
            sent = self._sent_offset(attempt)
            for end, message in read_lines(attempt.metrics_jsonl, self._read_to[attempt.number]):
                self._read_to[attempt.number] = end
                points = self._first_points(message)
                if end <= sent:
                    continue
                chunk.end = end
                chunk.points += points
                if message["kind"] in ("params", "tags", "dataset", "artifact", "status"):
                    chunk.message = message
                    break
                if len(chunk.points) >= _POINTS_PER_CHUNK:
                    break
            if chunk.points or chunk.message:
                return chunk
        return None

    def _first_points(self, message: dict[str, Any]) -> list[Point]:
        """The points of a message whose step is the highest seen for their key."""
        if message["kind"] not in POINT_KINDS:
            return []
        step, timestamp_ms = message["step"], message["timestamp_ms"]
        keys = [key for key in message["values"] if step > self._highest_step.get(key, -1)]
        self._highest_step.update(dict.fromkeys(keys, step))
        return [Point(key, message["values"][key], timestamp_ms, step) for key in keys]

    def _sent_offset(self, attempt: AttemptFolder) -> int:
        sent = read_json(attempt.metrics_sent_json)
        return sent["offset"] if sent and sent["destination"] == self._tracker.destination else 0

    def _send_points(self, points: list[Point]) -> None:
        """Send points; where the tracker refuses, halve until only the refused ones are left out."""
        if not points:
            return
        try:
            self._tracker.log_points(points)
            self.num_points_sent += len(points)
        except RefusedError as error:
            if len(points) == 1:
                _log.warning("the tracker refuses %s at step %d: %s", points[0].key, points[0].step, error)
                return
            middle = len(points) // 2
            self._send_points(points[:middle])
            self._send_points(points[middle:])

    def _send_message(self, message: dict[str, Any]) -> None:
        try:
            match message["kind"]:
                case "params":
                    self._tracker.log_params(message["params"])
                case "tags":
                    self._tracker.set_tags(message["tags"])
                case "dataset":
                    self._tracker.log_dataset(**message["dataset"])
                case "artifact":
                    self._tracker.log_artifact(self._run_folder.path / message["path"], message["artifact_path"])
                case "status":
                    self._tracker.set_status(message["status"], message["timestamp_ms"])
        except RefusedError as error:
            _log.warning("the tracker refuses %s: %s", message["kind"], error)


def _make_durable(path: Path) -> None:
    """The file comes first: what a power cut took from it would be trained, and delivered, a second time."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class DeliveryThread:
    """Delivers in the background until `close`, and retries for as long as the tracker is away."""

    def __init__(self, run_folder: RunFolder, connect: Callable[[], Tracker]) -> None:
        """`connect` makes the tracker; it runs in the thread, again after each failure, and may be slow."""
        self.problem = ""  # the outage that lasts, in one line; empty when there is none
        self._run_folder = run_folder
        self._connect = connect
        self._changed = threading.Condition()  # guards the fields below
        self._num_wakes = 0
        self._num_wakes_served = -1
        self._connected = False
        self._closing = False
        self._stopped = False
        self._fatal: DistlmError | None = None
        threading.Thread(target=self._run, name="tracker-delivery", daemon=True).start()

    def wake(self) -> None:
        """Say that a file has grown."""
        with self._changed:
            self._num_wakes += 1
            self._changed.notify_all()

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether the tracker answered within `timeout_s`.

        Raises:
            AttestationError, InputError: what `connect` found wrong with the run or the tracker's address.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._fatal, timeout_s)
            if self._fatal:
                raise self._fatal
            return self._connected

    def close(self, timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Try to deliver the rest for up to `timeout_s`, or until `give_up`, then stop; whether everything was
        delivered."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not (self._all_served() or self._fatal or give_up() or time.monotonic() > deadline_s):
                self._changed.wait(_CLOSING_INTERVAL_S)
            self._stopped = True
            self._changed.notify_all()
            return self._all_served()

    def _all_served(self) -> bool:
        return self._num_wakes_served == self._num_wakes

    def _run(self) -> None:
        delivery: Delivery | None = None
        num_failures = 0
        while self._wait_for_work(num_failures):
            num_wakes = self._num_wakes
            try:
                if delivery is None:
                    delivery = Delivery(self._run_folder, self._connect())
                    self._set(_connected=True)
                delivery.deliver()
            except (AttestationError, InputError) as error:
                self._set(_fatal=error, problem=str(error))
                return
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
                num_failures += 1
                self._set(problem=redact_uri(f"{type(error).__name__}: {error}"))
                if num_failures == 1:
                    _log.warning(
                        "delivery to the tracker fails and is retried, the file has everything: %s", self.problem
                    )
            else:
                if num_failures:
                    _log.warning(
                        "delivery to the tracker works again after %d failures; it has everything", num_failures
                    )
                num_failures = 0
                self._set(_num_wakes_served=num_wakes, problem="")

    def _wait_for_work(self, num_failures: int) -> bool:
        """Wait for news, or after failures for a growing pause; False when the thread is to end."""
        with self._changed:
            closing = self._closing
            if num_failures:
                longest_s = _LONGEST_PAUSE_WHILE_CLOSING_S if closing else _LONGEST_PAUSE_S
                pause_s = min(longest_s, 0.25 * 2 ** min(num_failures, 10))
                self._changed.wait_for(lambda: self._stopped or self._closing != closing, pause_s)
            else:
                self._changed.wait_for(lambda: self._stopped or not self._all_served())
            return not self._stopped

    def _set(self, **fields: Any) -> None:
        with self._changed:
            for name, value in fields.items():
                setattr(self, name, value)
            self._changed.notify_all()
