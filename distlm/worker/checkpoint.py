"""Save and load the training state of a DeepSpeed engine; `distlm.checkpoint` says what the files are.

Each rank writes what it holds, without a gather, and reads the ranges it needs: the world size and the ZeRO stage may
differ between the two. The random state is not part of it: dropout is seeded by (seed, step, micro batch), and the
order of the data follows from the sample position in `progress`.

    saver = CheckpointSaver(engine, store, seed=seed)     # collective
    after a step:  saver.save(step, progress)             # copies the state to memory; a thread writes and commits it
    at each step:  saver.has_failed                       # this rank's view; have the ranks agree before acting on it
    at the end:    saver.wait()
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distlm.checkpoint.manifest import (
    KINDS,
    METHOD_STATE_NAME,
    Fragment,
    Manifest,
    Optimizer,
    Parameter,
    Progress,
    Shard,
    StateFile,
)
from distlm.checkpoint.reader import CheckpointReader
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.checkpoint.tensor_file import file_sha256, one_line
from distlm.errors import CheckpointError, DistlmError, InfrastructureError, TrainingError
from distlm.run_folder import follow_umask
from distlm.worker import zero_state
from distlm.worker.read_back import live_weights, require_equal
from distlm.worker.zero_state import HeldFragment

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept after a commit: the newest `save_total_limit` (None: all) and the best one."""

    save_total_limit: int | None = None
    metric: str = "eval/loss"
    greater_is_better: bool = False


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint. `blocked_s`: how long training stood still for it, also to wait for the save before;
    `total_s`: until it was committed."""

    checkpoint: Checkpoint
    size_bytes: int
    blocked_s: float
    total_s: float
    warning: str = ""
    """What went wrong after the commit, in deleting old ones; empty: nothing."""


@dataclass
class _Job:
    """One save on one rank."""

    step: int
    started: float
    """When training stopped for it, by time.monotonic()."""
    manifest: Callable[..., Manifest] | None = None
    """Makes the manifest once the shards are known."""
    fragments: list[Fragment] = field(default_factory=list)
    content: Any = ()
    """The bytes of this rank's shard, an iterable of memoryviews."""
    method_state: dict[str, Tensor] | None = None
    """What the training method keeps, on every rank the same; None: nothing."""
    live: dict[str, Tensor] | None = None
    """On rank 0, what the checkpoint must hold; None: it is not read back."""
    error: Exception | None = None
    blocked_s: float = 0.0


class CheckpointSaver:
    """Writes the checkpoints of one engine, one at a time. Making it, `save` and `wait` are collective.

    With `asynchronous`, a save copies the state into one buffer in host memory (12 bytes per parameter, divided by the
    number of ranks), allocated here once; a thread does the rest while training goes on. Without it, a save needs no
    buffer and returns when the checkpoint is committed.

    The ranks agree on the end of each save through a process group of their own, so that the thread's messages never
    meet those of the training.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        store: CheckpointStore,
        *,
        seed: int,
        asynchronous: bool = True,
        reads_back: bool = False,
        method_state: Callable[[], dict[str, Tensor]] | None = None,
        retention: Retention | None = None,
        before_commit: Callable[[int], None] = lambda step: None,
        on_committed: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        """With `reads_back` each checkpoint is compared with the model before it is committed, which takes a copy of
        the trainable weights on rank 0. `method_state` gives what the training method keeps. `before_commit` and
        `on_committed` are called on rank 0, in the thread; what the former raises fails the save. Raises
        CheckpointError if the store cannot be written."""
        self._engine, self._store, self._seed = engine, store, seed
        self._reads_back, self._method_state = reads_back, method_state
        self._retention = retention or Retention()
        self._before_commit, self._on_committed = before_commit, on_committed
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._parameters = [Parameter(name=n, shape=shape) for n, shape in zero_state.trainable_shapes(engine).items()]
        # Looked up once: it takes 8 ms, a quarter of the time that a save of 250 MB blocks.
        self._versions = {package: version(package) for package in ("torch", "deepspeed", "accelerate", "transformers")}
        self._token, failure = self._broadcast(_outcome(self._begin) if self._rank == 0 else None)
        _raise_together({0: failure} if failure else {})
        self._buffer = self._allocate_buffer() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def _begin(self) -> str:
        self._store.clean()
        return secrets.token_hex(4)

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the last save failed; `wait` then raises on every rank."""
        return self._error is not None

    def save(
        self,
        step: int,
        progress: Progress,
        metrics: dict[str, float] | None = None,
        *,
        stopped_at: float | None = None,
    ) -> None:
        """Save the state after `step`. Waits for the save before, and raises its error; the new one is then not begun.
        An error of this save is raised by the next `wait`, also without `asynchronous`.

        Args:
            metrics: the evaluation at this step.
            stopped_at: when training stopped for it, by time.monotonic(); None: now.

        Raises:
            CheckpointError: on every rank, naming the ranks that failed, the file and the cause.
            TrainingError: on every rank, for what no storage is to blame for.
        """
        job = _Job(step, time.monotonic() if stopped_at is None else stopped_at)
        self.wait()
        try:
            # First, since it is collective: no rank may fail before it.
            job.live = live_weights(self._engine) if self._reads_back else None
            if self._method_state is not None and self._rank == 0:
                job.method_state = {name: tensor.cpu().clone() for name, tensor in self._method_state().items()}
            held = list(_fragments_to_write(self._engine))
            numbers = {parameter.name: number for number, parameter in enumerate(self._parameters)}
            job.fragments = [Fragment(numbers[part.name], part.start, part.numel) for part in held]
            job.manifest = self._manifest_maker(step, progress, metrics or {})
            job.content = self._snapshot(held) if self._buffer is not None else _live_content(held)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            job.error = error
        job.blocked_s = time.monotonic() - job.started
        if self._buffer is not None:
            self._thread = threading.Thread(target=self._write_and_commit, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write_and_commit(job)

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            CheckpointError, InfrastructureError, TrainingError: the last one failed; on every rank.
            RuntimeError: another rank has gone meanwhile, in the words of the process group.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self, timeout_s: float) -> None:
        """Give a save under way that long to end, whatever its end is. Not collective: for a rank that gives up."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    # --- copying -----------------------------------------------------------------------------------------------------

    def _allocate_buffer(self) -> Tensor:
        numel = sum(fragment.numel for fragment in _fragments_to_write(self._engine))
        # Filled, so that the operating system hands out the memory now and not in the first save.
        buffer = torch.zeros((len(KINDS), numel))
        if self._engine.device.type == "cuda" and numel:
            _pin(buffer)
        return buffer

    def _snapshot(self, held: list[HeldFragment]) -> list[memoryview]:
        assert self._buffer is not None
        for row, kind in zip(self._buffer, KINDS, strict=True):
            parts = row.split([fragment.numel for fragment in held])
            for part, fragment in zip(parts, held, strict=True):
                part.copy_(fragment.tensors[kind], non_blocking=True)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()
        return [_bytes(self._buffer)] if self._buffer.numel() else []

    def _manifest_maker(self, step: int, progress: Progress, metrics: dict[str, float]) -> Callable[..., Manifest]:
        """The manifest but for its shards, taken now: the engine trains on while they are written."""
        engine = self._engine
        precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.torch_autocast_enabled() else "no"
        return partial(
            Manifest,
            step=step,
            progress=progress,
            seed=self._seed,
            world_size=self._world_size,
            zero_stage=zero_state.actual_zero_stage(engine),
            mixed_precision=precision,
            versions=self._versions,
            metrics=metrics,
            parameters=self._parameters,
            optimizer=Optimizer(
                adam_step=zero_state.adam_step(engine),
                groups=zero_state.hyper_parameters(engine),
                loss_scaler=zero_state.loss_scaler_state(engine),
            ),
        )

    # --- writing (in the thread) -------------------------------------------------------------------------------------

    def _write_and_commit(self, job: _Job) -> None:
        """Write this rank's shard; when all have, rank 0 commits; all learn how it ended."""
        temporary = self._store.temporary(job.step, self._token)
        try:
            outcomes = self._gather(_outcome(lambda: self._write_shard(job)))
            failures: dict[int, _Failure] = {}
            if outcomes is not None:
                failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure}
                if not failures:
                    _, failure = _outcome(lambda: self._commit(job, dict(shard for shard, _ in outcomes)))
                    failures = {0: failure} if failure else {}
                if failures:
                    self._store.discard(temporary)
            _raise_together(self._broadcast(failures))
        except Exception as error:  # noqa: BLE001 - raised by the next `wait`
            self._error = error

    def _write_shard(self, job: _Job) -> tuple[str, Shard]:
        if job.error is not None:
            raise job.error
        return self._store.write_shard(
            self._store.temporary(job.step, self._token),
            self._rank,
            self._world_size,
            self._parameters,
            job.fragments,
            job.content,
        )

    def _commit(self, job: _Job, shards: dict[str, Shard]) -> None:
        assert job.manifest is not None
        temporary = self._store.temporary(job.step, self._token)
        method_state = _write_method_state(temporary, job.method_state) if job.method_state else None
        manifest = job.manifest(shards=shards, method_state=method_state)
        if job.live is not None:
            require_equal(Checkpoint(job.step, temporary), manifest, job.live)
        self._before_commit(job.step)
        checkpoint = self._store.commit(temporary, manifest)
        total_s = time.monotonic() - job.started
        warning = self._prune()
        blocked_s = job.blocked_s if self._buffer is not None else time.monotonic() - job.started
        self._on_committed(Saved(checkpoint, manifest.size_bytes, blocked_s, total_s, warning))

    def _prune(self) -> str:
        """Delete what is not kept. The new checkpoint stands, so a failure is no failure of the save: returns it."""
        kept = self._retention
        if kept.save_total_limit is None:
            return ""
        try:
            self._store.prune(kept.save_total_limit, self._store.best(kept.metric, kept.greater_is_better))
        except (CheckpointError, OSError) as error:
            return str(error)
        return ""

    # --- agreeing ----------------------------------------------------------------------------------------------------

    def _gather(self, outcome: tuple[Any, _Failure | None]) -> list[Any] | None:
        """Every rank's outcome, on rank 0 alone: the shards' fragments are many."""
        outcomes = [None] * self._world_size if self._rank == 0 else None
        dist.gather_object(outcome, outcomes, dst=0, group=self._group)
        return outcomes

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _write_method_state(folder: Path, tensors: dict[str, Tensor]) -> StateFile:
    """Raises CheckpointError."""
    path = folder / METHOD_STATE_NAME
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        follow_umask(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return StateFile(size_bytes=path.stat().st_size, sha256=file_sha256(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {one_line(error)}") from error


def load_method_state(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Tensor]:
    """What the training method has kept; empty: nothing. Raises CheckpointError."""
    if manifest.method_state is None:
        return {}
    path = checkpoint.path / METHOD_STATE_NAME
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error


class _Failure(NamedTuple):
    """Why a rank failed, told to the others."""

    text: str
    kind: type[DistlmError]
    """CheckpointError, InfrastructureError, or TrainingError for what neither is to blame for."""


def _raise_together(failures: Mapping[int, _Failure]) -> None:
    """Raise an error if any rank has failed; called with the same failures on every rank."""
    if failures:
        kinds = {failure.kind for failure in failures.values()}
        kind = kinds.pop() if len(kinds) == 1 else TrainingError if TrainingError in kinds else InfrastructureError
        raise kind("; ".join(f"rank {rank}: {failure.text}" for rank, failure in failures.items()), tuple(failures))


def _outcome(action: Callable[[], T]) -> tuple[T | None, _Failure | None]:
    """(result, None) or (None, failure), so that it can be told to other ranks before anybody gives up."""
    try:
        return action(), None
    except InfrastructureError as error:
        kind = CheckpointError if isinstance(error, CheckpointError) else InfrastructureError
        return None, _Failure(str(error), kind)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        traceback.print_exc()
        return None, _Failure(f"{type(error).__name__}: {one_line(error)}", TrainingError)


_ALREADY_REGISTERED = 712
"""CUDA takes the memory for that of somebody else, and would copy to where it was: the next operation reports it."""


def _pin(buffer: Tensor) -> None:
    """Have CUDA copy into it directly. In place: torch's own pinned memory is rounded up to a power of two. Where the
    driver refuses, a copy takes longer, and that is all."""
    refusal = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if refusal not in (0, _ALREADY_REGISTERED):
        with suppress(RuntimeError):  # CUDA remembers the refusal, and the next operation would report it
            torch.zeros((), device="cuda")


def _fragments_to_write(engine: DeepSpeedEngine) -> Iterator[HeldFragment]:
    """This rank's share: what it holds, or at stage 0, where all hold everything, an equal slice of it."""
    if zero_state.actual_zero_stage(engine) != 0:
        yield from zero_state.fragments(engine)
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = sum(fragment.numel for fragment in zero_state.fragments(engine))
    slice_start, slice_end = total * rank // world_size, total * (rank + 1) // world_size
    position = 0
    for fragment in zero_state.fragments(engine):
        start = max(slice_start - position, 0)
        end = min(slice_end - position, fragment.numel)
        if start < end:
            yield HeldFragment(
                fragment.name, fragment.start + start, {k: t[start:end] for k, t in fragment.tensors.items()}
            )
        position += fragment.numel


def _live_content(held: list[HeldFragment]) -> Iterator[memoryview]:
    for kind in KINDS:
        for fragment in held:
            yield _bytes(fragment.tensors[kind].cpu())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, *, seed: int) -> Manifest:
    """Restore weights, Adam moments and step counts of a checkpoint written at any world size and stage. Collective.

    Reads the manifest and the ranges needed, and no hashes: choose it with `CheckpointStore.latest_good`.
    Hyper-parameters are not restored, because the run's config decides them.

    Raises:
        CheckpointError: on every rank, also if the checkpoint is of another model or seed. The engine's state is then
            undefined.
    """
    manifest, failure = _outcome(lambda: _load_local(engine, checkpoint, seed))
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    _raise_together({rank: failure for rank, failure in enumerate(failures) if failure})
    assert manifest is not None
    zero_state.publish_weights(engine)
    engine.global_steps = manifest.step
    engine.micro_steps = manifest.step * engine.gradient_accumulation_steps()
    return manifest


def _load_local(engine: DeepSpeedEngine, checkpoint: Checkpoint, seed: int) -> Manifest:
    manifest = CheckpointStore(checkpoint.path.parent).manifest(checkpoint)
    _require_same_model(checkpoint, manifest.shapes, zero_state.trainable_shapes(engine))
    if manifest.seed != seed:
        raise CheckpointError(f"{checkpoint.path} is of a run with seed {manifest.seed}, and this one has {seed}")
    reader = CheckpointReader(checkpoint, manifest)
    zero_state.start_adam(engine, manifest.optimizer.adam_step)
    zero_state.set_loss_scaler_state(engine, manifest.optimizer.loss_scaler)
    for fragment in zero_state.fragments(engine):
        for kind in KINDS:
            _read_into(reader, fragment, kind)
    return manifest


def _read_into(reader: CheckpointReader, fragment: HeldFragment, kind: str) -> None:
    live = fragment.tensors[kind]
    staging = live if live.device.type == "cpu" else torch.empty_like(live, device="cpu")
    reader.read_into(_bytes(staging), fragment.name, kind, fragment.start)
    if staging is not live:
        live.copy_(staging)


def _require_same_model(checkpoint: Checkpoint, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {len(differing)} trainable parameters differ, the first is {name}"
            f" with shape {saved.get(name, 'none')} in the checkpoint and {wanted.get(name, 'none')} in the model"
        )
