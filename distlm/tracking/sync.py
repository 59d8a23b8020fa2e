"""Send to MLflow what it lacks of a run. Its `main` takes [--without-model] RUN_FOLDER: see commands/data_plane.py."""

from __future__ import annotations

from pathlib import Path

from distlm.compile_caches import keep_compile_caches
from distlm.config.attempt import accepted_attempts, load_attempt
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.errors import ExitCode, InfrastructureError, InputError
from distlm.metrics_file import cut_torn_line, encode_line, read_backwards
from distlm.outcome import tracker_status
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder, lease, read_json
from distlm.tracking import Tracker
from distlm.tracking.delivery import sync
from distlm.tracking.mlflow import MlflowTracker
from distlm.tracking.model_upload import upload_once
from distlm.tracking.records import now_ms


def connect_mlflow(config: RunConfig, run: RunFolder) -> MlflowTracker:
    """The MLflow run of a distlm run, where its config wants it."""
    return MlflowTracker.connect(
        run_id=run.run_id,
        run_name=config.name,
        experiment_name=config.tracking.experiment_name,
        runs_dir=run.runs_dir,
        tracking_uri=config.tracking.tracking_uri,
    )


def sync_run(run: RunFolder, *, with_model: bool = True) -> str:
    """Send everything that is missing; says what was sent. Raises DistlmError where that is not possible."""
    if not (attempts := accepted_attempts(run)):
        raise InputError(f"run {run.run_id} has no attempt yet, so there is nothing to send")
    config = load_attempt(run, attempts[-1]).config
    if "mlflow" not in config.tracking.report_to:
        raise InputError("tracking.report_to of this run does not name mlflow, so there is nothing to send")
    with lease(run):
        _close_abandoned(run)
        tracker = connect_mlflow(config, run)
        num_points = _sync(run, tracker)
        if with_model and run.model.is_dir() and config.tracking.log_model:
            registered_name = config.tracking.registered_model_name
            if problem := upload_once(run, tracker.mlflow_run_id, tracker.tracking_uri, registered_name):
                raise InfrastructureError(problem)
    return f"{num_points} points sent to {redact_uri(tracker.tracking_uri)}"


def _close_abandoned(run: RunFolder) -> None:
    """Record the end of an attempt whose controller was killed: it holds the lease no more, and said RUNNING last."""
    recorded = [attempt for attempt in run.attempts() if attempt.metrics_jsonl.exists()]
    if not recorded:
        raise InputError(f"no attempt of run {run.run_id} has recorded anything yet, so there is nothing to send")
    path = recorded[-1].metrics_jsonl
    said = (message for message in read_backwards(path, b'"status"') if message["kind"] == "status")
    if (last := next(said, None)) and last["status"] == "RUNNING":
        result = read_json(recorded[-1].result_json) or {}
        status = tracker_status(result.get("exit_code", ExitCode.INFRASTRUCTURE))
        cut_torn_line(path)
        with open(path, "ab") as file:
            file.write(encode_line({"kind": "status", "status": status, "timestamp_ms": now_ms()}))


def _sync(run: RunFolder, tracker: Tracker) -> int:
    try:
        return sync(run, tracker)
    except Exception as error:  # an outage of any kind
        raise InfrastructureError(f"MLflow does not take it now: {redact_uri(str(error))}") from error


def main(arguments: list[str]) -> int:
    run = RunFolder(Path(arguments[-1]))
    keep_compile_caches(run)
    say(sync_run(run, with_model="--without-model" not in arguments))
    return ExitCode.SUCCEEDED
