"""The checkpoints of a run on disk: the one place that spells their paths and writes their bytes.

    checkpoints/
      step-00000100/
        shard-00000-of-00002.safetensors    flat fp32 fragments: weights and Adam moments
        shard-00001-of-00002.safetensors
        manifest.json                       written last: what belongs here, with sizes and SHA-256
      .step-00000200.tmp-3fa9c1/            being written; never restored
      .step-00000100.old                    being replaced; counts only while step-00000100 is missing
      .step-00000050.deleted-3fa9c1         being deleted

A checkpoint appears by one rename and disappears by one rename, so a process that is killed leaves each of them whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from distlm.checkpoint.manifest import (
    METHOD_STATE_NAME,
    Fragment,
    Manifest,
    Parameter,
    Shard,
    StateFile,
    shard_tensors,
)
from distlm.checkpoint.tensor_file import (
    TensorFile,
    file_sha256,
    one_line,
    read_error,
    require_regular_file,
    write_tensor_file,
)
from distlm.errors import CheckpointError, UnknownFormatError, UnreadableError

MANIFEST_NAME = "manifest.json"
_MAX_MANIFEST_BYTES = 2**28
_HASHING_THREADS = 8

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A folder that claims to be a checkpoint; `verify` tells whether it is one. Orders by step."""

    step: int
    path: Path


class CheckpointStore:
    """The checkpoints in one folder, on storage that all ranks share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known_good: set[Path] = set()  # committed here, so their hashes need no second look

    # --- finding -----------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Checkpoint]:
        """The folders with a checkpoint's name, newest first, whole or not.

        Raises:
            CheckpointError: the storage does not answer. (To find nothing would be to start from nothing.)
        """
        found: dict[int, Path] = {}
        for pattern in (r"\.(step-([0-9]{8,18}))\.old", r"(step-([0-9]{8,18}))"):  # the second wins
            for path in self._entries():
                match = re.fullmatch(pattern, path.name)
                if match and match[1] == _name(int(match[2])) and _is_folder(path):
                    found[int(match[2])] = path
        return sorted((Checkpoint(step, path) for step, path in found.items()), reverse=True)

    def newest_step(self) -> int:
        """Of the committed ones; 0: there is none."""
        return max((checkpoint.step for checkpoint in self.checkpoints()), default=0)

    def unfinished(self) -> list[Path]:
        """What is being written or deleted, or what a killed process left so. Raises CheckpointError."""
        return sorted(path for path in self._entries() if re.match(r"\.step-[0-9]+.*\.(tmp|deleted)-", path.name))

    def _entries(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror}") from error

    def manifest(self, checkpoint: Checkpoint) -> Manifest:
        """Raises CheckpointError if it is missing, unreadable or altered, UnknownFormatError if it is of another format
        version."""
        path = checkpoint.path / MANIFEST_NAME
        try:
            if not path.exists():
                raise CheckpointError(f"{checkpoint.path} has no {MANIFEST_NAME}: it was never committed")
            if require_regular_file(path) > _MAX_MANIFEST_BYTES:
                raise CheckpointError(f"{path} is larger than any manifest")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise read_error(path, error) from error
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
        try:
            manifest = Manifest.from_json(text)
        except CheckpointError as error:
            raise type(error)(f"{path} {one_line(error)}") from error
        if manifest.step != checkpoint.step:
            raise CheckpointError(f"{path} is of step {manifest.step}, not {checkpoint.step}: the folder was renamed")
        return manifest

    def check(self, checkpoint: Checkpoint) -> Manifest:
        """The manifest, if the files that it names are there in the right size. Reads no tensor.

        Raises:
            CheckpointError: with what is missing, torn or altered.
        """
        manifest = self.manifest(checkpoint)
        files: dict[str, Shard | StateFile] = {**manifest.shards}
        if manifest.method_state is not None:
            files[METHOD_STATE_NAME] = manifest.method_state
        for name, shard in files.items():
            path = checkpoint.path / name
            size_bytes = require_regular_file(path, follow_links=False)  # nobody knows who deletes a link's target
            if size_bytes != shard.size_bytes:
                raise CheckpointError(f"{path} has {size_bytes} bytes, the manifest says {shard.size_bytes}")
        return manifest

    def verify(self, checkpoint: Checkpoint) -> Manifest:
        """As `check`, and every byte is read and compared with its SHA-256, and every shard's header with the manifest.

        Raises:
            CheckpointError: with what is missing, torn or altered.
        """
        manifest = self.check(checkpoint)

        def verify_shard(name: str) -> None:
            path, shard = checkpoint.path / name, manifest.shards[name]
            held = [(tensor, (info.dtype, info.shape)) for tensor, info in TensorFile(path).tensors.items()]
            if held != list(shard_tensors(manifest.parameters, shard.fragments).items()):
                raise CheckpointError(f"{path} does not hold the tensors that the manifest says")
            _require_sha256(path, shard.sha256)

        if manifest.method_state is not None:
            _require_sha256(checkpoint.path / METHOD_STATE_NAME, manifest.method_state.sha256)
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing and reading let other threads run
            for _ in pool.map(verify_shard, manifest.shards):
                pass
        return manifest

    def latest_good(self) -> tuple[Checkpoint | None, list[CheckpointError]]:
        """The newest checkpoint that `verify` accepts, and why each newer one was skipped (also in the log)."""
        skipped = []
        for checkpoint in self.checkpoints():
            try:
                if checkpoint.path in self._known_good:
                    self.check(checkpoint)
                else:
                    self.verify(checkpoint)
            except CheckpointError as error:
                skipped.append(error)
                logger.warning("skipping checkpoint %s: %s", checkpoint.path.name, error)
            else:
                return checkpoint, skipped
        return None, skipped

    def best(self, metric: str, greater_is_better: bool) -> Checkpoint | None:
        """The checkpoint with the best value of an evaluation metric, the newer of two equals; None: none has one."""
        values = []
        for checkpoint in self.checkpoints():
            try:
                value = self.check(checkpoint).metrics.get(metric)
            except CheckpointError:
                continue
            if value is not None:
                values.append((value if greater_is_better else -value, checkpoint))
        return max(values)[1] if values else None

    # --- writing -----------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Clear away what killed writers left. One process calls it, before anything is written.

        Raises:
            CheckpointError: the storage failed.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.unfinished():
                _remove(leftover)
            for leftover in self.folder.glob(".step-*.old"):
                committed = self.folder / leftover.name.removeprefix(".").removesuffix(".old")
                if committed.is_dir():
                    _remove(leftover)
                else:
                    _remove(committed)
                    leftover.rename(committed)
        except OSError as error:
            raise CheckpointError(f"cannot clear {self.folder}: {one_line(error)}") from error

    def temporary(self, step: int, token: str) -> Path:
        """Where the shards of a checkpoint are written before it is committed. `token` tells writers apart."""
        return self.folder / f".{_name(step)}.tmp-{token}"

    def write_shard(
        self,
        temporary: Path,
        rank: int,
        world_size: int,
        parameters: Sequence[Parameter],
        fragments: Sequence[Fragment],
        content: Iterable[memoryview],
    ) -> tuple[str, Shard]:
        """Write one rank's file and return its name and its entry in the manifest.

        Args:
            content: the fp32 elements of the fragments: all weights, then all first, then all second moments.

        Raises:
            CheckpointError: the storage failed.
        """
        path = temporary / f"shard-{rank:05d}-of-{world_size:05d}.safetensors"
        try:
            temporary.mkdir(exist_ok=True)
            size_bytes, sha256 = write_tensor_file(path, shard_tensors(parameters, fragments), content)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
        return path.name, Shard(size_bytes=size_bytes, sha256=sha256, fragments=list(fragments))

    def commit(self, temporary: Path, manifest: Manifest) -> Checkpoint:
        """Write the manifest into `temporary` and rename it to its final name, durably. One process calls it.

        An older checkpoint of the same step is replaced: at each moment one of the two is there.

        Raises:
            CheckpointError: the shards do not tile the parameters, or the storage failed; an older checkpoint of the
                same step is then back in its place.
        """
        manifest.check_coverage()
        path = temporary / MANIFEST_NAME
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(temporary)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
        final = self.folder / _name(manifest.step)
        replaced = self.folder / f".{_name(manifest.step)}.old"
        try:
            if os.path.lexists(final):
                _remove(replaced)
                final.rename(replaced)
            try:
                temporary.rename(final)
                _sync_folder(self.folder)
            except OSError:
                if final.exists():
                    final.rename(temporary)
                if replaced.exists():
                    replaced.rename(final)
                raise
        except OSError as error:
            raise CheckpointError(f"cannot commit {final}: {error.strerror}") from error
        with suppress(OSError):  # the next `clean` sees to it
            _remove(replaced)
        self._known_good.add(final)
        return Checkpoint(manifest.step, final)

    def discard(self, temporary: Path) -> None:
        """Remove what was written for a checkpoint that will not be committed."""
        shutil.rmtree(temporary, ignore_errors=True)

    # --- retention ---------------------------------------------------------------------------------------------------

    def prune(self, save_total_limit: int, best: Checkpoint | None = None) -> list[Path]:
        """Delete all but the newest `save_total_limit` checkpoints and the best one, and return what was deleted.

        The last good one is never deleted: if none of those kept is whole, the newest older one that is whole is kept
        as well, and if there is none, nothing is deleted. Nor is one that cannot be read now or not by this version: it
        may be the best.

        Raises:
            CheckpointError: a checkpoint cannot be deleted.
        """
        if save_total_limit < 1:
            raise ValueError(f"save_total_limit is {save_total_limit}; it must be 1 or more")
        found = self.checkpoints()
        surplus = found[save_total_limit:]
        if not surplus:
            return []
        good = next(filter(self._was_committed_here, found), None) or self.latest_good()[0]
        if good is None:
            return []
        deleted = [c.path for c in surplus if c not in (good, best) and not self._is_unreadable(c)]
        for path in deleted:
            self._delete(path)
        return deleted

    def _was_committed_here(self, checkpoint: Checkpoint) -> bool:
        try:
            return checkpoint.path in self._known_good and bool(self.check(checkpoint))
        except CheckpointError:
            return False

    def _is_unreadable(self, checkpoint: Checkpoint) -> bool:
        try:
            self.check(checkpoint)
        except (UnreadableError, UnknownFormatError):
            return True
        except CheckpointError:
            pass
        return False

    def _delete(self, path: Path) -> None:
        """By a rename first, so that an interrupted deletion leaves none that looks whole."""
        doomed = self.folder / f".{path.name.removeprefix('.')}.deleted-{os.getpid()}"
        try:
            _remove(doomed)  # of the same step, left by a deletion that failed
            path.rename(doomed)
            _remove(doomed)
        except OSError as error:
            raise CheckpointError(f"cannot delete the old checkpoint {path}: {error.strerror}") from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _is_folder(path: Path) -> bool:
    """Raises CheckpointError where the storage does not tell."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        problem = read_error(path, error)
        if isinstance(problem, UnreadableError):
            raise problem from error
        return False


def _remove(path: Path) -> None:
    """Whatever it is, if it is there: a folder with all in it; of a link the link only. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable; fsync of a file does not cover its entry."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_sha256(path: Path, expected: str) -> None:
    try:
        if file_sha256(path) != expected:
            raise CheckpointError(f"{path} was altered: its SHA-256 is not the manifest's")
    except OSError as error:
        raise read_error(path, error) from error
