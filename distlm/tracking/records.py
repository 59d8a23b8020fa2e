"""Points of metrics: as they are measured, and as a reader of a run's metrics.jsonl files (distlm/metrics_file.py) sees
them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distlm.metrics_file import POINT_KINDS, read_lines
from distlm.run_folder import RunFolder


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
