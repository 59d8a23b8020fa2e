"""One distlm run as one MLflow run, on a tracking server or in the embedded store RUNS_DIR/mlflow.db.

The only module that imports mlflow (2.7 s), besides model_upload.py. Only the controller imports it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from distlm.errors import AttestationError, InfrastructureError, InputError, Problem
from distlm.mlflow_store import MLFLOW_DESTINATION, choose_tracking_uri, embedded_store
from distlm.redact import redact_uri
from distlm.tracking import Point, RefusedError

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

RUN_ID_TAG = "distlm.run_id"

# Limits of MLflow's REST interface (mlflow/utils/validation.py).
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DIGEST_LENGTH = 36

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


class MlflowTracker:
    """The MLflow run of one distlm run (see `distlm.tracking.Tracker`). Made by `connect`."""

    def __init__(self, client: MlflowClient, mlflow_run_id: str, tracking_uri: str) -> None:
        self.mlflow_run_id = mlflow_run_id
        self.tracking_uri = tracking_uri  # may hold a password: print only redact_uri(tracking_uri)
        self._client = client

    @classmethod
    def connect(
        cls,
        run_id: str,
        run_name: str,
        experiment_name: str,
        runs_dir: Path,
        tracking_uri: str | None = None,
        start_time_ms: int | None = None,
    ) -> MlflowTracker:
        """Find the MLflow run that is tagged with `run_id` in the experiment, or create it, and the experiment too.

        Raises:
            AttestationError: several MLflow runs carry the tag.
            InputError: the experiment was deleted, or MLflow refuses its name or the tracking URI.
            InfrastructureError: the server or the store cannot be reached.
        """
        try:
            return cls._connect(run_id, run_name, experiment_name, runs_dir, tracking_uri, start_time_ms)
        except RefusedError as error:
            raise InputError(Problem(f"MLflow refuses this: {error}", "tracking")) from None

    @classmethod
    def _connect(
        cls,
        run_id: str,
        run_name: str,
        experiment_name: str,
        runs_dir: Path,
        tracking_uri: str | None,
        start_time_ms: int | None,
    ) -> MlflowTracker:
        uri = choose_tracking_uri(tracking_uri, runs_dir)
        embedded = uri == embedded_store(runs_dir)
        # MLflow fills a fresh SQLite file step by step: of three processes that open one together, two fail.
        with _translated_errors(), _locked(runs_dir / ".mlflow.lock") if embedded else nullcontext():
            if embedded:
                (runs_dir / "mlflow.db").touch()  # as the umask says; SQLite would deny the group to write to it
            client = MlflowClient(tracking_uri=uri)
            # Without a server MLflow would put artifacts into the current folder.
            artifacts = (runs_dir.absolute() / "mlartifacts").as_uri() if embedded else None
            experiment_id = _find_or_create_experiment(client, experiment_name, artifacts)
            mlflow_run_id = _find_run(client, experiment_id, run_id)
            if mlflow_run_id is None:
                run = client.create_run(experiment_id, start_time_ms, {RUN_ID_TAG: run_id}, run_name)
                mlflow_run_id = run.info.run_id
        return cls(client, mlflow_run_id, uri)

    @property
    def destination(self) -> str:
        return f"{MLFLOW_DESTINATION}{self.mlflow_run_id}"

    def log_points(self, points: Sequence[Point]) -> None:
        """MLflow keeps NaN, shows an infinity as the largest float, and ignores a point that it has already."""
        with _translated_errors():
            for batch in _batches(points, _METRICS_PER_BATCH):
                metrics = [Metric(p.key, p.value, p.timestamp_ms, p.step) for p in batch]
                self._client.log_batch(self.mlflow_run_id, metrics=metrics)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log the params that the run lacks. MLflow refuses to change one, so another value is only warned about."""
        with _translated_errors():
            known = self._client.get_run(self.mlflow_run_id).data.params
            cut = {key: str(value)[:_PARAM_LENGTH] for key, value in params.items()}
            for key, value in cut.items():
                if key in known and known[key] != value:
                    _log.warning("MLflow keeps the param %s = %s; this attempt has %s", key, known[key], value)
            missing = [Param(key, value) for key, value in cut.items() if key not in known]
            for batch in _batches(missing, _PARAMS_PER_BATCH):
                self._client.log_batch(self.mlflow_run_id, params=batch)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        with _translated_errors():
            entities = [RunTag(key, str(value)[:_TAG_LENGTH]) for key, value in tags.items()]
            for batch in _batches(entities, _PARAMS_PER_BATCH):
                self._client.log_batch(self.mlflow_run_id, tags=batch)

    def log_dataset(
        self,
        name: str,
        digest: str,
        source: str,
        context: str,
        columns: Mapping[str, str],
        profile: Mapping[str, Any],
    ) -> None:
        """Log a dataset as an input of the run, by description only: nothing is read.

        `source` is a path, a URI or hf://datasets/NAME[@REVISION]; `columns` maps names to MLflow's types (string,
        long, double, boolean). MLflow knows a dataset by its name and the first 36 characters of `digest`.
        """
        kind, location = _dataset_source(source)
        schema = {"mlflow_colspec": [{"name": n, "type": t, "required": True} for n, t in columns.items()]}
        dataset = Dataset(
            name=name,
            digest=digest[:_DIGEST_LENGTH],
            source_type=kind,
            source=location,
            schema=json.dumps(schema) if columns else None,
            profile=json.dumps(dict(profile)) if profile else None,
        )
        with _translated_errors():
            tags = [InputTag("mlflow.data.context", context)]
            self._client.log_inputs(self.mlflow_run_id, [DatasetInput(dataset, tags)])

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Copy a file, or a folder with all it contains, into the run's artifacts."""
        if not path.exists():
            raise RefusedError(f"{path} does not exist any more")
        with _translated_errors():
            self._client.log_artifact(self.mlflow_run_id, str(path), artifact_path)

    def set_status(self, status: str, timestamp_ms: int) -> None:
        with _translated_errors():
            if status == "RUNNING":
                self._client.update_run(self.mlflow_run_id, status)
            else:
                self._client.set_terminated(self.mlflow_run_id, status, timestamp_ms)


def _find_or_create_experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another run created it a moment ago.
            return _find_or_create_experiment(client, name, artifact_location)
    if experiment.lifecycle_stage == "deleted":
        restore = f"choose another name or run `mlflow experiments restore -x {experiment.experiment_id}`"
        raise InputError(Problem(f"this MLflow experiment was deleted; {restore}", "tracking.experiment_name", name))
    return str(experiment.experiment_id)


def _find_run(client: MlflowClient, experiment_id: str, run_id: str) -> str | None:
    runs = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{run_id}'")
    if len(runs) > 1:
        found = ", ".join(run.info.run_id for run in runs)
        raise AttestationError(
            f"{len(runs)} MLflow runs of experiment {experiment_id} carry the tag {RUN_ID_TAG} = {run_id}: {found}; "
            "delete all but one of them, then resume the run"
        )
    return runs[0].info.run_id if runs else None


def _dataset_source(source: str) -> tuple[str, str]:
    """The source type and JSON that MLflow's own DatasetSource classes write for `source`."""
    if source.startswith("hf://datasets/"):
        name, _, revision = source.removeprefix("hf://datasets/").partition("@")
        return "hugging_face", json.dumps({"path": name, "revision": revision or None})
    if source.startswith(("http://", "https://")):
        return "http", json.dumps({"url": redact_uri(source)})
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", source)
    return scheme[1] if scheme and scheme[1] != "file" else "local", json.dumps({"uri": source})


def _batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Tell refusals from outages, and keep the URI's password, which MLflow quotes, out of both."""
    try:
        yield
    except MlflowException as error:
        text = redact_uri(str(error))
        if error.error_code in _REFUSALS:
            raise RefusedError(text) from None
        raise InfrastructureError(f"MLflow: {text}") from None
