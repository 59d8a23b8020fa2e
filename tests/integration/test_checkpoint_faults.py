"""Checkpoints on storage that fills up, turns read-only or loses its writers: real tmpfs, real engines, real runs."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from place import CONFIG, Command, Place, wait_until
from ranks import free_port, run_on_ranks
from tiny_runs import HALF, STEPS, Training, make_base, train_once
from tiny_training import WORLD_SIZE, fresh_engine, settings, train_step, write_initial_weights

from distlm.checkpoint.manifest import Manifest, Progress
from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.errors import CheckpointError, DistlmError, ExitCode
from distlm.run_folder import read_json
from distlm.tracking.records import read_metrics
from distlm.worker.checkpoint import CheckpointSaver, Retention, Saved, load_checkpoint

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
NO_SPACE = "No space left on device"


@contextmanager
def small_storage(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size at `folder`, while the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(step, folder / f"step-{step:08d}")


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """Write a file that takes all room but `leave_bytes`, and return it."""
    ballast = folder / "ballast"

    def is_full() -> bool:
        room = shutil.disk_usage(folder).free - leave_bytes
        with open(ballast, "wb") as file, suppress(OSError):  # somebody else has just taken some of it
            os.posix_fallocate(file.fileno(), 0, room)
            return True
        return False

    wait_until(is_full, 10, "a file that takes all room")
    return ballast


# --- engines on small storage -----------------------------------------------------------------------------------------

SEED = 17


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_initial_weights(tmp_path_factory.mktemp("init"), dropout=0.1)


def progress_at(step: int) -> Progress:
    return Progress(sample_position=16 * step, epoch=0)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def on_rank_0(action: Callable[[], Any]) -> None:
    """Rank 0 does something to the storage that all share; the others wait for it."""
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def save_through_faults(storage: Path, init: Path, asynchronous: bool) -> dict[str, str]:
    """Save into storage that is filled, made read-only and mended in between; what each save that failed said."""
    accelerator, engine = fresh_engine(settings(2), init)
    folder, ballast = storage / "checkpoints", storage / "ballast"
    store = CheckpointStore(folder)
    saver = CheckpointSaver(engine, store, seed=SEED, asynchronous=asynchronous)
    errors = {}

    def save(step: int, fault: str = "") -> None:
        """Save step after training it; with a fault, expect that it fails and leaves the storage as it was."""
        train_step(accelerator, engine, step)
        before = sorted(folder.iterdir())
        dist.barrier()
        try:
            saver.save(step, progress_at(step))
            if asynchronous:
                saver.join(60)
                assert saver.has_failed == bool(fault)
            saver.wait()
        except CheckpointError as error:
            errors[fault] = str(error)
        assert not saver.has_failed
        dist.barrier()
        assert (sorted(folder.iterdir()) == before) == bool(fault)
        dist.barrier()

    save(1)
    shard_bytes = sum(file.stat().st_size for file in checkpoint_at(folder, 1).path.glob("shard-*"))
    pages = sum(-(-file.stat().st_size // PAGE) for file in checkpoint_at(folder, 1).path.glob("shard-*"))
    for step, fault, leave_bytes in (
        (2, "no byte", 0), (3, "one shard fits", shard_bytes // 2 + 8 * PAGE), (4, "the shards fit", pages * PAGE),
    ):  # fmt: skip
        on_rank_0(lambda: fill(storage, leave_bytes))  # noqa: B023 - called at once
        save(step, fault)
        on_rank_0(ballast.unlink)
    save(5)
    on_rank_0(lambda: remount(storage, "ro"))
    save(6, "read-only")
    on_rank_0(lambda: remount(storage, "rw"))
    save(7)
    return errors


@pytest.mark.parametrize("asynchronous", [True, False], ids=["in the background", "in the foreground"])
def test_saves_on_failing_storage_leave_what_was_and_say_why(tmp_path: Path, init: Path, asynchronous: bool) -> None:
    with small_storage(tmp_path / "storage", 8 * MIB) as storage:
        ranks = run_on_ranks(save_through_faults, WORLD_SIZE, storage, init, asynchronous)
        assert ranks[0] == ranks[1], "all ranks raise the same error"
        errors = ranks[0]
        assert list(errors) == ["no byte", "one shard fits", "the shards fit", "read-only"]
        for fault, text in errors.items():
            assert "\n" not in text and text.endswith("Read-only file system" if fault == "read-only" else NO_SPACE), (
                text
            )
        assert "rank 0: cannot write " in errors["no byte"] and "rank 1: cannot write " in errors["no byte"]
        assert "shard-00001-of-00002.safetensors" in errors["no byte"]
        assert errors["one shard fits"].count("cannot write ") in (1, 2)
        assert "manifest.json" in errors["the shards fit"]
        store = CheckpointStore(storage / "checkpoints")
        assert [path.name for path in sorted(store.folder.iterdir())] == [f"step-{step:08d}" for step in (1, 5, 7)]
        for checkpoint in store.checkpoints():
            assert store.verify(checkpoint).optimizer.adam_step == checkpoint.step


# --- trainings whose saves fail ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FailingSave:
    """A training whose second worker cannot write its shard of one step."""

    step: int
    error: Exception = CheckpointError(f"cannot write the shard: {NO_SPACE}")  # noqa: RUF009 - never changed
    overrides: tuple[str, ...] = ()

    def train(self, training: Training) -> tuple[str, str]:
        """On each rank: the type and the text of what it raises, if it does."""
        write_shard = CheckpointStore.write_shard

        def fail_at_step(store: CheckpointStore, temporary: Path, rank: int, *arguments: Any) -> Any:
            if rank == 1 and f"-{self.step:08d}." in temporary.name:
                raise self.error
            return write_shard(store, temporary, rank, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointStore, "write_shard", fail_at_step)
            try:
                train_once(training, [])
            except DistlmError as error:
                return type(error).__name__, str(error)
        return "", ""


GO_ON, IN_THE_FOREGROUND = "training.on_save_error=continue", "training.async_save=false"
BUG = KeyError("a bug")
FAILING_SAVES: dict[str, tuple[FailingSave, str, tuple[str, ...], list[int]]] = {
    # what fails; the error; what its text says; the checkpoints that are there in the end
    "goes on": (FailingSave(HALF, overrides=(GO_ON,)), "", (), [STEPS]),
    "goes on, in the foreground": (FailingSave(HALF, overrides=(GO_ON, IN_THE_FOREGROUND)), "", (), [STEPS]),
    "stops": (FailingSave(HALF), "CheckpointError", ("rank 1: cannot write", NO_SPACE, "make room"), []),
    "stops, in the foreground": (
        FailingSave(HALF, overrides=(IN_THE_FOREGROUND,)), "CheckpointError", ("rank 1: ", "make room"), [],
    ),
    "the last one": (FailingSave(STEPS, overrides=(GO_ON,)), "CheckpointError", ("rank 1: ", "make room"), [HALF]),
    "the last one, in the foreground": (
        FailingSave(STEPS, overrides=(GO_ON, IN_THE_FOREGROUND)), "CheckpointError", ("rank 1: ", "make room"), [HALF],
    ),
    "no fault of the storage": (
        FailingSave(HALF, BUG, (GO_ON,)), "TrainingError", ("rank 1: KeyError: 'a bug'",), [],
    ),
}  # fmt: skip


def train_all_with_failing_saves(trainings: dict[str, Training]) -> dict[str, tuple[str, str]]:
    return {name: FAILING_SAVES[name][0].train(training) for name, training in trainings.items()}


def test_a_save_that_fails_stops_the_training_or_not_as_the_config_says(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    trainings = {
        name: base.training(name.replace(" ", "-"), *case[0].overrides) for name, case in FAILING_SAVES.items()
    }
    ranks = run_on_ranks(train_all_with_failing_saves, 2, trainings)
    assert ranks[0] == ranks[1], "all ranks raise the same error"
    for name, (_, kind, words, steps) in FAILING_SAVES.items():
        error, text = ranks[0][name]
        assert error == kind and all(word in text for word in words) and "\n" not in text, (name, error, text)
        store = CheckpointStore(trainings[name].run.checkpoints)
        assert [checkpoint.step for checkpoint in store.checkpoints()] == steps, name
        assert not store.unfinished(), name


# --- engines that are killed ------------------------------------------------------------------------------------------

NUM_KILLS = 10
LAST_STEP = 40


class SlowStore(CheckpointStore):
    """Writes a shard in many small pieces, so that a kill finds it half written."""

    def write_shard(self, *arguments: Any) -> Any:
        *others, content = arguments
        return super().write_shard(*others, self._slowly(content))

    def _slowly(self, content: Iterable[memoryview]) -> Iterator[memoryview]:
        for piece in content:
            flat = piece.cast("B")
            for start in range(0, len(flat), 4096):
                time.sleep(0.001)  # a slow disk
                yield flat[start : start + 4096]


def train_and_save(folder: Path, init: Path, last_step: int, told: Connection | None) -> None:
    """Continue from the newest good checkpoint, save after each step, tell what is committed."""
    accelerator, engine = fresh_engine(settings(2), init)
    store = SlowStore(folder) if told else CheckpointStore(folder)
    checkpoint, _ = store.latest_good()
    first_step = load_checkpoint(engine, checkpoint, seed=SEED).step + 1 if checkpoint else 1

    def tell(saved: Saved) -> None:
        if told:
            told.send(saved.checkpoint.step)

    retention = Retention(2 if told else None)
    saver = CheckpointSaver(engine, store, seed=SEED, retention=retention, on_committed=tell)
    for step in range(first_step, last_step + 1):
        train_step(accelerator, engine, step)
        saver.save(step, progress_at(step))
    saver.wait()


def rank_main(rank: int, port: int, folder: Path, init: Path, told: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train_and_save(folder, init, LAST_STEP, told)


def state_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("shard-*"))}


def train_uninterrupted(folder: Path, init: Path) -> None:
    train_and_save(folder, init, LAST_STEP, None)


def test_ranks_killed_while_they_write_lose_nothing_committed(tmp_path: Path, init: Path) -> None:
    """Whoever is killed and when: all that is ever restored has the bits of a run that nobody killed."""
    reference, folder = tmp_path / "reference", tmp_path / "checkpoints"
    run_on_ranks(train_uninterrupted, WORLD_SIZE, reference, init)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["distlm.worker.checkpoint", "distlm.worker.engine", "transformers"])
    draw = random.Random(5)
    announced, in_mid_save = 0, 0
    for number in range(NUM_KILLS + 1):
        victims = draw.choice(([0], [1], [0, 1]))
        saves, delay_s = draw.randint(0, 2), draw.uniform(0.0, 0.03)
        receiver, sender = processes.Pipe(duplex=False)
        port, store = free_port(), CheckpointStore(folder)
        leftovers = set(store.unfinished())  # of the kill before
        ranks = [
            processes.Process(target=rank_main, args=(rank, port, folder, init, sender)) for rank in range(WORLD_SIZE)
        ]
        for rank in ranks:
            rank.start()
        sender.close()
        if number < NUM_KILLS:
            for _ in range(saves):
                announced = receiver.recv()
            before = announced
            wait_until(lambda: set(store.unfinished()) - leftovers, 120, "a save under way")  # noqa: B023 - called here
            time.sleep(delay_s)  # the moment is what is tested
            for victim in victims:
                ranks[victim].kill()
        for rank in ranks:
            rank.join(60)
            assert rank.exitcode is not None, "a rank waits for ever for one that is gone"
        with suppress(EOFError):
            while True:
                announced = receiver.recv()
        in_mid_save += bool(store.unfinished())
        latest, refused = store.latest_good()
        told = f"kill {number} of ranks {victims} after {delay_s:.4f} s from step {before}: {announced}, {latest}"
        print(told)
        assert not refused, (told, refused)
        assert (latest.step if latest else 0) in (announced, announced + 1), told
        for checkpoint in store.checkpoints():
            assert state_files(checkpoint.path) == state_files(reference / checkpoint.path.name), told
    print(f"{in_mid_save} of {NUM_KILLS} kills left a checkpoint half written")
    assert announced == LAST_STEP and in_mid_save > NUM_KILLS / 2


# --- checkpoints of others --------------------------------------------------------------------------------------------


def load_forged(checkpoints: dict[str, Checkpoint], init: Path) -> dict[str, str]:
    errors = {}
    for name, checkpoint in checkpoints.items():
        _, engine = fresh_engine(settings(2), init)
        try:
            load_checkpoint(engine, checkpoint, seed=SEED)
        except CheckpointError as error:
            errors[name] = str(error)
    return errors


def save_one(folder: Path, init: Path) -> None:
    _, engine = fresh_engine(settings(2), init)
    saver = CheckpointSaver(engine, CheckpointStore(folder), seed=SEED, asynchronous=False)
    saver.save(1, progress_at(1))
    saver.wait()


def forge(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Alter a manifest, and make its own hash right again."""
    content = json.loads((path / MANIFEST_NAME).read_text())
    del content["manifest_sha256"]
    edit(content)
    (path / MANIFEST_NAME).write_text(Manifest.model_validate_json(json.dumps(content)).to_json())


def test_a_checkpoint_of_another_run_is_refused_on_every_rank(tmp_path: Path, init: Path) -> None:
    """Whole and consistent, so that nothing but the comparison with this run can tell."""
    run_on_ranks(save_one, WORLD_SIZE, tmp_path / "saved", init)
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "ours": lambda manifest: None,
        "seed": lambda manifest: manifest.update(seed=SEED + 1),
        "shape": lambda manifest: manifest["parameters"][0]["shape"].reverse(),
        "order": lambda manifest: manifest.update(step=2),
    }
    checkpoints = {}
    for name, edit in edits.items():
        shutil.copytree(tmp_path / "saved", tmp_path / name)
        forge(checkpoint_at(tmp_path / name, 1).path, edit)
        checkpoints[name] = checkpoint_at(tmp_path / name, 1)
    for name in ("ours", "seed", "shape"):
        CheckpointStore(checkpoints[name].path.parent).verify(checkpoints[name])
    ranks = run_on_ranks(load_forged, WORLD_SIZE, checkpoints, init)
    assert ranks[0] == ranks[1] and list(ranks[0]) == ["seed", "shape", "order"]
    errors = ranks[0]
    assert errors["seed"].count(f"is of a run with seed {SEED + 1}, and this one has {SEED}") == WORLD_SIZE
    assert errors["shape"].count("is of another model: 1 trainable parameters differ") == WORLD_SIZE
    assert errors["order"].count("is of step 2, not 1") == WORLD_SIZE
    assert all("rank 0: " in error and "rank 1: " in error and "\n" not in error for error in errors.values())


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A user's folder whose runs are on storage with room for about six checkpoints of 10 MiB."""
    folder = tmp_path_factory.mktemp("full")
    with small_storage(folder / "runs", 80 * MIB):
        config: dict[str, Any] = copy.deepcopy(CONFIG)
        config["model"]["config"] |= {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}
        config["training"] |= {"logging_steps": 1, "save_steps": 10, "eval_steps": 1000, "save_total_limit": 2}
        yield Place(folder, config)


def wait_for_step(command: Command, step: int) -> int:
    """The newest checkpoint's step, once it is `step` or later."""
    store = CheckpointStore(command.run.checkpoints)

    def newest() -> int:
        assert command.process.poll() is None, (command.out, command.err)
        return max((checkpoint.step for checkpoint in store.checkpoints()), default=0)

    return int(wait_until(lambda: newest() if newest() >= step else 0, 240, f"a checkpoint of step {step}"))


def logged_steps(command: Command) -> list[int]:
    return [record.step for record in read_metrics(command.run) if "train/loss" in record.values]


def test_a_run_that_finds_no_room_stops_and_is_resumed_when_there_is(place: Place) -> None:
    command = place.start("submit", "run.yaml", "training.max_steps=60")
    wait_for_step(command, 10)
    ballast = fill(place.runs_dir)  # not a byte is free, neither for checkpoints nor for metrics, logs and the result
    try:
        assert command.wait() == ExitCode.INFRASTRUCTURE, (command.out, command.err)
        print(command.out, command.err)
        cause, *followed, hint = command.err.splitlines()
        result = read_json(command.run.attempts()[-1].result_json)
        if followed:  # one of them had written its part before the disk was full
            assert f"failed on rank {result['rank']} ({result['host']}): storage: " in cause
            assert followed == [f"distlm:   rank {1 - result['rank']} only followed: ended with it"]
        else:
            assert "failed on all 2 ranks alike: storage: " in cause
        assert "No space left on device" in cause
        assert hint == f"distlm:   resume with: distlm resume {command.run.run_id}"
        assert (
            result["exit_code"] == ExitCode.INFRASTRUCTURE
            and "make room or mend the storage, then resume the run; log: " in cause
        )
        store = CheckpointStore(command.run.checkpoints)
        good, skipped = store.latest_good()
        assert good is not None and 10 <= good.step < 60 and not skipped
        assert not store.unfinished()
    finally:
        ballast.unlink()
    resumed = place.start("resume", command.run.run_id)
    assert resumed.wait() == ExitCode.SUCCEEDED, (resumed.out, resumed.err)
    assert f"continuing from checkpoint {good.path.name}" in resumed.out
    place.require_nothing_left(command.run)
    assert logged_steps(command) == list(range(1, 61))
    shutil.rmtree(command.run.path)


def test_a_run_that_may_goes_on_without_room_and_saves_again_when_there_is(place: Place) -> None:
    command = place.start("submit", "run.yaml", "training.max_steps=300", "training.on_save_error=continue")
    before = wait_for_step(command, 10)
    ballast = fill(place.runs_dir)
    try:
        command.wait_for("warning: a checkpoint was not saved, training goes on at step ")
    finally:
        ballast.unlink()
    after = wait_for_step(command, before + 20)
    assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
    assert after < 300 and "No space left on device" in command.out
    assert logged_steps(command) == list(range(1, 301)), "no metric is lost"
    lines = command.run.attempts()[-1].metrics_jsonl.read_bytes().splitlines()
    assert all(json.loads(line) for line in lines), "no line is torn"
    store = CheckpointStore(command.run.checkpoints)
    good, skipped = store.latest_good()
    assert good is not None and good.step == 300 and not skipped and not store.unfinished()
    place.require_nothing_left(command.run)
    shutil.rmtree(command.run.path)
