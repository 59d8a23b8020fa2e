"""`distlm submit` and `resume` as a user runs them, with real Ray: what a run leaves, and how it ends when it is hurt.

One folder is shared by all runs here, so the corpus is tokenised once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from place import (
    GLOBAL_BATCH,
    Command,
    Place,
)
from saved_state import saved_weights

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.store import MANIFEST_NAME, CheckpointStore
from distlm.errors import ExitCode
from distlm.metrics_file import read_lines
from distlm.run_folder import RunFolder, lease, read_json
from distlm.tracking.startup import startup_seconds


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("submit"))


@pytest.fixture(scope="module")
def success(place: Place) -> Command:
    """The first run, to its end."""
    command = place.start("submit", "run.yaml", "profile.steps=12-13", "tracking.log_model=true")
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    return command


def history(place: Place, run: RunFolder, key: str) -> list[int]:
    """The steps at which MLflow has a metric, one for each point."""
    return [point.step for point in place.client.get_metric_history(place.mlflow_run(run).info.run_id, key)]


class TestSuccess:
    def test_it_says_what_happens_and_where_things_are(self, success: Command) -> None:
        lines = success.out.splitlines()
        assert lines[0] == f"run {success.run.run_id} in runs/{success.run.run_id}"
        point = re.compile(r"step +5/20  loss \d\.\d{4}  [\d,]+ tokens/s  MFU \d+\.\d%  \d\.\d\d GiB  ETA .+")
        assert any(point.fullmatch(line) for line in lines)
        assert any(line.startswith("step 20/20  eval loss") for line in lines)
        run_id = success.run.run_id
        assert lines[-1] == f"succeeded: model in runs/{run_id}/model; curves: distlm ui {run_id}"
        assert success.err == ""

    def test_nothing_else_is_left(self, place: Place, success: Command) -> None:
        place.require_nothing_left(success.run)
        left = {path.name for path in place.folder.iterdir() if not path.name.startswith("command-")}
        assert left == {"run.yaml", "corpus.jsonl", "home", "tmp", "runs"}

    def test_the_result_says_succeeded(self, success: Command) -> None:
        result = read_json(success.run.attempts()[-1].result_json)
        assert (result["state"], result["exit_code"], result["problems"]) == ("succeeded", 0, [])

    def test_mlflow_has_one_finished_run_with_params_and_tags(self, place: Place, success: Command) -> None:
        run = place.mlflow_run(success.run)
        assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny")
        assert run.data.params["training.learning_rate"] == "0.01"
        assert run.data.params["model.config.hidden_size"] == "32"
        assert not any(key.startswith(("resources.", "tracking.")) for key in run.data.params)
        tags = run.data.tags
        assert (tags["distlm.world_size"], tags["distlm.zero_stage"], tags["distlm.target"]) == ("2", "2", "local")
        assert tags["distlm.version.torch"] == torch.__version__

    def test_mlflow_has_each_point_once(self, place: Place, success: Command) -> None:
        for key in (
            "train/loss", "learning_rate", "grad_norm", "epoch", "throughput/tokens_per_s", "throughput/device/mfu",
            "time/step_s", "memory/peak_gib",
        ):  # fmt: skip
            assert history(place, success.run, key) == [1, 5, 10, 15, 20], key
        for key in ("eval/loss", "eval/perplexity", "eval/accuracy"):
            assert history(place, success.run, key) == [10, 20], key
        assert history(place, success.run, "time/startup_s") == [1]
        metrics = place.mlflow_run(success.run).data.metrics
        assert any(key.startswith("system/0/") for key in metrics)
        assert metrics["learning_rate"] == pytest.approx(1e-2) and metrics["grad_norm"] > 0
        assert 0 < metrics["throughput/device/mfu"] < 1
        assert metrics["epoch"] == pytest.approx(20 * GLOBAL_BATCH / prepared(success.run)["num_train_samples"])

    def test_the_start_is_told_phase_by_phase(self, place: Place, success: Command) -> None:
        phases = startup_seconds(message for _, message in read_lines(success.run.attempts()[0].metrics_jsonl))
        assert [*phases] == ["ray", "preflight", "prepare", "place", "import", "build", "load", "first_step"]
        assert all(seconds >= 0 for seconds in phases.values())
        metrics = place.mlflow_run(success.run).data.metrics
        assert metrics["time/startup_s"] == pytest.approx(sum(phases.values()), abs=0.01)

    def test_the_map_of_a_step(self, place: Place, success: Command) -> None:
        folder = success.run.attempts()[-1].profile
        names = {"step_map.md", "rank-00000.trace.json", "rank-00001.trace.json"}
        assert {file.name for file in folder.iterdir()} == names
        text = (folder / "step_map.md").read_text()
        assert text.strip() in success.out
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        mean_ms = {row[0].removeprefix("| "): float(row[1]) for row in rows[1:]}
        assert mean_ms.pop("all") == pytest.approx(sum(mean_ms.values()), abs=0.5)
        assert min(mean_ms[phase] for phase in ("forward", "head", "backward", "reduction", "optimizer")) > 0
        run_id = place.mlflow_run(success.run).info.run_id
        sent = place.client.list_artifacts(run_id, "attempts/001/profile")
        assert [Path(file.path).name for file in sent] == ["step_map.md"]

    def test_the_loss_falls(self, place: Place, success: Command) -> None:
        run_id = place.mlflow_run(success.run).info.run_id
        losses = [point.value for point in place.client.get_metric_history(run_id, "train/loss")]
        assert losses[0] == pytest.approx(np.log(padded_vocab_size(success.run)), abs=0.1)
        assert losses[-1] < losses[0] - 0.5

    def test_mlflow_has_config_logs_and_data(self, place: Place, success: Command) -> None:
        run = place.mlflow_run(success.run)
        names = {file.path for file in place.client.list_artifacts(run.info.run_id)}
        assert {"run.yaml", "attempts"} <= names
        logs = {Path(file.path).name for file in place.client.list_artifacts(run.info.run_id, "attempts/001/logs")}
        assert {"controller.log", "prepare.log", "rank-00000.log", "rank-00001.log"} <= logs
        info = prepared(success.run)["data_info"]
        inputs = {item.dataset.name: (item.dataset.digest, item.tags[0].value) for item in run.inputs.dataset_inputs}
        assert inputs == {
            "train": (info["train"]["content_sha256"][:32], "training"),
            "validation": (info["validation"]["content_sha256"][:32], "evaluation"),
        }

    def test_the_logged_model_predicts(self, place: Place, success: Command) -> None:
        import mlflow

        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(f"sqlite:///{place.runs_dir / 'mlflow.db'}")
        try:
            pipeline = mlflow.transformers.load_model(read_json(success.run.model_upload_json)["model_uri"])
        finally:
            mlflow.set_tracking_uri(before)
        assert len(pipeline(f"a {pipeline.tokenizer.mask_token} b")) == 5

    def test_the_model_is_the_last_checkpoint(self, success: Command) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        model = AutoModelForMaskedLM.from_pretrained(success.run.model, dtype=torch.float32)
        last = CheckpointStore(success.run.checkpoints).checkpoints()[0]
        assert last.step == 20
        parameters = saved_weights(last.path)
        assert {name for name, _ in model.named_parameters()} == parameters.keys()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, parameters[name]), name
        tokenizer = AutoTokenizer.from_pretrained(success.run.model)
        assert len(tokenizer) == prepared(success.run)["vocab_size"]
        assert len(tokenizer) < model.config.vocab_size == padded_vocab_size(success.run)

    def test_a_resume_of_a_succeeded_run_does_nothing(self, place: Place, success: Command) -> None:
        command = place.start("resume", "last")
        assert command.wait() == ExitCode.SUCCEEDED
        assert command.out == f"run {success.run.run_id} has succeeded; nothing to do\n"
        assert len(success.run.attempts()) == 1

    def test_a_resume_with_another_learning_rate_is_refused(self, place: Place, success: Command) -> None:
        command = place.start("resume", success.run.run_id, "training.learning_rate=0.5", "training.max_steps=30")
        assert command.wait() == ExitCode.BAD_INPUT
        assert "training.learning_rate" in command.err and "cannot be changed on resume" in command.err
        assert "training.max_steps" not in command.err
        assert len(success.run.attempts()) == 1

    def test_a_resume_of_a_run_that_is_being_trained_is_refused(self, place: Place, success: Command) -> None:
        with lease(success.run):
            command = place.start("resume", success.run.run_id, "training.max_steps=30")
            assert command.wait() == ExitCode.BAD_INPUT
        assert f"is being trained by process {os.getpid()} on" in command.err
        assert len(success.run.attempts()) == 1

    def test_a_resume_with_more_steps_goes_on_in_the_same_mlflow_run(self, place: Place, success: Command) -> None:
        command = place.start("resume", success.run.run_id, "training.max_steps=30")
        assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
        assert "(from the cache)" in command.out and "continuing from checkpoint step-00000020" in command.out
        run = place.mlflow_run(success.run)
        assert run.info.status == "FINISHED" and run.data.tags["distlm.attempt"] == "2"
        assert history(place, success.run, "train/loss") == [1, 5, 10, 15, 20, 25, 30]
        assert history(place, success.run, "eval/loss") == [10, 20, 30]
        assert CheckpointStore(success.run.checkpoints).checkpoints()[0].step == 30
        place.require_nothing_left(success.run)

    def test_a_resume_from_another_format_is_refused_and_loses_nothing(self, place: Place, success: Command) -> None:
        """As if another version of distlm had written the newest one; the one before it is good."""
        newest, *others = CheckpointStore(success.run.checkpoints).checkpoints()
        assert others
        path = newest.path / MANIFEST_NAME
        text = path.read_text()
        path.write_text(Manifest.from_json(text).model_copy(update={"format_version": 99}).to_json())
        before = history(place, success.run, "train/loss"), sorted(success.run.checkpoints.rglob("*"))
        command = place.start("resume", success.run.run_id, "training.max_steps=40")
        assert command.wait() == ExitCode.INFRASTRUCTURE, (command.out, command.err)
        cause = command.err.splitlines()[0]
        assert "has format version 99, and this distlm reads 2; use the distlm that wrote it; log: " in cause
        assert str(path) in cause and "starting 2 workers" not in command.out
        assert (history(place, success.run, "train/loss"), sorted(success.run.checkpoints.rglob("*"))) == before
        assert place.mlflow_run(success.run).info.status == "FINISHED"
        path.write_text(text)


def padded_vocab_size(run: RunFolder) -> int:
    """Embeddings of the model: the tokenizer's tokens, and as many more as make a multiple of 64."""
    return -(-prepared(run)["vocab_size"] // 64) * 64


def prepared(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = read_json(run.init / "prepared.json")
    return found
