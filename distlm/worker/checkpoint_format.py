"""What a checkpoint is on disk, and which one may be restored. Standard library only: the controller uses it too.

    checkpoints/
      step-00000100/
        shard-00000-of-00002.safetensors    flat fp32 fragments: weights and Adam moments
        shard-00001-of-00002.safetensors
        manifest.json                       written last: what belongs here, with sizes and SHA-256
      .step-00000200.tmp-3fa9c1/            being written; never restored
      .step-00000100.old                    being replaced; counts only while step-00000100 is missing

A shard holds one-dimensional tensors named "PARAMETER:KIND:START": elements START.. of the flattened parameter, of one
kind in `KINDS`. The ranges of all shards cover every trainable parameter exactly once per kind, whatever world size
and ZeRO stage wrote them, so any other can read them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from distlm.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""The fp32 weight and Adam's two moments, under the names torch.optim gives them."""

logger = logging.getLogger(__name__)


class Range(NamedTuple):
    """Elements start..start+numel of a flattened parameter, of one kind."""

    name: str
    kind: str
    start: int
    numel: int

    @property
    def tensor_name(self) -> str:
        return f"{self.name}:{self.kind}:{self.start}"


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint, as its writer saw it."""

    size_bytes: int
    sha256: str
    ranges: list[Range]


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    `parameters` maps a name to its `shape`. `progress` is the training loop's own (epoch, sample position).
    `optimizer` holds `adam_step`, the parameter groups' hyper-parameters (a record: the run's config decides) and, in
    fp16, the loss scaler. `shards` maps file names to what they hold.
    """

    step: int
    progress: dict[str, Any]
    seed: int
    world_size: int
    zero_stage: int
    mixed_precision: str
    versions: dict[str, str]
    parameters: dict[str, dict[str, Any]]
    optimizer: dict[str, Any]
    shards: dict[str, Shard]
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> str:
        content = asdict(self)
        for shard in content["shards"].values():
            shard["ranges"] = [list(r) for r in shard["ranges"]]
        return json.dumps({"manifest_sha256": _content_sha256(content), **content}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError, KeyError or TypeError if the text is torn, altered or of another format."""
        content = json.loads(text)
        expected = content.pop("manifest_sha256")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {content['format_version']}; this distlm reads {FORMAT_VERSION}")
        if _content_sha256(content) != expected:
            raise ValueError("its content does not match its own SHA-256")
        content["shards"] = {
            file: Shard(s["size_bytes"], s["sha256"], [Range(*r) for r in s["ranges"]])
            for file, s in content["shards"].items()
        }
        return cls(**content)


def _content_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checkpoint(NamedTuple):
    """A folder that claims to be a checkpoint; `verify` tells whether it is one. Orders by step."""

    step: int
    path: Path


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def replaced_name(step: int) -> str:
    return f".{checkpoint_name(step)}.old"


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """All checkpoints of a run, newest first; folders still being written are not among them."""
    found: dict[int, Path] = {}
    for pattern in (r"\.step-(\d+)\.old", r"step-(\d+)"):  # the second wins
        for path in folder.iterdir() if folder.is_dir() else ():
            if match := re.fullmatch(pattern, path.name):
                found[int(match[1])] = path
    return sorted((Checkpoint(step, path) for step, path in found.items()), reverse=True)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: it is missing, unreadable, altered, or of a format version this code does not know.
    """
    try:
        return Manifest.from_json((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST_NAME}: it was never committed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST_NAME} cannot be used: {type(error).__name__}: {error}") from error


def verify(path: Path) -> Manifest:
    """Check a checkpoint against its manifest, reading every byte, and return the manifest.

    Raises:
        CheckpointError: with what is missing, torn or altered.
    """
    manifest = read_manifest(path)
    check_coverage(manifest.parameters, (r for shard in manifest.shards.values() for r in shard.ranges))
    for name, shard in manifest.shards.items():
        file = path / name
        try:
            size_bytes = file.stat().st_size
            if size_bytes != shard.size_bytes:
                raise CheckpointError(f"{file} has {size_bytes} bytes, the manifest says {shard.size_bytes}")
            if file_sha256(file) != shard.sha256:
                raise CheckpointError(f"{file} was altered: its SHA-256 is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return manifest


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_coverage(parameters: Mapping[str, Mapping[str, Any]], ranges: Iterable[Range]) -> None:
    """Raise CheckpointError unless the ranges cover every parameter exactly once for each kind."""
    by_tensor: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, kind, start, numel in ranges:
        by_tensor.setdefault((name, kind), []).append((start, numel))
    expected = {(name, kind) for name in parameters for kind in KINDS}
    for name, kind in sorted(by_tensor.keys() - expected):
        raise CheckpointError(f"the shards hold {kind} of {name}, which is no trainable parameter of the model")
    for name, kind in sorted(expected):
        position = 0
        for start, numel in sorted(by_tensor.get((name, kind), [])):
            if start != position:
                problem = "is missing" if start > position else "is there twice"
                raise CheckpointError(f"{kind} of {name} {problem} at element {min(start, position)}")
            position += numel
        total = math.prod(parameters[name]["shape"])
        if position != total:
            raise CheckpointError(f"{kind} of {name} covers {position} of {total} elements")


def latest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that `verify` accepts, and why each newer one was skipped (also logged as a warning)."""
    reasons = []
    for checkpoint in list_checkpoints(folder):
        try:
            verify(checkpoint.path)
        except CheckpointError as error:
            reasons.append(str(error))
            logger.warning("skipping checkpoint %s: %s", checkpoint.path.name, error)
        else:
            return checkpoint, reasons
    return None, reasons


def prune(folder: Path, save_total_limit: int) -> list[Path]:
    """Delete all but the newest `save_total_limit` checkpoints, and return what was deleted.

    The last good one is never deleted: if none of those kept passes `verify`, the newest older one that does is kept
    as well, and if there is none, nothing is deleted.
    """
    if save_total_limit < 1:
        raise ValueError(f"save_total_limit is {save_total_limit}; it must be 1 or more")
    if len(list_checkpoints(folder)) <= save_total_limit:
        return []
    good, _ = latest_good(folder)
    if good is None:
        return []
    surplus = [c.path for c in list_checkpoints(folder)[save_total_limit:] if c != good]
    for path in surplus:
        remove_checkpoint(path)
    return surplus


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that an interrupted deletion leaves none that looks whole."""
    (path / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(path)


def begin(folder: Path, step: int, attempt: str) -> Path:
    """Make and return the folder to write into, and clear away what killed writers left. One process calls it."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*.tmp-*"):
        shutil.rmtree(leftover)
    for leftover in folder.glob(".step-*.old"):
        committed = folder / leftover.name.removeprefix(".").removesuffix(".old")
        if committed.exists():
            shutil.rmtree(leftover)
        else:
            leftover.rename(committed)
    temporary = folder / f".{checkpoint_name(step)}.tmp-{attempt}"
    temporary.mkdir()
    return temporary


def commit(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest into `temporary` and rename it to its final name, durably. One process calls it.

    An older checkpoint of the same step is replaced: at each moment one of the two is there.

    Raises:
        CheckpointError: the shards do not cover the parameters exactly once.
        OSError: the storage failed; an older checkpoint of the same step is back in its place.
    """
    check_coverage(manifest.parameters, (r for shard in manifest.shards.values() for r in shard.ranges))
    with open(temporary / MANIFEST_NAME, "w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    final = temporary.parent / checkpoint_name(manifest.step)
    replaced = temporary.parent / replaced_name(manifest.step)
    if final.exists():
        final.rename(replaced)
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; fsync of a file does not cover its entry."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
