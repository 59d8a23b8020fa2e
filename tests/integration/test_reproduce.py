"""`distlm submit run:RUN` as a user runs it, with real Ray: the same bits again, and a word where they may differ."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from place import CONFIG, Command, Place
from saved_state import saved_state

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode
from distlm.run_folder import RunFolder, read_json
from distlm.tracking.records import read_lines


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The config and the corpus are in a repository."""
    place = Place(
        tmp_path_factory.mktemp("reproduce"), CONFIG | {"training": CONFIG["training"] | {"logging_steps": 1}}
    )
    (place.folder / ".gitignore").write_text("runs/\nhome/\ntmp/\ncommand-*\n")
    for arguments in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-qm", "first")):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=place.folder, check=True)
    return place


def succeed(command: Command) -> Command:
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    return command


@pytest.fixture(scope="module")
def original(place: Place) -> RunFolder:
    return succeed(place.start("submit", "run.yaml", "training.max_steps=12", "resources.num_workers=1")).run


def losses(run: RunFolder) -> list[tuple[int, float]]:
    """Steps and losses, in full precision."""
    values = [(message["step"], message["values"]) for message in messages(run) if message["kind"] == "metrics"]
    return [(step, loss) for step, found in values if (loss := found.get("train/loss")) is not None]


def messages(run: RunFolder) -> list[dict[str, Any]]:
    return [message for _, message in read_lines(run.attempts()[0].metrics_jsonl)]


def artifacts(place: Place, run: RunFolder, folder: str) -> set[str]:
    run_id = place.mlflow_run(run).info.run_id
    return {Path(file.path).name for file in place.client.list_artifacts(run_id, folder)}


def test_what_is_recorded_is_in_mlflow(place: Place, original: RunFolder, tmp_path: Path) -> None:
    run = place.mlflow_run(original)
    assert {"attempt.yaml", "code", "environment.txt", "data.json"} <= artifacts(place, original, "attempts/001")
    assert "code.json" in artifacts(place, original, "attempts/001/code")
    attempt = original.attempts()[0]
    local = place.client.download_artifacts(run.info.run_id, "attempts/001/code/code.json", str(tmp_path))
    assert Path(local).read_bytes() == attempt.code_json.read_bytes()
    state = read_json(attempt.code_json)["working_directory"]
    assert (state["folder"], state["is_dirty"], state["untracked_files"]) == (str(place.folder), False, [])
    assert run.data.tags["distlm.git_commit"] == run.data.tags["mlflow.source.git.commit"] == state["commit"]
    assert "distlm.reproduces" not in run.data.tags
    data = read_json(attempt.data_json)
    assert data["train"] == read_json(original.init / "prepared.json")["data_info"]["train"]
    (source,) = data["sources"]["train"]
    assert source["num_files"] == 1 and source["num_file_bytes"] == (place.folder / "corpus.jsonl").stat().st_size
    assert f"torch=={torch.__version__}" in attempt.environment_txt.read_text().splitlines()


def test_an_equal_run_has_the_same_bits(place: Place, original: RunFolder) -> None:
    """Also where nothing is in the cache, and the config file has changed since."""
    text = (place.folder / "run.yaml").read_text()
    (place.folder / "run.yaml").write_text("no: config\n")
    shutil.rmtree(place.runs_dir / "cache")
    try:
        command = succeed(place.start("submit", "run:last"))
    finally:
        (place.folder / "run.yaml").write_text(text)
    assert f"\nthe config of run {original.run_id}\n" in command.out
    warnings = [line for line in command.out.splitlines() if line.startswith("warning")]
    # The changed run.yaml is tracked.
    name = f"run {original.run_id}"
    assert warnings == [f"warning: code of the working directory: the uncommitted changes are not those of {name}"]
    assert command.out.index(warnings[0]) < command.out.index("starting 1 workers") < command.out.index("step  1/12")
    assert command.run.run_id != original.run_id
    assert losses(command.run) == losses(original) and len(losses(original)) == 12
    states = [saved_state(CheckpointStore(run.checkpoints).checkpoints()[0].path) for run in (original, command.run)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert place.mlflow_run(command.run).data.tags["distlm.reproduces"] == original.run_id
    assert command.run.run_yaml.read_bytes() == original.run_yaml.read_bytes()
    assert "working_directory.diff" in artifacts(place, command.run, "attempts/001/code")
    place.require_nothing_left(command.run)


def test_what_is_otherwise_is_said_before_it_trains(place: Place, original: RunFolder) -> None:
    corpus = place.folder / "corpus.jsonl"
    before = corpus.read_text()
    corpus.write_text("".join(before.splitlines(keepends=True)[5:]))
    try:
        command = succeed(place.start("submit", f"run:{original.run_id}", "training.max_steps=5", "seed=7"))
    finally:
        corpus.write_text(before)
    name = f"run {original.run_id}"
    told = command.out[: command.out.index("starting 1 workers")]
    assert f"the config of {name}, but for:\n  seed = 7 (was 42)\n  training.max_steps = 5 (was 12)\n" in told
    assert f"warning: data.train: the text is not that of {name} (corpus.jsonl)\n" in told
    assert f"warning: initial weights: they are not those of {name}\n" in told
    assert losses(command.run)[0] != losses(original)[0]


def test_a_downloaded_run_yaml_can_be_submitted(place: Place, original: RunFolder) -> None:
    """The numbers are those of the run, and nothing but the file is asked for."""
    run_id = place.mlflow_run(original).info.run_id
    (place.folder / "tmp-artifacts").mkdir()
    downloaded = place.client.download_artifacts(run_id, "run.yaml", str(place.folder / "tmp-artifacts"))
    other = place.folder / "elsewhere"
    command = succeed(place.start("submit", downloaded, f"runs_dir={other}", "training.max_steps=5"))
    run = RunFolder(next(other.glob("2*")))
    assert losses(run) == losses(original)[:5], command.out
    tree = yaml.safe_load(run.run_yaml.read_text())
    assert tree["data"] == yaml.safe_load(original.run_yaml.read_text())["data"]
    assert not any(message.get("tags", {}).get("distlm.reproduces") for message in messages(run))
