"""Where a run is recorded in MLflow: the rule that the controller, and the commands that show a run, go by.

Neutral ground of both planes: the standard library and the run folder only.
"""

from __future__ import annotations

import os
from pathlib import Path

from distlm.run_folder import RunFolder, read_json


def embedded_store(runs_dir: Path) -> str:
    """URI of the SQLite store inside a runs folder."""
    return f"sqlite:///{runs_dir.absolute() / 'mlflow.db'}"


def choose_tracking_uri(tracking_uri: str | None, runs_dir: Path) -> str:
    """The given URI, else MLFLOW_TRACKING_URI, else the embedded store of `runs_dir`. May hold a password."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or embedded_store(runs_dir)


MLFLOW_DESTINATION = "mlflow:"
"""Before the id of the MLflow run: the destination in attempts/NNN/metrics.sent.json."""


def mlflow_run_id(run: RunFolder) -> str | None:
    """The MLflow run that this run was delivered to last; None: to none yet. Raises InputError for a damaged file."""
    for attempt in reversed(run.attempts()):
        sent = read_json(attempt.metrics_sent_json)
        destination = sent.get("destination") if isinstance(sent, dict) else None
        if isinstance(destination, str) and destination.startswith(MLFLOW_DESTINATION):
            return destination.removeprefix(MLFLOW_DESTINATION)
    return None
