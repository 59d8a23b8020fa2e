"""`distlm verify-resume` as a user runs it, with real Ray: a resume that is right, one that is broken, one stopped."""

from __future__ import annotations

import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from place import END_TIMEOUT_S, START_TIMEOUT_S, Place, wait_until

from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.checkpoint.tensor_file import TensorFile, file_sha256
from distlm.cli import main
from distlm.data.order import samples
from distlm.errors import ExitCode
from distlm.launchers.base import Request
from distlm.launchers.local import LocalLauncher
from distlm.run_folder import AttemptFolder, RunFolder, read_json
from distlm.verify_resume.evidence import was_killed
from distlm.verify_resume.samples import read_samples
from distlm.view import View

GLOBAL_BATCH, MICRO_BATCH, SEED = 8, 2, 11
CONFIG = {
    "seed": SEED,
    "model": {
        "config": {
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        }
    },
    "tokenizer": {"train": {"vocab_size": 200}},
    "data": {
        "train": [{"source": "files", "paths": ["corpus.jsonl"]}],
        "max_seq_length": 32,
        "validation_fraction": 0.1,
    },
    "training": {
        "num_train_epochs": 2.0, "global_train_batch_size": GLOBAL_BATCH, "per_device_train_batch_size": MICRO_BATCH,
        "learning_rate": 5e-3, "warmup_steps": 100, "mixed_precision": "no",
    },
    "deepspeed": {"zero_stage": 2},
    "resources": {"num_workers": 2, "device": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Shared, so that the corpus is tokenised once."""
    return Place(tmp_path_factory.mktemp("verify"), CONFIG)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def names_of_runs(place: Place) -> list[str]:
    return names_in(place.runs_dir) if place.runs_dir.exists() else ["cache"]


def test_an_exact_resume(place: Place) -> None:
    """The default: the config's 2 workers, again, then 1."""
    command = place.start("verify-resume", "run.yaml", "--keep", "--steps", "8")
    assert command.wait(4 * START_TIMEOUT_S) == ExitCode.SUCCEEDED, (command.out, command.err)
    lines = command.out.splitlines()
    assert "verify-resume: 8 steps straight on 2 workers, then in 3 pieces on 2, 2, 1 workers" in lines
    table = lines[lines.index("piece  workers  steps  ended             samples  max |loss difference|") + 1 :]
    assert table[0].split() == ["1", "2", "1-3", "killed", "in", "step", "4", "equal", "0"]
    assert table[1].split() == ["2", "2", "3-5", "killed", "in", "step", "6", "equal", "0"]
    assert table[2].split()[:5] == ["3", "1", "5-8", "finished", "equal"]
    assert [line for line in table if line.endswith("bit-identical")][:2] == [
        f"checkpoint of step {step}: weights and optimizer state bit-identical" for step in (2, 4)
    ]
    assert lines[-2] == (
        "resume is exact: the same samples, and the same bits on 2 workers; after resizing to 1, losses and weights "
        "agree within rounding"
    )
    assert command.err == ""
    assert not place.processes()

    (folder,) = place.runs_dir.glob("verify-resume-*")
    assert lines[-1] == f"the runs are in {folder.relative_to(place.folder)}"
    assert names_in(place.runs_dir) == ["cache", folder.name], "no MLflow store, no run among the user's"
    straight, pieces = (RunFolder(path.parent) for path in sorted(folder.glob("*/run.yaml"), key=attempts_in))
    assert_samples_are_those_of_the_order(straight)
    for number, attempt in enumerate(pieces.attempts(), 1):
        result = read_json(attempt.result_json)
        if number < 3:
            assert result["exit_code"] == ExitCode.INFRASTRUCTURE and result["rank"] == 1 and was_killed(attempt)
            assert "died without an error of its own" in result["message"]
        else:
            assert result["exit_code"] == ExitCode.SUCCEEDED


def attempts_in(run_yaml: Path) -> int:
    return len(RunFolder(run_yaml.parent).attempts())


def assert_samples_are_those_of_the_order(run: RunFolder) -> None:
    """What the workers wrote down is what data.order says, each micro batch once, each with content of its own."""
    num_samples = read_json(run.init / "prepared.json")["num_train_samples"]
    recorded = list(read_samples(run.attempts()[0].samples))
    assert len({item.sha256 for item in recorded}) == len(recorded) == 8 * GLOBAL_BATCH // MICRO_BATCH
    assert Counter((item.step, item.number) for item in recorded) == Counter(
        (step, m) for step in range(1, 9) for m in range(GLOBAL_BATCH // MICRO_BATCH)
    )
    for item in recorded:
        first = (item.step - 1) * GLOBAL_BATCH + item.number * MICRO_BATCH
        epochs, indices = samples(first, MICRO_BATCH, num_samples, SEED)
        assert (item.positions, item.epochs, item.indices) == ([first, first + 1], epochs.tolist(), indices.tolist())


def test_a_broken_resume_is_found(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A moment of one parameter is lost between the pieces, from a checkpoint that is consistent otherwise."""
    run = LocalLauncher.run

    def damage_and_run(self: LocalLauncher, request: Request, attempt: AttemptFolder, view: View) -> dict[str, Any]:
        if attempt.number == 2:
            (checkpoint,) = CheckpointStore(attempt.path.parents[1] / "checkpoints").checkpoints()
            lose_moment(checkpoint, "bert.embeddings.word_embeddings.weight:exp_avg:0")
        return run(self, request, attempt, view)

    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(LocalLauncher, "run", damage_and_run)
    before = set(place.runs_dir.glob("verify-resume-*"))
    code = main(["verify-resume", "run.yaml", "--steps", "4", "--workers", "1,1", "resources.num_workers=1"])
    out, err = capfd.readouterr()
    assert code == ExitCode.FAILED, (out, err)
    assert re.search(r"^1 +1 +1-3 +killed in step 4 +equal +0$", out, re.MULTILINE)
    found = re.search(r"^2 +1 +3-4 +finished +equal +(\S+)$", out, re.MULTILINE)
    assert found and float(found[1]) > 1e-5, out  # of step 4, the first after an update with the wrong moment
    assert "checkpoint of step 2: weights bit-identical, optimizer state not" in out
    assert "resume is NOT correct: step 2 (piece 1): the checkpoint is not bit-identical: the optimizer's state" in out
    (folder,) = set(place.runs_dir.glob("verify-resume-*")) - before
    assert out.splitlines()[-1] == f"the runs are in {folder.relative_to(place.folder)}"


def lose_moment(checkpoint: Checkpoint, tensor: str) -> None:
    """Set it to 0, and have sizes and hashes say so."""
    manifest = CheckpointStore(checkpoint.path.parent).verify(checkpoint)
    (name,) = manifest.shards
    path = checkpoint.path / name
    place = TensorFile(path).tensors[tensor]
    content = bytearray(path.read_bytes())
    assert any(content[place.begin : place.end])
    content[place.begin : place.end] = bytes(place.end - place.begin)
    path.write_bytes(content)
    shard = manifest.shards[name].model_copy(update={"sha256": file_sha256(path)})
    (checkpoint.path / MANIFEST_NAME).write_text(manifest.model_copy(update={"shards": {name: shard}}).to_json())
    CheckpointStore(checkpoint.path.parent).verify(checkpoint)


def test_ctrl_c_leaves_nothing(place: Place) -> None:
    before = names_of_runs(place)
    command = place.start("verify-resume", "run.yaml")
    command.wait_for("\npreparing")
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == ExitCode.CANCELLED, (command.out, command.err)
    assert command.err.endswith("distlm: stopped on request; resume was not verified\n")
    wait_until(lambda: not place.processes(), END_TIMEOUT_S, "the end of all processes")
    assert names_of_runs(place) == before
    assert not names_in(place.home) and not names_in(place.temporary)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--workers", "2,3"], "cannot be divided by"),
        (["--workers", "2"], "a resume takes two sizes or more"),
        (["--steps", "5"], "--steps = 5: 3 pieces take 6 steps or more"),
        (["training.lerning_rate=1"], "did you mean training.learning_rate?"),
        (["data.train.0.paths=[nowhere.txt]"], "nowhere.txt"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], problem: str, place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)
    before = names_of_runs(place)
    assert main(["verify-resume", "run.yaml", *arguments]) == ExitCode.BAD_INPUT
    out, err = capfd.readouterr()
    assert problem in err and out == ""
    assert names_of_runs(place) == before
