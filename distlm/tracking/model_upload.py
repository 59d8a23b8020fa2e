"""Upload a trained model to MLflow: `python -m distlm.tracking.model_upload RUN_FOLDER --mlflow-run-id ID`.

A process of its own, after training: it loads the model into memory, and what goes wrong here (exit code 1 and one
line) takes nothing else with it. MLFLOW_TRACKING_URI names the store; it may hold a password, so it is no argument.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distlm.errors import InputError
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder, read_json, read_yaml, write_json

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


@dataclass(frozen=True)
class Usage:
    """How a trained model is used as a pipeline of transformers."""

    pipeline: str
    """Its name: fill-mask, text-classification or token-classification."""
    auto_class: str
    """The class of the model."""
    arguments: dict[str, Any]
    """Of a call of the pipeline; `pyfunc` models call it with them."""
    example: str | list[dict[str, str]]
    """An input, where MASK stands for the tokenizer's mask token."""


def usage_of(run: RunFolder) -> Usage:
    """Raises InputError if a file of the run is damaged or missing."""
    tree, prepared = read_yaml(run.run_yaml), read_json(run.init / "prepared.json")
    try:
        task = tree["task"].get("type", "masked-lm")
        if task == "masked-lm":
            return Usage("fill-mask", "AutoModelForMaskedLM", {}, "An example with a MASK.")
        if task == "token-classification":
            # Entities as a whole; labels that spell none, such as parts of speech, stay as they are. With "O" among
            # them, because MLflow 3.17's pyfunc fails for a text in which nothing is found.
            strategy = "none" if prepared["tag_scheme"] == "none" else "first"
            words: dict[str, Any] = {"aggregation_strategy": strategy, "ignore_labels": []}
            return Usage(task, "AutoModelForTokenClassification", words, "Ann lives in New York.")
        arguments: dict[str, Any] = {"truncation": True, "max_length": tree["data"]["max_seq_length"]}
        if tree["task"]["problem_type"] == "multi_label_classification":
            arguments["top_k"] = None  # all labels, each with its probability
        has_pair = tree["data"]["train"][0].get("text_pair_column") is not None
        example = [{"text": "A text.", "text_pair": "Another one."}] if has_pair else "A text."
        return Usage(task, "AutoModelForSequenceClassification", arguments, example)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{run.run_yaml} or a file in {run.init} is damaged: {error!r}") from error


def upload_model(
    run: RunFolder, mlflow_run_id: str, registered_model_name: str | None = None, *, with_base: bool = True
) -> str:
    """Log the model of a run with its tokenizer as a pipeline of transformers; returns its URI, models:/ID.

    Needs MLFLOW_TRACKING_URI. The model belongs to the given MLflow run, whose status stays as it is, and to that run's
    experiment; registering gives it a new version of the name.

    An adapter is logged with the base model and the head's initial weights, so that it can be loaded anywhere; its own
    files are the run's artifact `adapter`, too, which PeftModel.from_pretrained loads.

    Args:
        with_base: of an adapter; false: the base model is not copied, but looked for in the run's folder.
    """
    import mlflow
    import transformers
    from huggingface_hub import ModelCard
    from mlflow.models import Model

    usage = usage_of(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model, trust_remote_code=False)
    is_adapter = (run.model / "adapter_config.json").exists()
    base = run.model
    if is_adapter:  # whose drawing may have changed the weights that it is for
        base = run.init / "base" if (run.init / "base").exists() else run.init / "model"
    model = getattr(transformers, usage.auto_class).from_pretrained(base, trust_remote_code=False)
    packages, others = ["torch", "transformers"], {}
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, run.model)
        packages.append("peft")
        if not with_base:
            others = {"base_model_path": str(base.absolute())}
    card = run.model / "README.md"
    example = usage.example
    if isinstance(example, str) and tokenizer.mask_token:
        example = example.replace("MASK", tokenizer.mask_token)
    mlflow_run = mlflow.MlflowClient().get_run(mlflow_run_id)
    # Without this the model would belong to the experiment "Default", with its files in the current folder.
    mlflow.set_experiment(experiment_id=mlflow_run.info.experiment_id)
    # Model.log is what mlflow.transformers.log_model calls; that one knows no run_id, only an active run, and making
    # the run active would set it to RUNNING.
    logged = Model.log(
        artifact_path=None,
        name="model",
        flavor=_Flavor(base if is_adapter and with_base else None),
        run_id=mlflow_run_id,
        registered_model_name=registered_model_name,
        transformers_model={"model": model, "tokenizer": tokenizer},
        task=usage.pipeline,
        model_config=usage.arguments or None,
        # MLflow predicts the example once, which also gives the signature.
        input_example=example,
        model_card=ModelCard.load(card) if card.exists() else None,
        # Guessing the requirements imports torchvision, which a text model does not need.
        pip_requirements=[_pinned(package) for package in packages],
        **others,
    )
    if is_adapter:
        mlflow.MlflowClient().log_artifacts(mlflow_run_id, str(run.model), "adapter")
    return str(logged.model_uri)


class _Flavor:
    """MLflow's flavor transformers, which `Model.log` saves a model with; of an adapter with a base that is usable.

    MLflow 3.17 takes for the base model the one that PEFT has put the adapter into, whose weights have other names:
    `load_model` draws what it does not find at random, without an error.
    """

    __name__ = "mlflow.transformers"

    def __init__(self, base: Path | None) -> None:
        """`base`: folder of the model that an adapter belongs to; None: nothing is to be corrected."""
        self._base = base

    def save_model(self, path: str, mlflow_model: Any, **arguments: Any) -> None:
        import mlflow.transformers

        mlflow.transformers.save_model(path=path, mlflow_model=mlflow_model, **arguments)
        if self._base is not None:
            shutil.rmtree(Path(path) / "model")
            shutil.copytree(self._base, Path(path) / "model")


def _pinned(package: str) -> str:
    """PACKAGE==VERSION without a local part such as +cpu, which package indexes do not have."""
    return f"{package}=={version(package).partition('+')[0]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m distlm.tracking.model_upload", description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--mlflow-run-id", required=True)
    parser.add_argument("--registered-model-name")
    parser.add_argument("--without-base", action="store_true", help="of an adapter: do not copy its base model")
    options = parser.parse_args(arguments)
    # Unlike delivery, an upload repeats no request by itself; and the hub knows nothing about a model of ours.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "3"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ValueError("MLFLOW_TRACKING_URI is not set")
        folder = RunFolder(options.run_folder.absolute())
        uri = upload_model(
            folder, options.mlflow_run_id, options.registered_model_name, with_base=not options.without_base
        )
    except Exception as error:  # noqa: BLE001 - any failure is one line and an exit code
        cause = redact_uri(" ".join(str(error).split()))
        print(f"model upload failed: {type(error).__name__}: {cause}", file=sys.stderr)
        return 1
    print(uri)
    return 0


if __name__ == "__main__":
    sys.exit(main())
