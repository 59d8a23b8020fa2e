"""Target ray: what is sent, what Ray's words mean, and what comes back; without a cluster."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path

import pytest

import distlm
from distlm.config.attempt import begin_attempt, create_run
from distlm.config.load import LoadedConfig, load_config
from distlm.errors import InfrastructureError, InputError
from distlm.job_run import JobName, run_of_files
from distlm.launchers.base import Job, JobState
from distlm.launchers.carried import ATTEMPT_FILES, JOB, RESULT_PREFIX, result_in
from distlm.launchers.ray import RayLauncher, RayRequest, status_of
from distlm.launchers.targets import check_for_target
from distlm.run_folder import RunFolder

CONFIG = """
model: {config: {model_type: bert}}
tokenizer: {train: {vocab_size: 1000}}
data: {train: [{source: files, paths: [nowhere-on-this-machine.txt]}]}
training: {max_steps: 10}
resources: {target: ray}
env: [SECRET_OF_MINE]
"""


def load(folder: Path, *overrides: str) -> LoadedConfig:
    (folder / "run.yaml").write_text(CONFIG)
    return load_config(folder / "run.yaml", list(overrides), check_for_target)


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def made(folder: Path, *overrides: str) -> tuple[RunFolder, RayRequest]:
    loaded = load(folder, "ray.address=http://head:8265", *overrides)
    run = RunFolder(folder / "runs" / "20260131-000000-abcdef")
    create_run(loaded, run)
    begin_attempt(loaded, run, list(overrides))
    return run, RayLauncher().build(loaded.config, run)


def test_an_address_is_needed_and_files_are_the_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"ray\.address: give the address"):
        load(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "head:8265")
    config = load(tmp_path).config
    assert RayLauncher().render(config, tmp_path / "run.yaml", []).address == "http://head:8265"


def test_the_run_travels_with_the_job_and_secrets_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2-hunter2")
    run, request = made(tmp_path, "ray.python=/opt/python3", "ray.runtime_env={pip: [sacremoses]}")
    assert request.command == ("/opt/python3", "-m", "distlm.ray_job", str(run.path))
    assert request.submission_id == f"{run.run_id}-001"
    assert request.runtime_env["pip"] == ["sacremoses"] and "py_modules" not in request.runtime_env
    carried = json.loads(request.runtime_env["env_vars"][ATTEMPT_FILES])
    assert {*carried} == {"run.yaml", "attempt.yaml", "newest_step"}
    assert request.runtime_env["env_vars"][JOB] == f"ray:{run.run_id}-001"
    shown = shlex.split(str(request))
    assert shown[:4] == ["ray", "job", "submit", "--address=http://head:8265"]
    assert json.loads(shown[shown.index("--runtime-env-json") + 1])["env_vars"]["SECRET_OF_MINE"] == "${SECRET_OF_MINE}"
    assert "hunter2" not in str(request) and "hunter2" not in run.run_yaml.read_text()

    elsewhere = run_of_files(tmp_path / "of-the-cluster" / run.run_id, carried, JobName("ray", request.submission_id))
    assert elsewhere.run_yaml.read_text() == run.run_yaml.read_text()
    assert [attempt.number for attempt in elsewhere.attempts()] == [1]
    assert elsewhere.attempts()[0].logs.is_dir()


def test_the_code_is_carried_where_that_is_asked(tmp_path: Path) -> None:
    _, request = made(tmp_path, "ray.code=carried")
    assert request.runtime_env["py_modules"] == [str(Path(distlm.__file__).parent)]


def test_a_working_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="working_dir has no use here"):
        load(tmp_path, "ray.address=head", "ray.runtime_env={working_dir: .}")


@pytest.mark.parametrize(
    ("word", "code", "state"),
    [
        ("PENDING", None, JobState.PENDING),
        ("RUNNING", None, JobState.RUNNING),
        ("SUCCEEDED", 0, JobState.SUCCEEDED),
        ("FAILED", 1, JobState.FAILED),
        ("FAILED", 3, JobState.FAILED),
        ("FAILED", None, JobState.FAILED),
        ("FAILED", 75, JobState.PREEMPTED),
        ("FAILED", 130, JobState.CANCELLED),
        ("STOPPED", 0, JobState.CANCELLED),
        ("STOPPED", None, JobState.CANCELLED),
        ("SOMETHING_NEW", None, JobState.UNKNOWN),
    ],
)
def test_what_rays_words_mean(word: str, code: int | None, state: JobState) -> None:
    status = status_of(word, code, "told\n by Ray")
    assert status.state == state
    assert status.reason == ("" if state == JobState.RUNNING else "told by Ray")


def test_the_result_is_the_last_one_printed() -> None:
    first, last = ({"exit_code": code} for code in (75, 0))
    lines = ["step 1", RESULT_PREFIX + json.dumps(first), "step 2", RESULT_PREFIX + json.dumps(last), ""]
    assert result_in(lines) == last
    assert result_in(lines[:1]) is None
    assert result_in([RESULT_PREFIX + '{"exit_code": ']) is None
    assert result_in([RESULT_PREFIX + "[]"]) is None


def test_a_cluster_that_cannot_be_reached_leaves_the_state_unknown(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    status = RayLauncher().status(Job("ray", "any", address=address))
    assert status.state == JobState.UNKNOWN and f"{address} cannot be reached: Connection refused" in status.reason
    _, request = made(tmp_path, f"ray.address={address}")
    with pytest.raises(InfrastructureError, match="cannot be reached"):
        RayLauncher().submit(request, tmp_path)
