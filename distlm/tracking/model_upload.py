"""Upload a trained model to MLflow: `python -m distlm.tracking.model_upload RUN_FOLDER --mlflow-run-id ID`.

A process of its own, after training: it loads the model into memory, and what goes wrong here (exit code 1 and one
line) takes nothing else with it. MLFLOW_TRACKING_URI names the store; it may hold a password, so it is no argument.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from distlm.redact import redact_uri
from distlm.run_folder import RunFolder, read_json, write_json

_TIMEOUT_S = 3600.0
_POLL_INTERVAL_S = 0.2


def upload_once(
    run: RunFolder,
    mlflow_run_id: str,
    tracking_uri: str,
    registered_model_name: str | None,
    give_up: Callable[[], bool] = lambda: False,
) -> str:
    """Upload model/ in a child process unless this MLflow run has it; why that failed in one line, or "".

    model_upload.json in the run's folder remembers what was uploaded where.
    """
    done = read_json(run.model_upload_json)
    if done and done["mlflow_run_id"] == mlflow_run_id:
        return ""
    command = [sys.executable, "-m", __name__, str(run.path), "--mlflow-run-id", mlflow_run_id]
    if registered_model_name:
        command += ["--registered-model-name", registered_model_name]
    child = subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline_s = time.monotonic() + _TIMEOUT_S
    try:
        while True:
            try:
                out, err = child.communicate(timeout=_POLL_INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                if give_up():
                    return "the upload was stopped"
                if time.monotonic() > deadline_s:
                    return f"the upload took more than {_TIMEOUT_S:.0f} s"
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    print(redact_uri(out + err), flush=True)  # the controller's log
    lines = (out if child.returncode == 0 else err).strip().splitlines()
    if child.returncode != 0:
        return redact_uri(lines[-1]) if lines else f"exit code {child.returncode}"
    write_json(run.model_upload_json, {"mlflow_run_id": mlflow_run_id, "model_uri": lines[-1]})
    return ""


def upload_fill_mask(model_folder: Path, mlflow_run_id: str, registered_model_name: str | None = None) -> str:
    """Log a masked language model with its tokenizer as a fill-mask pipeline; returns its URI, models:/ID.

    `model_folder` is in Hugging Face format. Needs MLFLOW_TRACKING_URI. The model belongs to the given MLflow run,
    whose status stays as it is, and to that run's experiment; registering gives it a new version of the name.
    """
    import mlflow
    import mlflow.transformers
    from mlflow.models import Model
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForMaskedLM.from_pretrained(model_folder)
    run = mlflow.MlflowClient().get_run(mlflow_run_id)
    # Without this the model would belong to the experiment "Default", with its files in the current folder.
    mlflow.set_experiment(experiment_id=run.info.experiment_id)
    # Model.log is what mlflow.transformers.log_model calls; that one knows no run_id, only an active run, and making
    # the run active would set it to RUNNING.
    logged = Model.log(
        artifact_path=None,
        name="model",
        flavor=mlflow.transformers,
        run_id=mlflow_run_id,
        registered_model_name=registered_model_name,
        transformers_model=pipeline("fill-mask", model=model, tokenizer=tokenizer),
        # MLflow predicts the example once, which also gives the signature.
        input_example=f"An example with a {tokenizer.mask_token}.",
        # Guessing the requirements imports torchvision, which a text model does not need.
        pip_requirements=[_pinned(package) for package in ("torch", "transformers")],
    )
    return str(logged.model_uri)


def _pinned(package: str) -> str:
    """PACKAGE==VERSION without a local part such as +cpu, which package indexes do not have."""
    return f"{package}=={version(package).partition('+')[0]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distlm.tracking.model_upload", description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--mlflow-run-id", required=True)
    parser.add_argument("--registered-model-name")
    options = parser.parse_args(arguments)
    # Unlike delivery, an upload repeats no request by itself; and the hub knows nothing about a model of ours.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "3"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError("MLFLOW_TRACKING_URI is not set")
        folder = RunFolder(options.run_folder.absolute())
        uri = upload_fill_mask(folder.model, options.mlflow_run_id, options.registered_model_name)
    except Exception as error:  # noqa: BLE001 - any failure is one line and an exit code
        cause = redact_uri(" ".join(str(error).split()))
        print(f"model upload failed: {type(error).__name__}: {cause}", file=sys.stderr)
        return 1
    print(uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
