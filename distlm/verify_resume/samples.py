"""attempts/NNN/samples/rank-RRRRR.jsonl: what a worker trained on, one line for each of its micro batches.

A line is written before the micro batch is trained, so that a worker that is killed has told what it was at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

KILLED = "killed"
"""Suffix of the empty file beside the lines of a worker that was killed as asked."""


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass. Lists have one entry for each sample."""

    step: int
    number: int
    """Of the micro batch in its step, from 0."""
    positions: list[int]
    """Place of each sample in the whole training, over all workers, from 0."""
    epochs: list[int]
    """How often the sample's source was gone through before; without weights of the sources that is the epoch."""
    indices: list[int]
    """Number of each sample in the prepared data."""
    sha256: str
    """Hash of what the model saw: token ids, masks and targets."""


def samples_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.jsonl"


def write_samples(path: Path, micro_batches: Iterable[MicroBatch]) -> None:
    """Append lines, in one go that a kill of this process afterwards does not undo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(item), separators=(",", ":")) + "\n" for item in micro_batches))


def read_samples(folder: Path) -> Iterator[MicroBatch]:
    """The micro batches of all workers of an attempt. A last line that is torn is left out."""
    for path in sorted(folder.glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield MicroBatch(**json.loads(line))
