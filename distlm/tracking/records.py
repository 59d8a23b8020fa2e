"""The lines of attempts/NNN/metrics.jsonl: what is written, and what a reader makes of it.

One JSON object a line, each with a `kind`:

    metrics   step, incarnation, timestamp_ms, values   what rank 0 measured; `step` is the optimizer step
    system    the same                                  what one node measured; `step` counts sampling intervals
    restore   step, incarnation, timestamp_ms           this incarnation began from the checkpoint of this step
    params, tags, dataset, artifact, status             what a tracker gets besides points (see delivery.py)
    event, failure, ...                                 whatever else was reported; kept for tools

NaN and infinities are written as the strings "NaN", "Infinity" and "-Infinity", because JSON has no such numbers. The
file is append-only, so a step that was trained again after a restore is in it twice; the reader tells which one counts.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlm.run_folder import RunFolder

_log = logging.getLogger(__name__)

POINT_KINDS = ("metrics", "system")


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Record:
    """Values measured together. `values` maps names such as train/loss to numbers."""

    step: int
    incarnation: int
    timestamp_ms: int
    values: Mapping[str, float]
    kind: Literal["metrics", "system"] = "metrics"

    def to_message(self) -> dict[str, Any]:
        """The plain dictionary that travels between processes and becomes a line."""
        return {
            "kind": self.kind,
            "step": int(self.step),
            "incarnation": self.incarnation,
            "timestamp_ms": self.timestamp_ms,
            "values": {key: float(value) for key, value in self.values.items()},
        }


@dataclass(frozen=True)
class StoredRecord(Record):
    """A record read back. It is superseded when its step was trained again after a restore from an earlier one."""

    attempt: int = 0
    superseded: bool = False


def encode_line(message: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(message), ensure_ascii=False, separators=(",", ":"), default=str) + "\n").encode()


def _finite(value: Any) -> Any:
    """`value` with every non-finite number in it written as a string that float() reads back."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The messages of a metrics.jsonl from byte `start` on, each with the offset of its line's end.

    A file that does not exist has none. A last line without its newline is still being written, or its writer was
    killed: it is left out. A damaged line elsewhere is left out with a warning.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        end = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                message = json.loads(line)
                if message["kind"] in POINT_KINDS:
                    message["values"] = {key: float(value) for key, value in message["values"].items()}
            except (ValueError, KeyError, TypeError):
                _log.warning("%s: the line that ends at byte %d is damaged and left out", path, end)
                continue
            yield end, message


def read_metrics(run_folder: RunFolder, include_superseded: bool = False) -> list[StoredRecord]:
    """All records of a run in the order they were written, over all its attempts.

    A restore from step S supersedes what earlier incarnations recorded for later steps, also where such a record
    arrived after it. System records belong to a node's time and are never superseded.
    """
    messages: list[tuple[int, dict[str, Any]]] = []
    restores: list[tuple[tuple[int, int], int]] = []
    for attempt in run_folder.attempts():
        for _, message in read_lines(attempt.metrics_jsonl):
            if message["kind"] in POINT_KINDS:
                messages.append((attempt.number, message))
            elif message["kind"] == "restore":
                restores.append(((attempt.number, message["incarnation"]), message["step"]))

    last_valid_step: dict[tuple[int, int], float] = {}
    records = []
    for number, message in messages:
        incarnation = (number, message["incarnation"])
        if incarnation not in last_valid_step:
            later = (step for restored, step in restores if restored > incarnation)
            last_valid_step[incarnation] = min(later, default=math.inf)
        superseded = message["kind"] == "metrics" and message["step"] > last_valid_step[incarnation]
        if include_superseded or not superseded:
            records.append(StoredRecord(**message, attempt=number, superseded=superseded))
    return records


def cut_torn_line(path: Path) -> None:
    """Remove a last line without newline, left by a controller that was killed, or found no room, while writing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    size = content.rfind(b"\n") + 1
    if size < len(content):
        os.truncate(path, size)
