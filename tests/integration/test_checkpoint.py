"""Checkpoints of real engines on two gloo processes: exact continuation, refusal of damage, survival of errors."""

from __future__ import annotations

import itertools
import json
import logging
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from saved_state import saved_state, saved_weights
from tiny_training import WORLD_SIZE, fresh_engine, load_model, settings, train_step, write_initial_weights

from distlm.checkpoint.manifest import Manifest, Progress
from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.errors import CheckpointError
from distlm.worker import zero_state
from distlm.worker.checkpoint import CheckpointSaver, Retention, Saved, load_checkpoint

STAGES = (0, 1, 2, 3)
SEED = 17


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_initial_weights(tmp_path_factory.mktemp("init"), dropout=0.1)


@pytest.fixture(scope="module")
def other_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_initial_weights(tmp_path_factory.mktemp("other_init"), seed=1, dropout=0.1)


def save(engine: Any, folder: Path, step: int) -> Checkpoint:
    """Save in the foreground, with a saver of its own, and return the committed checkpoint."""
    saver = CheckpointSaver(engine, CheckpointStore(folder), seed=SEED, asynchronous=False)
    saver.save(step, Progress(sample_position=16 * step, epoch=0))
    saver.wait()
    return checkpoint_at(folder, step)


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(step, folder / f"step-{step:08d}")


def verify(checkpoint: Checkpoint) -> Manifest:
    return CheckpointStore(checkpoint.path.parent).verify(checkpoint)


def train_and_continue(folder: Path, init: Path, other_init: Path) -> dict[str, Any]:
    """At each stage and precision: save at steps 0 and 3 and 5; load 3 into a fresh engine with other weights, train on
    to 5 and save that elsewhere. Returns the losses of steps 3 and 4 of both."""
    losses = {}
    for precision in ("no", "bf16"):
        for stage in STAGES:
            name = f"{precision}-{stage}"
            accelerator, engine = fresh_engine(settings(stage, precision), init)
            save(engine, folder / name, 0)
            for step in range(3):
                train_step(accelerator, engine, step)
            checkpoint = save(engine, folder / name, 3)
            uninterrupted = [train_step(accelerator, engine, step) for step in (3, 4)]
            save(engine, folder / name, 5)

            accelerator, engine = fresh_engine(settings(stage, precision), other_init)
            manifest = load_checkpoint(engine, checkpoint, seed=SEED)
            assert (manifest.step, manifest.progress.sample_position, manifest.seed) == (3, 48, SEED)
            continued = [train_step(accelerator, engine, step) for step in (3, 4)]
            save(engine, folder / f"{name}-continued", 5)
            losses[name] = uninterrupted, continued
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, init: Path, other_init: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_on_ranks(train_and_continue, WORLD_SIZE, folder, init, other_init)[0]


def state_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("shard-*"))}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_run_continues_bit_identically(trained: tuple[Path, Any], stage: int, precision: str) -> None:
    folder, losses = trained
    name = f"{precision}-{stage}"
    uninterrupted, continued = losses[name]
    assert uninterrupted == continued
    end, continued_end = folder / name / "step-00000005", folder / f"{name}-continued" / "step-00000005"
    assert state_files(end) == state_files(continued_end), "fp32 weights and both moments, every byte"
    assert state_files(end) != state_files(folder / name / "step-00000003")
    manifest = verify(Checkpoint(5, end))
    assert (manifest.zero_stage, manifest.mixed_precision, manifest.world_size) == (stage, precision, WORLD_SIZE)
    assert manifest.optimizer.adam_step == 5


@pytest.mark.parametrize("stage", STAGES)
def test_step_0_holds_the_initial_weights(trained: tuple[Path, Any], init: Path, stage: int) -> None:
    saved = saved_weights(trained[0] / f"no-{stage}" / "step-00000000")
    model = dict(load_model(init).named_parameters())
    assert saved.keys() == model.keys()
    assert all(torch.equal(saved[name], model[name]) for name in model)


def test_no_rank_holds_much_more_than_its_share(trained: tuple[Path, Any]) -> None:
    for stage in STAGES:
        sizes = [file.stat().st_size for file in (trained[0] / f"no-{stage}" / "step-00000005").glob("shard-*")]
        assert len(sizes) == WORLD_SIZE
        assert max(sizes) < 1.2 * min(sizes)


def load_into(checkpoint: Checkpoint, folder: Path, other_init: Path, world_size: int) -> None:
    for stage in STAGES:
        _, engine = fresh_engine(settings(stage, world_size=world_size), other_init)
        load_checkpoint(engine, checkpoint, seed=SEED)
        save(engine, folder / f"{stage}", 5)


@pytest.mark.parametrize(("world_size", "written_at_stage"), [(1, 3), (2, 1)])
def test_any_stage_and_world_size_reads_the_same_state(
    trained: tuple[Path, Any], tmp_path: Path, other_init: Path, world_size: int, written_at_stage: int
) -> None:
    checkpoint = checkpoint_at(trained[0] / f"no-{written_at_stage}", 5)
    run_on_ranks(load_into, world_size, checkpoint, tmp_path, other_init, world_size)
    written = saved_state(checkpoint.path)
    for stage in STAGES:
        copy = checkpoint_at(tmp_path / f"{stage}", 5)
        assert verify(copy).world_size == world_size
        read = saved_state(copy.path)
        assert read.keys() == written.keys() and all(torch.equal(read[key], written[key]) for key in read)


@pytest.fixture
def checkpoints(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A private copy of the checkpoints of steps 0, 3 and 5, to be damaged."""
    return Path(shutil.copytree(trained[0] / "no-2", tmp_path / "checkpoints"))


def truncate_shard(path: Path) -> None:
    shard = path / "shard-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    shard = path / "shard-00000-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def remove_shard(path: Path) -> None:
    (path / "shard-00000-of-00002.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).unlink()


def tear_manifest(path: Path) -> None:
    manifest = path / MANIFEST_NAME
    manifest.write_text(manifest.read_text()[:-100])


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / MANIFEST_NAME).read_text())
        (path / MANIFEST_NAME).write_text(json.dumps(content | changes))

    return edit


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate_shard, "shard-00001-of-00002.safetensors has .* bytes, the manifest says"),
        (flip_a_bit, "shard-00000-of-00002.safetensors was altered"),
        (remove_shard, "shard-00000-of-00002.safetensors cannot be read"),
        (remove_manifest, "it was never committed"),
        (tear_manifest, "manifest.json is damaged"),
        (edit_manifest(step=4), "does not match its own SHA-256"),
        (edit_manifest(format_version=3), "manifest.json has format version 3, and this distlm reads 2"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_skipped(
    checkpoints: Path, damage: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoints / "step-00000005")
    with pytest.raises(CheckpointError, match=reason):
        verify(checkpoint_at(checkpoints, 5))
    with caplog.at_level(logging.WARNING):
        good, skipped = CheckpointStore(checkpoints).latest_good()
    assert good == checkpoint_at(checkpoints, 3)
    assert len(skipped) == 1 and str(skipped[0]) in caplog.text


def save_with_frozen_embeddings(folder: Path, init: Path, other_init: Path) -> dict[int, list[str]]:
    """Per stage: which parameters are in a checkpoint of a model whose embeddings do not train. Loads it, too."""
    names = {}
    for stage in STAGES:
        accelerator, engine = fresh_engine(settings(stage, "bf16"), init, "bert.embeddings.")
        train_step(accelerator, engine, 0)
        checkpoint = save(engine, folder / f"{stage}", 1)
        _, engine = fresh_engine(settings(stage, "bf16"), other_init, "bert.embeddings.")
        names[stage] = list(load_checkpoint(engine, checkpoint, seed=SEED).shapes)
        assert state_files(save(engine, folder / f"{stage}-again", 1).path) == state_files(checkpoint.path)
    return names


def test_frozen_parameters_are_not_saved(tmp_path: Path, init: Path, other_init: Path) -> None:
    trainable = [name for name, _ in load_model(init).named_parameters() if not name.startswith("bert.embeddings.")]
    for names in run_on_ranks(save_with_frozen_embeddings, WORLD_SIZE, tmp_path, init, other_init):
        assert names == dict.fromkeys(STAGES, trainable)


def survive_errors(folder: Path, init: Path) -> dict[str, str]:
    """Save once, fail on rank 1 in several ways, save again. Returns each error's text."""
    accelerator, engine = fresh_engine(settings(2), init)
    train_step(accelerator, engine, 0)
    before = state_files(save(engine, folder, 1).path)
    errors = {}
    rank = torch.distributed.get_rank()

    def expect_error(name: str, step: int) -> None:
        try:
            save(engine, folder, step)
        except CheckpointError as error:
            errors[name] = str(error)

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    expect_error("file size limit", 2)
    expect_error("while replacing", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    real_fragments = zero_state.fragments
    if rank == 1:
        zero_state.fragments = lambda engine: itertools.islice(real_fragments(engine), 1, None)
    expect_error("incomplete", 2)
    zero_state.fragments = real_fragments

    parameter = next(p for p in engine.module.parameters() if p._hp_mapping is not None)
    saved_mapping = parameter._hp_mapping
    if rank == 1:
        del parameter._hp_mapping
    expect_error("another DeepSpeed", 2)
    parameter._hp_mapping = saved_mapping

    try:
        load_checkpoint(engine, checkpoint_at(folder, 99), seed=SEED)
    except CheckpointError as error:
        errors["load"] = str(error)
    assert state_files(folder / "step-00000001") == before and verify(checkpoint_at(folder, 1))
    train_step(accelerator, engine, 1)
    save(engine, folder, 1)
    return errors


def test_an_error_on_one_rank_reaches_all_and_keeps_the_earlier_checkpoint(tmp_path: Path, init: Path) -> None:
    ranks = run_on_ranks(survive_errors, WORLD_SIZE, tmp_path, init)
    assert ranks[0] == ranks[1], "all ranks raise the same error"
    errors = ranks[0]
    for name in ("file size limit", "while replacing"):
        assert errors[name].startswith("rank 1: cannot write ")
        assert "shard-00001-of-00002.safetensors" in errors[name] and "File too large" in errors[name]
    assert errors["incomplete"].startswith("rank 0: ") and "covers 1120 of 2048 elements" in errors["incomplete"]
    assert "rank 1: " in errors["another DeepSpeed"] and "has no _hp_mapping" in errors["another DeepSpeed"]
    assert "it was never committed" in errors["load"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"], "no temporary folder is left"
    assert verify(checkpoint_at(tmp_path, 1)).optimizer.adam_step == 2, "replaced by the last save"


class HeldBackStore(CheckpointStore):
    """Writes shards only when it is told to, and notes how many it writes at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_write = threading.Event()
        self.writing = self.most_writing = 0

    def write_shard(self, *arguments: Any) -> Any:
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        assert self.may_write.wait(60)
        shard = super().write_shard(*arguments)
        self.writing -= 1
        return shard


def save_while_training(folder: Path, init: Path) -> dict[str, Any]:
    """Train on while a save is held back; then save again at once. Each state is also saved in the foreground."""
    accelerator, engine = fresh_engine(settings(2), init)
    train_step(accelerator, engine, 0)
    committed: list[Saved] = []
    store = HeldBackStore(folder / "background")
    saver = CheckpointSaver(engine, store, seed=SEED, on_committed=committed.append)
    assert saver._buffer is not None
    address = saver._buffer.data_ptr()
    stood_still_s: list[float] = []
    for step in (1, 2):
        save(engine, folder / "foreground", step)
        # Opened from a thread, because the second save waits for the first one to be written.
        opener = threading.Timer(0.5, store.may_write.set) if step == 2 else None
        if opener:
            assert not store.may_write.is_set() and not store.checkpoints(), "nothing is committed yet"
            opener.start()
        started = time.monotonic()
        saver.save(step, Progress(sample_position=16 * step, epoch=0))
        stood_still_s.append(time.monotonic() - started)
        train_step(accelerator, engine, step)
    saver.wait()
    return {
        "stood still": stood_still_s,
        "same buffer": address == saver._buffer.data_ptr(),
        "buffer elements": saver._buffer.numel(),
        "most at a time": store.most_writing,
        "committed": [(saved.checkpoint.step, saved.blocked_s < saved.total_s) for saved in committed],
        "blocked": [saved.blocked_s for saved in committed],
    }


def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path: Path, init: Path) -> None:
    ranks = run_on_ranks(save_while_training, WORLD_SIZE, tmp_path, init)
    for step in (1, 2):
        background, foreground = (checkpoint_at(tmp_path / name, step) for name in ("background", "foreground"))
        assert verify(background).optimizer.adam_step == step
        assert state_files(background.path) == state_files(foreground.path)
    assert state_files(checkpoint_at(tmp_path / "background", 1).path) != state_files(background.path)
    assert [rank["committed"] for rank in ranks] == [[(1, True), (2, True)], []], "rank 0 alone reports"
    for said, measured in zip(ranks[0]["blocked"], ranks[0]["stood still"], strict=True):
        assert measured - 0.3 < said <= measured, "waiting for the save before is counted"
    assert ranks[0]["blocked"][1] > 0.4
    assert all(rank["same buffer"] and rank["most at a time"] == 1 for rank in ranks), "one copy, one save at a time"
    num_parameters = sum(parameter.numel() for parameter in load_model(init).parameters())
    assert sum(rank["buffer elements"] for rank in ranks) == 3 * num_parameters


def fail_in_the_background(folder: Path, init: Path) -> list[str]:
    """Fail on rank 1 while training goes on, then save again."""
    accelerator, engine = fresh_engine(settings(2), init)
    saver = CheckpointSaver(engine, CheckpointStore(folder), seed=SEED)
    events = []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    saver.save(1, Progress(sample_position=16, epoch=0))
    train_step(accelerator, engine, 0)
    saver.join(60)
    events.append(f"has failed: {saver.has_failed}")
    try:
        saver.wait()
    except CheckpointError as error:
        events.append(str(error))
    events.append(f"has failed: {saver.has_failed}")
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    saver.save(2, Progress(sample_position=32, epoch=0))
    saver.wait()
    return events


def test_a_save_that_fails_in_the_background_is_told_on_every_rank(tmp_path: Path, init: Path) -> None:
    ranks = run_on_ranks(fail_in_the_background, WORLD_SIZE, tmp_path, init)
    assert ranks[0] == ranks[1]
    before, error, after = ranks[0]
    assert (before, after) == ("has failed: True", "has failed: False")
    assert error.startswith("rank 1: cannot write ") and error.endswith("File too large") and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"], "no temporary folder is left"
    verify(checkpoint_at(tmp_path, 2))


def save_and_keep_the_best(folder: Path, init: Path) -> None:
    _, engine = fresh_engine(settings(1), init)
    for name, greater in (("lowest", False), ("highest", True)):
        store = CheckpointStore(folder / name)
        saver = CheckpointSaver(engine, store, seed=SEED, retention=Retention(1, "eval/loss", greater))
        for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 5.0), (5, 2.0), (6, None)):
            saver.save(step, Progress(sample_position=step, epoch=0), {} if loss is None else {"eval/loss": loss})
        saver.wait()


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path, init: Path) -> None:
    run_on_ranks(save_and_keep_the_best, WORLD_SIZE, tmp_path, init)
    for name, steps in (("lowest", [6, 2]), ("highest", [6, 4])):
        assert [checkpoint.step for checkpoint in CheckpointStore(tmp_path / name).checkpoints()] == steps
