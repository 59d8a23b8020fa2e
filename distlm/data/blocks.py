"""The files of blocks of a run in the making: parts are appended in order, and a journal tells how far they are.

Every few seconds the data is brought to the disk first and the journal second, so that a process that is killed at any
moment leaves a journal that is true: what the files hold beyond it is cut off, and work goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from distlm.data.pack import END_OF_STREAM, BlockLayout
from distlm.data.parallel import Part, Totals
from distlm.run_folder import read_json, write_json

_JOURNAL = "journal.json"
_PARTS = "parts-"
_COMMIT_INTERVAL_S = 5.0
_NOTHING = hashlib.sha256().hexdigest()


def blocks_path(folder: Path, target: str) -> Path:
    return folder / f"{target}.arrow"


def remove_journal(folder: Path) -> None:
    """When the folder is whole."""
    (folder / _JOURNAL).unlink(missing_ok=True)


class BlockFiles:
    """One file of blocks for each target. Use as a context manager; `finish` completes the files."""

    def __init__(self, folder: Path, layout: BlockLayout, targets: list[str]) -> None:
        # A name of its own, since a process of one that was killed may still be about to write its part.
        self.parts_folder = folder / f"{_PARTS}{secrets.token_hex(4)}"
        """For the parts that are still to be appended."""
        self.num_chunks = 0
        """Chunks that are in the files."""
        self.seconds = 0.0
        """That work on them took, in all processes that did any."""
        self.digests = dict.fromkeys(targets, _NOTHING)
        """SHA-256 over the text of each target: over the digests of its parts, one after the other."""
        self._totals: dict[tuple[int, str], Totals] = {}
        self._journal = folder / _JOURNAL
        self._committed_at_s = time.monotonic()
        schema = layout.schema.serialize().to_pybytes()
        self._sizes = dict.fromkeys(targets, len(schema))
        if (journal := read_json(self._journal)) is not None:
            self._restore(journal)
        for left_over in folder.glob(f"{_PARTS}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        self.parts_folder.mkdir()
        self._open = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for target, size in self._sizes.items():
            file = self._files[target] = self._open.enter_context(open(blocks_path(folder, target), "ab"))  # noqa: SIM115
            if journal is None:
                file.truncate(0)
                file.write(schema)
            file.flush()
            file.truncate(size)

    def __enter__(self) -> BlockFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def append(self, source_number: int, parts: dict[str, Part]) -> None:
        """The parts of the next chunk, which is of that source."""
        for target, part in parts.items():
            file = self._files[target]
            with open(part.path, "rb") as content:
                shutil.copyfileobj(content, file, 2**20)
            part.path.unlink()
            self.digests[target] = hashlib.sha256((self.digests[target] + part.sha256).encode()).hexdigest()
            key = (source_number, target)
            self._totals[key] = self._totals.get(key, Totals()) + part.totals
        self.num_chunks += 1
        if time.monotonic() - self._committed_at_s >= _COMMIT_INTERVAL_S:
            self._commit()

    def _commit(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._committed_at_s
        self._committed_at_s = now
        for target, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self._sizes[target] = os.fstat(file.fileno()).st_size
        write_json(
            self._journal,
            {
                "num_chunks": self.num_chunks,
                "seconds": self.seconds,
                "sizes_bytes": self._sizes,
                "digests": self.digests,
                "totals": [[*key, asdict(totals)] for key, totals in self._totals.items()],
            },
        )

    def _restore(self, journal: dict[str, Any]) -> None:
        self.num_chunks, self.seconds = journal["num_chunks"], journal["seconds"]
        self._sizes, self.digests = journal["sizes_bytes"], journal["digests"]
        self._totals = {(number, target): Totals(**totals) for number, target, totals in journal["totals"]}

    def totals(self, *, source_number: int | None = None, target: str | None = None) -> Totals:
        """What became of a source, or is in a target, or both; None: any."""
        return sum(
            (
                totals
                for (number, name), totals in self._totals.items()
                if source_number in (None, number) and target in (None, name)
            ),
            Totals(),
        )

    def finish(self) -> None:
        """End the streams. The journal stays true until it is removed with `remove_journal`."""
        self._commit()
        for file in self._files.values():
            file.write(END_OF_STREAM)
            file.flush()
            os.fsync(file.fileno())
        self._open.close()
        self.parts_folder.rmdir()
