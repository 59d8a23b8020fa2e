"""Save and load the training state of a DeepSpeed engine; see checkpoint_format.py for the files.

Each rank writes what it holds, without a gather, and reads the ranges it needs: the world size and the ZeRO stage may
differ between the two. The random state is not part of it: dropout is seeded by (seed, step, micro batch), and the
order of the data follows from the sample position in `progress`.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distlm.errors import CheckpointError
from distlm.worker import zero_state
from distlm.worker.checkpoint_format import (
    Manifest,
    Range,
    Shard,
    begin,
    commit,
    file_sha256,
    read_manifest,
    shard_name,
)
from distlm.worker.zero_state import Fragment

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

T = TypeVar("T")


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, step: int, progress: dict[str, Any], *, seed: int) -> Path:
    """Write `folder`/step-NNNNNNNN and return its path. Collective; call it between steps.

    The checkpoint appears whole or not at all, and one of the same step is replaced. Earlier ones are not touched.

    Args:
        folder: the run's checkpoints/, on storage that all ranks share.
        progress: where training continues, JSON data (such as epoch and sample position); given back by a load.

    Raises:
        CheckpointError: on every rank, naming the ranks that failed, the file and the cause.
    """
    rank = torch.distributed.get_rank()

    def begin_on_rank_0() -> Path | None:
        return begin(folder, step, secrets.token_hex(4)) if rank == 0 else None

    temporary = _on_all_ranks(begin_on_rank_0)[0]
    assert temporary is not None
    try:
        shards = _on_all_ranks(lambda: _write_shard(engine, temporary))
        return _on_all_ranks(
            lambda: commit(temporary, _manifest(engine, step, progress, seed, dict(shards))) if rank == 0 else temporary
        )[0]
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _on_all_ranks(action: Callable[[], T]) -> list[T]:
    """Do `action` on each rank and return every rank's result, on every rank. If one fails, all raise CheckpointError.

    The outcomes are exchanged before anything else happens, so no rank waits for one that gave up.
    """
    outcome: tuple[T | None, str]
    try:
        outcome = action(), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        outcome = None, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome)
    failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
    if failures:
        raise CheckpointError("; ".join(failures))
    return [result for result, _ in outcomes]


def _write_shard(engine: DeepSpeedEngine, folder: Path) -> tuple[str, Shard]:
    tensors = {
        Range(fragment.name, kind, fragment.start, fragment.numel): tensor.to("cpu", copy=True)
        for fragment in _fragments_to_write(engine)
        for kind, tensor in fragment.tensors.items()
    }
    name = shard_name(torch.distributed.get_rank(), torch.distributed.get_world_size())
    path = folder / name
    try:
        save_file({r.tensor_name: tensor for r, tensor in tensors.items()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return name, Shard(path.stat().st_size, file_sha256(path), list(tensors))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def _fragments_to_write(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    """This rank's share: what it holds, or at stage 0, where all hold everything, an equal slice of it."""
    if zero_state.actual_zero_stage(engine) != 0:
        yield from zero_state.fragments(engine)
        return
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = sum(fragment.numel for fragment in zero_state.fragments(engine))
    slice_start, slice_end = total * rank // world_size, total * (rank + 1) // world_size
    position = 0
    for fragment in zero_state.fragments(engine):
        start = max(slice_start - position, 0)
        end = min(slice_end - position, fragment.numel)
        if start < end:
            yield Fragment(fragment.name, start, {k: t[start:end] for k, t in fragment.tensors.items()})
        position += fragment.numel


def _manifest(
    engine: DeepSpeedEngine, step: int, progress: dict[str, Any], seed: int, shards: dict[str, Shard]
) -> Manifest:
    precision = "fp16" if engine.fp16_enabled() else "bf16" if engine.torch_autocast_enabled() else "no"
    return Manifest(
        step=step,
        progress=progress,
        seed=seed,
        world_size=torch.distributed.get_world_size(),
        zero_stage=zero_state.actual_zero_stage(engine),
        mixed_precision=precision,
        versions={package: version(package) for package in ("torch", "deepspeed", "accelerate", "transformers")},
        parameters={name: {"shape": shape} for name, shape in zero_state.trainable_shapes(engine).items()},
        optimizer={
            "adam_step": zero_state.adam_step(engine),
            "groups": zero_state.hyper_parameters(engine),
            "loss_scaler": zero_state.loss_scaler_state(engine),
        },
        shards=shards,
    )


def load_checkpoint(engine: DeepSpeedEngine, path: Path) -> Manifest:
    """Restore weights, Adam moments and step counts from `path`, written at any world size and stage. Collective.

    Reads the manifest and the ranges needed, and no hashes: choose `path` with `checkpoint_format.latest_good`.
    Hyper-parameters are not restored, because the run's config decides them.

    Raises:
        CheckpointError: on every rank. The engine's state is then undefined.
    """
    manifest = _on_all_ranks(lambda: _load_local(engine, path))[0]
    zero_state.publish_weights(engine)
    engine.global_steps = manifest.step
    engine.micro_steps = manifest.step * engine.gradient_accumulation_steps()
    return manifest


def _load_local(engine: DeepSpeedEngine, path: Path) -> Manifest:
    manifest = read_manifest(path)
    saved = {name: parameter["shape"] for name, parameter in manifest.parameters.items()}
    wanted = zero_state.trainable_shapes(engine)
    if saved != wanted:
        differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        name = differing[0]
        raise CheckpointError(
            f"{path} is of another model: {len(differing)} trainable parameters differ, the first is {name} with shape"
            f" {saved.get(name, 'none')} in the checkpoint and {wanted.get(name, 'none')} in the model"
        )
    zero_state.start_adam(engine, manifest.optimizer["adam_step"])
    zero_state.set_loss_scaler_state(engine, manifest.optimizer["loss_scaler"])
    with ShardReader(path, manifest) as reader:
        for fragment in zero_state.fragments(engine):
            for kind, tensor in fragment.tensors.items():
                reader.read_into(tensor, fragment.name, kind, fragment.start)
    return manifest


def read_parameters(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 weight in its full shape) of each trainable parameter, one at a time; needs no process group."""
    manifest = read_manifest(path)
    with ShardReader(path, manifest) as reader:
        for name, parameter in manifest.parameters.items():
            weight = torch.empty(math.prod(parameter["shape"]))
            reader.read_into(weight, name, "weight", 0)
            yield name, weight.view(parameter["shape"])


class ShardReader(ExitStack):
    """Reads any range of any parameter out of the shards that hold parts of it. Opens each file once."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__()
        self._path = path
        self._opened: dict[str, Any] = {}
        self._ranges: dict[tuple[str, str], list[tuple[Range, str]]] = {}
        for file, shard in manifest.shards.items():
            for r in shard.ranges:
                self._ranges.setdefault((r.name, r.kind), []).append((r, file))

    def read_into(self, destination: Tensor, name: str, kind: str, start: int) -> None:
        """Fill flat `destination` with the elements start.. of a parameter.

        Raises:
            CheckpointError: the shards do not hold all of them, or a file cannot be read.
        """
        end = start + destination.numel()
        found = 0
        for r, file in self._ranges.get((name, kind), []):
            low, high = max(start, r.start), min(end, r.start + r.numel)
            if low < high:
                try:
                    part = self._open(file).get_slice(r.tensor_name)[low - r.start : high - r.start]
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"cannot read {self._path / file}: {error}") from error
                destination[low - start : high - start].copy_(part)
                found += high - low
        if found != destination.numel():
            raise CheckpointError(f"{self._path} holds {found} of elements {start}..{end} of {kind} of {name}")

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            self._opened[file] = self.enter_context(safe_open(self._path / file, framework="pt"))
        return self._opened[file]
