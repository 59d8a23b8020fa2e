"""`distlm checkpoints`: what it says about good, damaged, unfinished and absent checkpoints, and its exit codes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import yaml
from fabricated import give_format_version

from distlm.checkpoint.listing import BestBy, best_by, human_size, list_checkpoints
from distlm.checkpoint.manifest import Fragment, Manifest, Optimizer, Parameter, Progress
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.cli import main
from distlm.errors import ExitCode, InputError
from distlm.run_folder import RunFolder

LOSS = BestBy("eval/loss", greater_is_better=False)
NUMEL = 6
SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "runs", "20260131-235959-3fa9c1")
    run.run_yaml.write_text(yaml.safe_dump({"training": {"max_steps": 20, "metric_for_best_model": "loss"}}))
    run.new_attempt()
    return run


def commit(run: RunFolder, step: int, **metrics: float) -> Checkpoint:
    store = CheckpointStore(run.checkpoints)
    store.clean()
    parameters = [Parameter(name="weight", shape=[2, 3])]
    content = [memoryview(array("f", range(3 * NUMEL)))]
    name, shard = store.write_shard(store.temporary(step, "a"), 0, 1, parameters, [Fragment(0, 0, NUMEL)], content)
    manifest = Manifest(
        step=step,
        progress=Progress(sample_position=10 * step, epoch=step // 4),
        seed=1,
        world_size=3,
        zero_stage=2,
        mixed_precision="bf16",
        versions={},
        metrics={f"eval/{key}": value for key, value in metrics.items()},
        parameters=parameters,
        optimizer=Optimizer(adam_step=step, groups=[], loss_scaler=None),
        shards={name: shard},
    )
    return store.commit(store.temporary(step, "a"), manifest)


def alter_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite_manifest(checkpoint: Checkpoint, **changes: Any) -> None:
    path = checkpoint.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def command(run: RunFolder, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main(["checkpoints", str(run.path), *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for step, metrics in ((5, {"loss": 2.5}), (10, {"loss": 1.25}), (15, {}), (120, {"loss": 1.75})):
        os.utime(commit(run, step, **metrics).path / "manifest.json", (0, 1_700_000_000 + step))
    code, out, err = command(run, capsys)
    assert (code, err) == (ExitCode.SUCCEEDED, "")
    size = (run.checkpoints / "step-00000005" / SHARD).stat().st_size
    assert out == "\n".join(
        [
            "step  epoch   size  written (UTC)        workers  ZeRO  precision  eval/loss  used for  state",
            f" 120     30  {size} B  2023-11-14 22:15:20        3     2  bf16            1.75  resume    committed",
            f"  15      3  {size} B  2023-11-14 22:13:35        3     2  bf16               -  -         committed",
            f"  10      2  {size} B  2023-11-14 22:13:30        3     2  bf16            1.25  best      committed",
            f"   5      1  {size} B  2023-11-14 22:13:25        3     2  bf16             2.5  -         committed",
            "",
        ]
    )


def test_altered_bytes_are_found_by_verify_alone(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 5)
    alter_a_byte(commit(run, 10, loss=1.0).path / SHARD)
    code, out, _ = command(run, capsys)
    assert code == ExitCode.SUCCEEDED and out.count("committed") == 2
    code, out, _ = command(run, capsys, "--verify")
    newest, older = out.splitlines()[1:]
    assert code == ExitCode.INFRASTRUCTURE
    assert newest.endswith(f"best      damaged: step-00000010/{SHARD} was altered: its SHA-256 is not the manifest's")
    assert older.endswith("resume    verified")


def test_a_cut_file_and_a_missing_one_need_no_verify(run: RunFolder) -> None:
    commit(run, 1)
    os.truncate(commit(run, 2).path / SHARD, 100)
    (commit(run, 3).path / SHARD).unlink()
    (commit(run, 4).path / "manifest.json").unlink()
    listed = list_checkpoints(CheckpointStore(run.checkpoints), LOSS)
    assert [(one.step, one.state, one.is_resumed) for one in listed] == [
        (4, "damaged", False),
        (3, "damaged", False),
        (2, "damaged", False),
        (1, "committed", True),
    ]
    reasons = [one.reason for one in listed]
    assert reasons[0].endswith("has no manifest.json: it was never committed")
    assert "No such file" in reasons[1] and "has 100 bytes, the manifest says" in reasons[2]
    assert listed[2].size_bytes == 100 + (run.checkpoints / "step-00000002" / "manifest.json").stat().st_size


def test_an_unknown_format_version_is_said(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 5)
    give_format_version(commit(run, 7), 99)
    code, out, _ = command(run, capsys)
    assert code == ExitCode.INFRASTRUCTURE
    assert "unknown: step-00000007/manifest.json has format version 99, and this distlm reads 2; use the distlm" in out
    assert "resume" not in out, "a resume does not pass over it"
    commit(run, 9)
    _, newest, middle, _ = command(run, capsys)[1].splitlines()
    assert "resume" in newest and "unknown" in middle
    rewrite_manifest(commit(run, 9), format_version=98)
    assert "damaged: step-00000009/manifest.json has format version 98, and" in command(run, capsys)[1]


def test_what_is_unfinished_is_neither_good_nor_damaged(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 3)
    temporary = CheckpointStore(run.checkpoints).temporary(6, "b")
    temporary.mkdir()
    (temporary / SHARD).write_bytes(b"x" * 2048)
    (run.checkpoints / ".step-00000001.deleted-7").mkdir()
    code, out, _ = command(run, capsys, "--verify")
    assert code == ExitCode.SUCCEEDED
    lines = [line.split() for line in out.splitlines()[1:]]
    assert [(line[0], line[-1]) for line in lines] == [("3", "verified"), ("1", "unfinished"), ("6", "unfinished")]
    assert lines[2][2:4] == ["2.0", "KiB"]


def test_one_that_is_being_replaced_is_listed(run: RunFolder) -> None:
    commit(run, 3).path.rename(run.checkpoints / ".step-00000003.old")
    (listed,) = list_checkpoints(CheckpointStore(run.checkpoints), LOSS, verify=True)
    assert (listed.step, listed.state, listed.is_resumed) == (3, "verified", True)


def test_none(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, capsys) == (ExitCode.SUCCEEDED, f"run {run.run_id} has no checkpoints\n", "")
    assert command(run, capsys, "--json") == (ExitCode.SUCCEEDED, "[]\n", "")


def test_json_says_the_same(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 5, loss=2.5, accuracy=0.5)
    rewrite_manifest(commit(run, 6), seed=3)
    code, out, _ = command(run, capsys, "--json", "--verify")
    damaged, good = json.loads(out)
    assert code == ExitCode.INFRASTRUCTURE
    assert (damaged["step"], damaged["state"], damaged["world_size"]) == (6, "damaged", None)
    assert "does not match its own SHA-256" in damaged["reason"]
    assert good["path"] == str(run.checkpoints / "step-00000005") and good["state"] == "verified"
    assert (good["is_best"], good["is_resumed"]) == (True, True) and good["mixed_precision"] == "bf16"
    assert good["metrics"] == {"eval/loss": 2.5, "eval/accuracy": 0.5}


def test_best_follows_the_last_resume(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 5, loss=1.0, accuracy=0.5)
    commit(run, 10, loss=2.0, accuracy=0.9)
    assert best_by(run) == LOSS
    changes = ["training.max_steps=40", "training.metric_for_best_model=accuracy"]
    run.attempts()[-1].attempt_yaml.write_text(
        yaml.safe_dump({"target": "local", "distlm_version": "1", "changes": changes})
    )
    assert best_by(run) == BestBy("eval/accuracy", greater_is_better=True)
    run.new_attempt()  # one that found no room for its attempt.yaml
    assert best_by(run) == BestBy("eval/accuracy", greater_is_better=True)
    _, out, _ = command(run, capsys)
    header, newest, older = out.splitlines()
    assert "eval/loss  eval/accuracy" in header
    assert newest.split()[-5:] == ["2", "0.9", "best,", "resume", "committed"] and "best" not in older


@pytest.mark.parametrize("text", ["", "[1, 2]", "training: 5", "{", "training: {metric_for_best_model: [}"])
def test_a_damaged_run_yaml_hides_no_checkpoint(run: RunFolder, capsys: pytest.CaptureFixture[str], text: str) -> None:
    commit(run, 5, loss=1.0)
    run.run_yaml.write_text(text)
    with pytest.raises(InputError, match="damaged"):
        best_by(run)
    code, out, err = command(run, capsys)
    assert code == ExitCode.SUCCEEDED and "resume    committed" in out and "best" not in out
    assert err.startswith("distlm: warning: which one is best is not known: ") and err.count("\n") == 1


def test_odd_names_and_times(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = commit(run, 5)
    os.utime(checkpoint.path / "manifest.json", (0, 10**12))  # the year 33658, where the file system keeps it
    (run.checkpoints / ".step-00000009.tmp-\x1b[31m\n\udcff").mkdir()
    (run.checkpoints / "step-00000008").write_text("a file")
    (run.checkpoints / "step-8").mkdir()
    code, out, _ = command(run, capsys)
    assert code == ExitCode.SUCCEEDED and len(out.splitlines()) == 3 and "\x1b" not in out
    assert json.loads(command(run, capsys, "--json")[1])[1]["path"].endswith("\x1b[31m\n\udcff")


def test_a_checkpoint_that_is_deleted_meanwhile_is_left_out(run: RunFolder) -> None:
    commit(run, 5)
    commit(run, 10)

    class Deleting(CheckpointStore):
        """A training run deletes the older one between the listing of the folder and the reading of the manifest."""

        def check(self, checkpoint: Checkpoint) -> Manifest:
            if checkpoint.step == 5 and checkpoint.path.exists():
                shutil.rmtree(checkpoint.path)
            return super().check(checkpoint)

    assert [(one.step, one.state) for one in list_checkpoints(Deleting(run.checkpoints), LOSS)] == [(10, "committed")]


def test_fuzzed_folders(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in the files, there is one line for each checkpoint and an exit code that is meant."""
    pick = random.Random(5)
    good = commit(run, 1, loss=1.0)
    content = {file.name: file.read_bytes() for file in good.path.iterdir()}
    for step in range(2, 42):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir()
        for name, whole in content.items():
            damaged = bytearray(whole)
            for _ in range(pick.randrange(4)):
                start = pick.randrange(len(damaged))
                damaged[start : start + pick.randrange(40)] = pick.randbytes(pick.randrange(40))
            (folder / name).write_bytes(damaged[: pick.choice([len(damaged), pick.randrange(len(damaged))])])
    (run.checkpoints / "step-00000042").mkdir()
    (run.checkpoints / "step-00000042" / "manifest.json").write_text("[" * 100_000)
    (run.checkpoints / "step-00000043" / "manifest.json").mkdir(parents=True)
    for options in ((), ("--verify",), ("--json",)):
        code, out, err = command(run, capsys, *options)
        assert code == ExitCode.INFRASTRUCTURE and err == ""
        listed = json.loads(out) if "--json" in options else out.splitlines()[1:]
        assert len(listed) == 43
    states = [one["state"] for one in listed]
    assert states == ["damaged"] * 42 + ["committed"]  # those that were not damaged are of step 1, by their manifest


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_500_000, "1.4 MiB"),
        (2**40, "1.0 TiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_human_size(size_bytes: int, text: str) -> None:
    assert human_size(size_bytes) == text


def test_listing_imports_nothing_heavy(run: RunFolder) -> None:
    commit(run, 5)
    code = (
        "import sys; from distlm.cli import main; code = main(sys.argv[1:]);"
        "print(*{'torch', 'numpy', 'transformers', 'ray', 'mlflow'} & {*sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "checkpoints", str(run.path), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (ExitCode.SUCCEEDED, "\n") and "verified" in done.stdout
