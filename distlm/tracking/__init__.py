"""Where a run's metrics, params and files are shown: what every tracker offers, and what all of them share.

A tracker repeats what attempts/NNN/metrics.jsonl already holds, so each method may be called again with the same
content and then adds nothing. This file imports the standard library only; a tracker's client library is imported by
the module that implements the tracker, which only the controller imports.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# Set here, because mlflow reads the first one while it is imported, and this package is imported before it (deepspeed
# imports mlflow in every worker). Delivery retries by itself and finds or creates the MLflow run anew each time; a
# retry inside one request could create it twice. The links that MLflow prints contain the password of the URI.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}.items():
    os.environ.setdefault(_name, _value)


class Point(NamedTuple):
    """One value of one curve."""

    key: str
    value: float
    timestamp_ms: int
    step: int


class RefusedError(Exception):
    """The tracker refuses this content and would refuse it again. Every other exception is an outage, to be retried."""


class Tracker(Protocol):
    """What the recorder needs of MLflow and its like. Methods raise `RefusedError`, or anything else for an outage."""

    @property
    def destination(self) -> str:
        """Names the place that receives this run: what one destination has had, another one has not."""

    def log_points(self, points: Sequence[Point]) -> None: ...

    def log_params(self, params: Mapping[str, str]) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_dataset(
        self,
        name: str,
        digest: str,
        source: str,
        context: str,
        columns: Mapping[str, str],
        profile: Mapping[str, Any],
    ) -> None: ...

    def log_artifact(self, path: Path, artifact_path: str | None) -> None: ...

    def set_status(self, status: str, timestamp_ms: int) -> None:
        """`status` is RUNNING, FINISHED, FAILED or KILLED; `timestamp_ms` is when that became true."""
