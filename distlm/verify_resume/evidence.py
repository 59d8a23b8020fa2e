"""What attempts have left for the comparison: samples, losses, and the state in their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distlm.checkpoint.manifest import KINDS
from distlm.checkpoint.reader import CheckpointReader
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.errors import CheckpointError
from distlm.metrics_file import read_lines
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.verify_resume.compare import Piece, StateDifference
from distlm.verify_resume.samples import KILLED, read_samples

if TYPE_CHECKING:
    import numpy as np

_CHUNK_ELEMENTS = 2**22
"""Of a tensor, read at once: 16 MiB of each of two checkpoints."""


def was_killed(attempt: AttemptFolder) -> bool:
    """Whether a worker was killed as asked, and the attempt did not fail by something else."""
    return any(attempt.samples.glob(f"*.{KILLED}"))


def read_piece(attempt: AttemptFolder, workers: int, planned_first_step: int, last_step: int) -> Piece:
    """The evidence of an attempt that trained up to `last_step` and was killed in the next one or reached the end."""
    messages = [message for _, message in read_lines(attempt.metrics_jsonl)]
    restored = [message["step"] for message in messages if message["kind"] == "restore"]
    losses = {
        message["step"]: message["values"]["train/loss"]
        for message in messages
        if message["kind"] == "metrics" and "train/loss" in message["values"]
    }
    return Piece(
        workers=workers,
        planned_first_step=planned_first_step,
        first_step=restored[-1] + 1,
        last_step=last_step,
        killed_in_step=last_step + 1 if was_killed(attempt) else None,
        micro_batches=list(read_samples(attempt.samples)),
        losses=losses,
    )


def read_device(attempt: AttemptFolder) -> str:
    """cpu or cuda: what the workers computed on."""
    tags: dict[str, Any] = {}
    for _, message in read_lines(attempt.metrics_jsonl):
        tags |= message["tags"] if message["kind"] == "tags" else {}
    return str(tags["distlm.device"])


def compare_states(straight: RunFolder, in_pieces: RunFolder) -> list[StateDifference]:
    """Every checkpoint of the run in pieces beside the straight run's of the same step, oldest first.

    Raises:
        CheckpointError: one is missing or damaged, or the two are of different models.
    """
    expected = {checkpoint.step: _State(straight, checkpoint) for checkpoint in _checkpoints(straight)}
    found = {checkpoint.step: _State(in_pieces, checkpoint) for checkpoint in _checkpoints(in_pieces)}
    if expected.keys() != found.keys():
        steps = sorted(expected.keys() ^ found.keys())
        raise CheckpointError(f"only one of {straight.path} and {in_pieces.path} has checkpoints of the steps {steps}")
    first, last = expected[min(expected)], expected[max(expected)]
    distance_trained = math.sqrt(sum(_square(a - b) for _, a, b in first.beside(last, KINDS[:1])))
    return [_compare(step, expected[step], found[step], distance_trained) for step in sorted(expected)]


def _checkpoints(run: RunFolder) -> list[Checkpoint]:
    return CheckpointStore(run.checkpoints).checkpoints()


class _State:
    """A checkpoint, open for reading."""

    def __init__(self, run: RunFolder, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.manifest = CheckpointStore(run.checkpoints).verify(checkpoint)
        self._reader = CheckpointReader(checkpoint, self.manifest)

    def beside(
        self, other: _State, kinds: tuple[str, ...]
    ) -> Iterator[tuple[str, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """(kind, elements here, the same elements there) of both states, in pieces of bounded size."""
        import numpy as np

        if self.manifest.shapes != other.manifest.shapes:
            raise CheckpointError(f"{self.path} and {other.path} are of different models")
        for parameter in self.manifest.parameters:
            for kind in kinds:
                for start in range(0, parameter.numel, _CHUNK_ELEMENTS):
                    both = np.empty((2, min(_CHUNK_ELEMENTS, parameter.numel - start)), np.float32)
                    for state, row in zip((self, other), both, strict=True):
                        state._reader.read_into(row.data, parameter.name, kind, start)
                    yield kind, both[0], both[1]


def _compare(step: int, expected: _State, found: _State, distance_trained: float) -> StateDifference:
    identical = expected.manifest.optimizer.adam_step == found.manifest.optimizer.adam_step
    largest = distance = size = 0.0
    for kind, a, b in expected.beside(found, KINDS):
        identical &= a.tobytes() == b.tobytes()
        if kind == KINDS[0]:
            difference = b - a
            largest = max(largest, float(abs(difference).max()))
            distance += _square(difference)
            size += _square(a)
    return StateDifference(step, identical, largest, math.sqrt(distance), distance_trained, math.sqrt(size))


def _square(values: np.ndarray[Any, Any]) -> float:
    """Sum of the squares, in double precision."""
    wide = values.astype("float64")
    return float(wide @ wide)
