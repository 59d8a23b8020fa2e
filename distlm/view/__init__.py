"""What people and programs see of an attempt while it runs: events in; a screen, lines or JSON out.

An event is a dictionary that JSON can hold, with `event`, its kind, and `time`, UTC in ISO 8601:

    begin        run_id, run_name, attempt, folder, log, task, num_workers, zero_stage, mixed_precision, tracking
                 (where the curves are: a server's address, or the command that shows them; empty: nowhere)
    phase        phase: ray, prepare, workers, export or upload; message      what is being done now
    note         message
    warning      message
    preparation  stage, bytes_done, bytes_total (0: not known), num_documents, num_tokens   how far the data is
    training     step, total_steps, device     the workers train from here: `step` is the last one done before;
                 device: cpu or cuda, and may be left out
    metrics      step, total_steps, values     train/..., throughput/..., memory/...; eval/...; time/checkpoint_s
    stopping     message                       asked to stop: what happens now
    result       what result.json holds        always the last

The controller sends them, the command that waits for it shows them: `distlm submit --json` prints them as they are.
This package belongs to the control plane.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from distlm.metrics_file import finite
from distlm.redact import redacted

Event = Mapping[str, Any]


def make_event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **redacted(fields)}


def encode_event(event: Event) -> str:
    """One line of JSON; numbers that JSON has not are the strings NaN, Infinity and -Infinity, as in metrics.jsonl."""
    return json.dumps(finite(event)) + "\n"


def decode_event(line: str) -> Event:
    event = json.loads(line)
    if event["event"] == "metrics":
        event["values"] = {name: float(value) for name, value in event["values"].items()}
    return event


class View(Protocol):
    """Shows events. A reader that has gone (a closed pipe, a terminal that hung up) raises nothing."""

    def show(self, event: Event) -> None: ...

    def stop_requested(self, count: int) -> None:
        """The user has asked to stop for the `count`th time. Called in a signal handler, also in the middle of `show`:
        it takes no lock and writes to no buffered stream."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was. Called once, after the last event, or without one where the attempt died."""
        ...
