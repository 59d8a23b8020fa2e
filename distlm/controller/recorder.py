"""How metrics travel from the workers to the files of a run, and on to its tracker.

    rank 0 --push--> RecorderMailbox (actor, head node) --drain--> Recorder (controller) --> metrics.jsonl --> tracker

Nobody waits for the next in line: a worker pushes and goes on, the recorder appends to a file and goes on, and a thread
of its own brings the file's content to the tracker. The file is the truth; the tracker repeats it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distlm.errors import InfrastructureError
from distlm.metrics_file import POINT_KINDS, cut_torn_line, encode_line
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.tracking import Tracker
from distlm.tracking.delivery import DeliveryThread
from distlm.tracking.records import now_ms

_log = logging.getLogger(__name__)

_FSYNC_INTERVAL_S = 5.0
_MAX_WAITING_BYTES = 64 * 2**20
_RESERVE_BYTES = 256 * 2**10


class RecorderMailbox:
    """Holds messages from workers until the controller fetches them. Becomes a single-threaded Ray actor.

    A message is a dictionary with a `kind` (see distlm/metrics_file.py). When `max_messages` are waiting, the
    oldest metrics make room, so that failures and events stay; how many were dropped is reported by the next `drain`.
    """

    def __init__(self, max_messages: int = 100_000) -> None:
        self._max_messages = max_messages
        self._messages: list[dict[str, Any]] = []
        self._num_dropped = 0
        self._is_stop_wanted = False
        self._recorded_step = -1

    def confirm(self, step: int) -> None:
        """The controller has written down all that came before the message that this step is being saved."""
        self._recorded_step = max(self._recorded_step, step)

    def is_recorded(self, step: int) -> bool:
        return self._recorded_step >= step

    def want_stop(self) -> None:
        """The other way round: the controller wants the workers to finish their step, save and return."""
        self._is_stop_wanted = True

    def is_stop_wanted(self) -> bool:
        return self._is_stop_wanted

    def push(self, message: dict[str, Any]) -> None:
        if len(self._messages) >= self._max_messages:
            kinds = (number for number, waiting in enumerate(self._messages) if waiting["kind"] in POINT_KINDS)
            del self._messages[next(kinds, 0)]
            self._num_dropped += 1
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        """All waiting messages, oldest first, which then wait no longer."""
        messages, self._messages = self._messages, []
        if self._num_dropped:
            messages.append({"kind": "event", "event": "messages_dropped", "count": self._num_dropped})
            self._num_dropped = 0
        return messages


class Recorder:
    """Appends to the metrics.jsonl of one attempt, and has it delivered to the tracker. For the controller only.

    A full disk need not end a run: what the file does not take waits in memory, and every call of `record` tries again.
    Every method that records raises InfrastructureError when too much waits. No method but `check_tracker` and `close`
    waits for the tracker.
    """

    def __init__(
        self, run_folder: RunFolder, attempt: AttemptFolder, connect: Callable[[], Tracker] | None = None
    ) -> None:
        """`connect` makes the tracker and is called in a thread, again until it succeeds; None: files only."""
        self._path = attempt.metrics_jsonl
        cut_torn_line(self._path)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._reserve = attempt.reserve("metrics.jsonl")  # room for what waits when the run ends for want of room
        with suppress(OSError):
            self._reserve.write_bytes(bytes(_RESERVE_BYTES))
        self._waiting = bytearray()  # from the first byte on that the file has not got
        self.storage_problem = ""  # why lines wait, in one line; empty when none do
        self._closed = False
        self._last_fsync_s = time.monotonic()
        self._run_path = run_folder.path
        self._delivery = DeliveryThread(run_folder, connect) if connect else None
        self.record([{"kind": "status", "status": "RUNNING", "timestamp_ms": now_ms()}])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._closed:
            self.close("FINISHED" if error is None else "FAILED")

    def record(self, messages: Sequence[Mapping[str, Any]], *, durably: bool = False) -> bool:
        """Append messages, one line each, after what waits; whether the file has everything, and `durably` if asked."""
        self._waiting += b"".join(encode_line(message) for message in messages)
        is_new = bool(self._waiting)
        self._append(fsync=durably or time.monotonic() - self._last_fsync_s >= _FSYNC_INTERVAL_S)
        if is_new and self._delivery:
            self._delivery.wake()
        if len(self._waiting) > _MAX_WAITING_BYTES:
            raise self._error()
        return not self.storage_problem

    def restored(self, step: int, incarnation: int) -> None:
        """Note that `incarnation` begins after `step`; what earlier ones recorded for later steps is superseded."""
        self.record([{"kind": "restore", "step": step, "incarnation": incarnation, "timestamp_ms": now_ms()}])

    def log_params(self, params: Mapping[str, str]) -> None:
        """Training semantics, flat. Values that the tracker has already are not sent again."""
        self.record([{"kind": "params", "params": params}])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.record([{"kind": "tags", "tags": tags}])

    def log_dataset(
        self,
        name: str,
        digest: str,
        source: str,
        context: str,
        columns: Mapping[str, str] | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Data the run reads. `source`: a path, a URI or hf://datasets/NAME. `context`: training or evaluation.
        `columns` maps names to types (string, long, double, boolean); `profile` holds counts such as num_rows."""
        dataset = {"name": name, "digest": digest, "source": source, "context": context}
        self.record([{"kind": "dataset", "dataset": dataset | {"columns": columns or {}, "profile": profile or {}}}])

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """A file for the tracker's `artifact_path` folder. It is read when the tracker is there, so it must stay."""
        if path.is_relative_to(self._run_path):
            path = path.relative_to(self._run_path)
        self.record([{"kind": "artifact", "path": str(path), "artifact_path": artifact_path}])

    def check_tracker(self, timeout_s: float) -> bool:
        """Whether the tracker answers within `timeout_s`; `tracker_problem` says why not.

        Raises:
            AttestationError, InputError: the tracker was reached, and this run cannot be recorded there.
        """
        return self._delivery.wait_connected(timeout_s) if self._delivery else True

    @property
    def tracker_problem(self) -> str:
        """The outage that lasts, in one line without secrets; empty when there is none."""
        return self._delivery.problem if self._delivery else ""

    def close(self, status: str, timeout_s: float = 60.0, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Record how the attempt ended (FINISHED, FAILED or KILLED) and flush; whether the tracker has everything.

        Waits for the tracker for at most `timeout_s`, or until `give_up`. What is missing then,
        `distlm.tracking.delivery.sync` sends.

        Raises:
            InfrastructureError: the file has not got everything, or not durably.
        """
        self._closed = True
        with suppress(OSError):
            self._reserve.unlink(missing_ok=True)
        try:
            self.record([{"kind": "status", "status": status, "timestamp_ms": now_ms()}])
            self._append(fsync=True)
        finally:
            os.close(self._descriptor)
        if self.storage_problem:
            with suppress(OSError):
                cut_torn_line(self._path)
            raise self._error()
        return self._delivery.close(timeout_s, give_up) if self._delivery else True

    def _append(self, fsync: bool) -> None:
        """Write what waits, as far as the storage takes it. A line that is cut there goes on where it was cut; until
        then readers leave it out."""
        try:
            while self._waiting:
                written = os.write(self._descriptor, self._waiting)
                del self._waiting[:written]
            if fsync:
                os.fsync(self._descriptor)
                self._last_fsync_s = time.monotonic()
        except OSError as error:
            if not self.storage_problem:
                _log.warning("cannot append to %s, its lines wait in memory: %s", self._path, error.strerror)
            self.storage_problem = error.strerror or str(error)
        else:
            self.storage_problem = ""

    def _error(self) -> InfrastructureError:
        return InfrastructureError(
            f"cannot append to {self._path}: {self.storage_problem}; make room or mend the storage, then resume the run"
        )
