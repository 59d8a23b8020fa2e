"""MLflow for real: the embedded SQLite store, a tracking server that dies and comes back, and a model upload."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow_server import clean_environment, free_port, mlflow_server

from distlm.controller.recorder import Recorder
from distlm.errors import AttestationError, InfrastructureError, InputError
from distlm.run_folder import RunFolder, read_json, write_yaml
from distlm.tracking import Point, RefusedError
from distlm.tracking.delivery import sync
from distlm.tracking.mlflow import RUN_ID_TAG, MlflowTracker
from distlm.tracking.records import Record

OPEN_A_STORE = """
import sys
from pathlib import Path
from distlm.tracking.mlflow import MlflowTracker
import mlflow.telemetry
tracker = MlflowTracker.connect(sys.argv[1], "name", "shared", Path(sys.argv[2]))
assert mlflow.telemetry.get_telemetry_client() is None, "telemetry is on"
print(tracker.mlflow_run_id)
"""


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]], Path]:
    """A store that three processes opened together when it was fresh: its folder, how they ended, their home."""
    runs_dir, home = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("home")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_A_STORE, f"run-{number}", str(runs_dir)],
            cwd=home,
            env=clean_environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    ended = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, output, errors))
    return runs_dir, ended, home


@pytest.fixture
def runs_dir(embedded: tuple[Path, Any, Path]) -> Path:
    return embedded[0]


@pytest.fixture
def tracker(runs_dir: Path, request: pytest.FixtureRequest) -> MlflowTracker:
    return MlflowTracker.connect(request.node.name, "name", "tests", runs_dir, start_time_ms=1000)


def history(tracker: MlflowTracker, key: str) -> list[tuple[int, float, int]]:
    points = MlflowClient(tracker.tracking_uri).get_metric_history(tracker.mlflow_run_id, key)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def stored_run(tracker: MlflowTracker) -> Any:
    return MlflowClient(tracker.tracking_uri).get_run(tracker.mlflow_run_id)


def wait_until(condition: Callable[[], object], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_three_processes_open_a_fresh_store_together(
    embedded: tuple[Path, list[subprocess.CompletedProcess[str]], Path],
) -> None:
    runs_dir, ended, home = embedded
    assert [process.returncode for process in ended] == [0, 0, 0], ended
    client = MlflowClient(f"sqlite:///{runs_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    assert experiment.artifact_location == (runs_dir / "mlartifacts").as_uri()
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags[RUN_ID_TAG] for run in runs) == ["run-0", "run-1", "run-2"]
    assert sorted(run.info.run_id for run in runs) == sorted(process.stdout.strip() for process in ended)
    assert list(home.iterdir()) == [], "nothing may be written to the home or the current folder"


def test_a_resumed_run_is_the_same_mlflow_run(runs_dir: Path, tracker: MlflowTracker) -> None:
    tracker.set_status("KILLED", timestamp_ms=5000)
    info = stored_run(tracker).info
    assert (info.status, info.start_time, info.end_time, info.run_name) == ("KILLED", 1000, 5000, "name")
    again = MlflowTracker.connect("test_a_resumed_run_is_the_same_mlflow_run", "name", "tests", runs_dir)
    assert again.destination == tracker.destination
    again.set_status("RUNNING", timestamp_ms=6000)
    assert stored_run(tracker).info.status == "RUNNING"
    again.set_status("FINISHED", timestamp_ms=7000)
    assert (stored_run(tracker).info.status, stored_run(tracker).info.end_time) == ("FINISHED", 7000)


def test_two_mlflow_runs_with_the_tag_are_refused_by_name(runs_dir: Path, tracker: MlflowTracker) -> None:
    run_id = stored_run(tracker).data.tags[RUN_ID_TAG]
    client = MlflowClient(tracker.tracking_uri)
    twin = client.create_run(stored_run(tracker).info.experiment_id, tags={RUN_ID_TAG: run_id})
    with pytest.raises(AttestationError) as error:
        MlflowTracker.connect(run_id, "name", "tests", runs_dir)
    assert twin.info.run_id in str(error.value)
    assert tracker.mlflow_run_id in str(error.value)


def test_params_are_logged_once_and_a_changed_one_is_only_a_warning(
    tracker: MlflowTracker, caplog: pytest.LogCaptureFixture
) -> None:
    params = {f"group.key_{number}": str(number) for number in range(250)} | {"long": "x" * 7000}
    tracker.log_params(params)
    tracker.log_params(params)
    assert not caplog.records
    tracker.log_params(params | {"group.key_7": "other", "new": "1"})
    assert "group.key_7 = 7; this attempt has other" in caplog.text
    stored = stored_run(tracker).data.params
    assert len(stored) == 252
    assert (stored["group.key_7"], stored["new"], len(stored["long"])) == ("7", "1", 6000)


def test_a_point_sent_twice_is_there_once(tracker: MlflowTracker) -> None:
    points = [Point("train/loss", float(step), 1000 + step, step) for step in range(1500)]
    points += [Point("train/loss", math.nan, 9000, 1500), Point("train/loss", math.inf, 9001, 1501)]
    points += [Point("system/0/cpu_utilization_percentage", 50.0, 9002, 3)]
    tracker.log_points(points)
    tracker.log_points(points)
    stored = history(tracker, "train/loss")
    assert [step for step, _, _ in stored] == list(range(1502))
    assert stored[10] == (10, 10.0, 1010)
    assert math.isnan(stored[1500][1])
    assert stored[1501][1] == sys.float_info.max, "MLflow shows infinity as the largest float"
    assert history(tracker, "system/0/cpu_utilization_percentage") == [(3, 50.0, 9002)]


def test_tags_beyond_one_request_and_a_long_one(tracker: MlflowTracker) -> None:
    tracker.set_tags({f"attempt.{number}": "local" for number in range(150)} | {"long": "x" * 9000})
    tags = stored_run(tracker).data.tags
    assert tags["attempt.149"] == "local"
    assert len(tags["long"]) == 8000


@pytest.mark.parametrize(
    ("source", "source_type", "location"),
    [
        ("/data/peps", "local", {"uri": "/data/peps"}),
        ("s3://bucket/peps", "s3", {"uri": "s3://bucket/peps"}),
        ("https://host/peps.csv", "http", {"url": "https://host/peps.csv"}),
        ("hf://datasets/owner/peps@abc", "hugging_face", {"path": "owner/peps", "revision": "abc"}),
    ],
)
def test_a_dataset_is_an_input_of_the_run(
    tracker: MlflowTracker, source: str, source_type: str, location: dict[str, str]
) -> None:
    for _ in range(2):
        tracker.log_dataset(source, "d" * 64, source, "training", {"text": "string"}, {"num_rows": 5})
    [logged] = stored_run(tracker).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == (source, "d" * 36)
    assert logged.dataset.source_type == source_type
    assert json.loads(logged.dataset.profile) == {"num_rows": 5}
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]
    # MLflow's own reader understands what was written.
    read = mlflow.data.get_source(logged).to_dict()
    assert {key: read[key] for key in location} == location


def test_artifacts_lie_beside_the_store(runs_dir: Path, tracker: MlflowTracker, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    tracker.log_artifact(tmp_path / "run.yaml", "config")
    [stored] = (runs_dir / "mlartifacts").glob(f"{tracker.mlflow_run_id}/artifacts/config/run.yaml")
    assert stored.read_text() == "seed: 1\n"
    with pytest.raises(RefusedError, match="does not exist"):
        tracker.log_artifact(tmp_path / "missing")


def test_what_mlflow_refuses_is_told_from_an_outage(runs_dir: Path, tracker: MlflowTracker) -> None:
    with pytest.raises(RefusedError):
        tracker.log_points([Point("a//b", 1.0, 1, 1)])
    client = MlflowClient(tracker.tracking_uri)
    client.delete_experiment(client.create_experiment("deleted", "file:///nowhere"))
    with pytest.raises(InputError, match="restore"):
        MlflowTracker.connect("run", "name", "deleted", runs_dir)
    with pytest.raises(InputError, match="refuses"):
        MlflowTracker.connect("run", "name", "tests", runs_dir, tracking_uri="ftp://host")


def test_a_password_in_the_uri_is_in_no_message(tmp_path: Path) -> None:
    uri = f"http://someone:hidden-word@127.0.0.1:{free_port()}"
    with pytest.raises(InfrastructureError) as error:
        MlflowTracker.connect("run", "name", "tests", tmp_path, tracking_uri=uri)
    message = "".join(traceback.format_exception(error.value))
    assert "127.0.0.1" in message
    assert "hidden-word" not in message


def test_a_server_that_dies_in_mid_run_misses_nothing_and_has_nothing_twice(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    run = RunFolder.create(tmp_path, "run")
    run.run_yaml.write_text("seed: 1\n")
    attempt = run.new_attempt()

    def connect() -> MlflowTracker:
        return MlflowTracker.connect(run.run_id, "name", "tests", tmp_path, uri)

    def record(first_step: int, last_step: int, incarnation: int = 0) -> None:
        for step in range(first_step, last_step + 1):
            values = {"train/loss": step + incarnation / 10, "train/learning_rate": 0.1}
            recorder.record([Record(step, incarnation, 1000 * incarnation + step, values).to_message()])

    recorder = Recorder(run, attempt, connect)
    recorder.log_params({"seed": "1"})
    record(1, 10)
    assert not recorder.check_tracker(timeout_s=0), "the server does not run yet"
    with mlflow_server(tmp_path, port):
        wait_until(lambda: (read_json(attempt.path / "metrics.sent.json") or {}).get("offset", 0) > 0)
        record(11, 20)
    record(21, 30)
    wait_until(lambda: recorder.tracker_problem)
    recorder.log_artifact(run.run_yaml)
    recorder.restored(step=15, incarnation=1)
    record(16, 40, incarnation=1)
    with mlflow_server(tmp_path, port):
        assert recorder.close("FINISHED", timeout_s=60)
        tracker = connect()
        expected = [(step, float(step), step) for step in range(1, 31)]
        expected += [(step, step + 0.1, 1000 + step) for step in range(31, 41)]
        assert history(tracker, "train/loss") == expected
        assert len(history(tracker, "train/learning_rate")) == 40

        # As after a crash between MLflow's answer and the acknowledgement: all is sent again, nothing is added.
        (attempt.path / "metrics.sent.json").unlink()
        assert sync(run, tracker) == 80
        assert history(tracker, "train/loss") == expected
        stored = stored_run(tracker)
        assert stored.info.status == "FINISHED"
        assert stored.data.params == {"seed": "1"}
        assert list((tmp_path / "files").rglob("run.yaml"))


@pytest.fixture
def trained(tmp_path: Path) -> RunFolder:
    """A run whose training ended: a tiny BERT with its tokenizer in model/."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    run = RunFolder.create(tmp_path, "run")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "an", "example", "with", "a", ".", "cat", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    write_yaml(run.run_yaml, {"task": {"type": "masked-lm"}})
    return run


def upload(run: RunFolder, home: Path, tracking_uri: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distlm.tracking.model_upload", str(run.path), *arguments],
        check=False,
        cwd=home,
        env=clean_environment(home) | {"MLFLOW_TRACKING_URI": tracking_uri},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_an_uploaded_model_predicts(trained: RunFolder, tracker: MlflowTracker, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    tracker.set_status("FINISHED", timestamp_ms=5000)
    arguments = ["--mlflow-run-id", tracker.mlflow_run_id, "--registered-model-name", "tiny"]
    ended = upload(trained, home, tracker.tracking_uri, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert list(home.iterdir()) == []
    model_uri = ended.stdout.splitlines()[-1]

    run = stored_run(tracker)
    assert [f"models:/{output.model_id}" for output in run.outputs.model_outputs] == [model_uri]
    assert (run.info.status, run.info.end_time) == ("FINISHED", 5000), "an upload does not reopen the run"
    client = MlflowClient(tracker.tracking_uri)
    assert client.get_logged_model(model_uri.removeprefix("models:/")).experiment_id == run.info.experiment_id
    assert client.get_model_version("tiny", "1").run_id == tracker.mlflow_run_id

    mlflow.set_tracking_uri(tracker.tracking_uri)
    sentence = "a cat sat [MASK]"
    best = mlflow.transformers.load_model(model_uri)(sentence)[0]
    assert best["sequence"].startswith("a cat sat")
    loaded = mlflow.pyfunc.load_model(model_uri)
    assert loaded.metadata.signature is not None
    assert loaded.predict([sentence, sentence]) == [best["token_str"]] * 2


def test_a_failed_upload_is_one_line_and_an_exit_code(tracker: MlflowTracker, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "without-a-model")
    ended = upload(run, tmp_path, tracker.tracking_uri, "--mlflow-run-id", tracker.mlflow_run_id)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("model upload failed: ")
    assert "Traceback" not in ended.stderr
