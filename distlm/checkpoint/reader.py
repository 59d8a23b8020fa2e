"""Reads any range of any parameter out of a checkpoint, whichever shards hold parts of it."""

from __future__ import annotations

from collections.abc import Iterator

from distlm.checkpoint.manifest import Manifest, tensor_name
from distlm.checkpoint.store import Checkpoint
from distlm.checkpoint.tensor_file import TensorFile
from distlm.errors import CheckpointError

ITEM_BYTES = 4  # fp32


class CheckpointReader:
    """The elements of one checkpoint. Reads what is asked for; hashes are compared by `CheckpointStore.verify`."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.manifest = manifest
        self._path = checkpoint.path
        self._files: dict[str, TensorFile] = {}
        self._places: dict[str, list[tuple[int, int, str]]] = {parameter.name: [] for parameter in manifest.parameters}
        for file, shard in manifest.shards.items():
            for parameter, start, numel in shard.fragments:
                self._places[manifest.parameters[parameter].name].append((start, start + numel, file))

    def read_into(self, destination: memoryview, parameter: str, kind: str, start: int = 0) -> None:
        """Fill a contiguous fp32 buffer with the elements start.. of one kind of a parameter.

        Raises:
            CheckpointError: the checkpoint does not hold all of them, or a file cannot be read.
        """
        target = destination.cast("B")
        end = start + len(target) // ITEM_BYTES
        found = 0
        for file, low, high, begin in self._parts(parameter, start, end):
            part = target[(low - start) * ITEM_BYTES : (high - start) * ITEM_BYTES]
            self._open(file).read_into(part, tensor_name(parameter, kind, begin), low - begin)
            found += high - low
        if found != end - start:
            raise CheckpointError(f"{self._path} holds {found} of elements {start}..{end} of {kind} of {parameter}")

    def _parts(self, parameter: str, start: int, end: int) -> Iterator[tuple[str, int, int, int]]:
        """(file, first, end, first element of the fragment) of each fragment that holds some of the elements."""
        for begin, stop, file in self._places.get(parameter, []):
            low, high = max(start, begin), min(end, stop)
            if low < high:
                yield file, low, high, begin

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = TensorFile(self._path / file)
        return self._files[file]
