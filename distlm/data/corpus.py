"""All sources of a split or of a run as one stream of documents, read again and again, and cut into chunks.

What is counted here is what only the reader of the files knows: documents, those that are very long, and those with
bytes that are not in their file's encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from distlm.data.encode import slices
from distlm.data.lines import status
from distlm.data.order import uniform
from distlm.data.parallel import Chunk, Entry
from distlm.data.readers import MAX_PIECE_CHARACTERS, Piece
from distlm.data.sources import (
    LocalSource,
    LocalTable,
    Source,
    SourceReader,
    UndecodableCount,
    files_of,
    source_name,
)
from distlm.errors import InputError
from distlm.redact import drop_queries

CHUNK_CHARACTERS = 2 * 2**20
"""A chunk is full when it has that many: some seconds of work."""
_CHARACTERS_PER_DOCUMENT = 64  # very short documents cost memory too
_VALIDATION_STREAM = 1_000_001  # of order.uniform: which documents are held out
_DOCUMENTS_BETWEEN_CHECKS = 1000

VALIDATION = "validation"
"""Name of the blocks of held-out text."""


@dataclass
class SourceCounts:
    """What reading a source from its first to its last document has found."""

    num_documents: int = 0
    """All of them, empty ones included."""
    num_huge_documents: int = 0
    """Longer than `MAX_PIECE_CHARACTERS`: cut into slices, none of which is left out."""
    num_undecodable_documents: int = 0
    """With bytes that are not in the encoding of the file, each of which became U+FFFD."""
    first_undecodable: str = ""
    """FILE:LINE of the first such bytes."""


class ReadSource:
    """One source of the config, ready to be read: a `datasets` source has been copied to files by then."""

    def __init__(
        self,
        key: str,
        source: Source,
        local: LocalTable,
        settings: dict[str, Any],
        identity: list[Any] | None,
        rows: bool = False,
    ) -> None:
        """`identity` tells the content from other content; None: files with sizes and times of change do, and
        `settings`, which decide what is read of them. `rows`: the files are read as rows, not as documents."""
        self.key = key
        self.name = source_name(source)
        self.settings = settings
        self._local = local
        self._is_of_rows = rows
        self._files = files_of(local, rows)
        self.size = {
            "num_files": len(self._files),
            "num_file_bytes": sum(status(file).st_size for file in self._files),
        }
        self._is_fixed = identity is not None
        self.identity = identity or [self.settings, _states(self._files)]

    def check_unchanged(self) -> None:
        """Raises InputError if a file changed since this object was made: its text would go under a wrong name."""
        if not self._is_fixed and self.identity[1] != _states(files_of(self._local, self._is_of_rows)):
            raise InputError("a file of the data changed while it was read; try again when nothing writes to it")

    def _refuse(self, undecodable: UndecodableCount) -> None:
        if self._local.source != "python-docs" and (problems := undecodable.problems(self._local.encoding)):
            raise InputError(*(replace(problem, key=f"{self.key}.encoding") for problem in problems))


class CorpusSource(ReadSource):
    """The documents of a source."""

    _local: LocalSource

    def __init__(
        self, key: str, source: Source, local: LocalSource, identity: list[Any] | None = None, **facts: Any
    ) -> None:
        """`identity`: see `ReadSource`. `facts` are told beside the settings."""
        super().__init__(key, source, local, what_is_read(source) | facts, identity)
        self._docstrings: list[Piece] | None = None
        self.rewind()

    def rewind(self) -> None:
        """Nothing of it counts as read."""
        self.counts = SourceCounts()
        self._reader = SourceReader(self._local, self._files)

    def pieces(self) -> Iterable[Piece]:
        """All documents. Docstrings are parsed once and kept, since that takes far longer than reading them, and what
        is installed fits into memory."""
        if self._docstrings is not None:
            return self._docstrings
        self.rewind()
        if self._local.source == "files":
            return self._reader
        self._docstrings = list(self._reader)
        return self._docstrings

    def bytes_read(self) -> tuple[int, int]:
        """How far the last reading has come on the disk, and how far it will come."""
        return self._reader.bytes_read, self._reader.expected_bytes(self.counts.num_documents)

    def counted_pieces(self) -> Iterator[tuple[Piece, bool]]:
        """(piece, whether it starts its document), none longer than a slice; `counts` grows on the way.

        Raises InputError where too many documents are not in the encoding of the files.
        """
        undecodable = UndecodableCount()
        starts = True
        is_huge = False
        for piece in self.pieces():
            undecodable.add(piece)
            for text, is_last in slices(piece.text, MAX_PIECE_CHARACTERS):
                ends = is_last and piece.ends_document
                yield Piece(text, ends), starts
                is_huge |= not ends
                starts = ends
            if piece.ends_document:
                self.counts.num_documents += 1
                self.counts.num_huge_documents += is_huge
                is_huge = False
                self.counts.num_undecodable_documents = undecodable.num_undecodable
                self.counts.first_undecodable = undecodable.first
                is_clear = 2 * undecodable.num_undecodable > undecodable.num_documents
                if is_clear and undecodable.num_documents % _DOCUMENTS_BETWEEN_CHECKS == 0:  # not only after hours
                    self._refuse(undecodable)
        self._refuse(undecodable)


def _states(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change of each."""
    return [[str(file.absolute()), (found := status(file)).st_size, found.st_mtime_ns] for file in files]


def what_is_read(source: Source) -> dict[str, Any]:
    """What decides which text the source gives: all but its weight. Of URLs without what may be secret."""
    names: dict[str, Sequence[str]] = {
        "files": ("paths", "text_column", "encoding", "encoding_errors"),
        "parallel": ("columns", "text_column", "encoding", "encoding_errors"),
        "datasets": ("path", "name", "split", "revision", "data_files", "text_column", "max_gib"),
        "python-docs": ("packages",),
    }
    chosen = ("source", *names[source.source], "max_documents")
    told = {name: _told(getattr(source, name)) for name in chosen}
    # Only where they are given, so that the others keep their names in the cache.
    given = {name: value for name in _TABLE_SETTINGS if (value := getattr(source, name, None)) is not None}
    return told | given


_TABLE_SETTINGS = ("format", "column_names", "delimiter")


def _told(value: Any) -> Any:
    if isinstance(value, list):
        return [_told(item) for item in value]
    return drop_queries(value) if isinstance(value, str) and "://" in value else value


class Corpus:
    """The training and the validation sources of a run."""

    def __init__(self, train: list[CorpusSource], validation: list[CorpusSource], validation_fraction: float) -> None:
        self.train, self.validation = train, validation
        self._fraction = 0.0 if validation else validation_fraction

    @property
    def sources(self) -> list[CorpusSource]:
        return [*self.train, *self.validation]

    @property
    def targets(self) -> list[str]:
        """Names of the blocks: one for each training source, and one for all that is held out, if anything is."""
        names = [train_target(number) for number in range(len(self.train))]
        return [*names, VALIDATION] if self.validation or self._fraction else names

    @property
    def identity(self) -> list[Any]:
        return [
            [source.identity for source in self.train],
            [source.identity for source in self.validation],
            self._fraction,
        ]

    def texts(self) -> Iterator[str]:
        """Training texts, one of each source in turn for as long as it has any."""
        streams = [iter(source.pieces()) for source in self.train]
        while streams:
            for stream in list(streams):
                piece = next(stream, None)
                if piece is None:
                    streams.remove(stream)
                else:
                    yield piece.text

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """(number of the source, chunk): every document of every source once, in order. A chunk is of one source."""
        for source in self.sources:
            source.rewind()
        held_out = are_held_out(self._fraction)
        numbers = count()
        for number, source in enumerate(self.sources):
            own_target = train_target(number) if number < len(self.train) else VALIDATION
            target = own_target
            entries: list[Entry] = []
            size = 0
            for piece, starts in source.counted_pieces():
                if starts and number < len(self.train):
                    target = VALIDATION if next(held_out) else own_target
                entries.append(Entry(target, piece.text, starts, piece.ends_document))
                size += len(piece.text) + _CHARACTERS_PER_DOCUMENT
                if size >= CHUNK_CHARACTERS:
                    yield number, Chunk(next(numbers), entries, is_full=True)
                    entries, size = [], 0
            if entries:
                yield number, Chunk(next(numbers), entries, is_full=False)

    def bytes_read(self) -> tuple[int, int]:
        """How far reading has come on the disk, and how far it will come."""
        pairs = [source.bytes_read() for source in self.sources]
        return sum(done for done, _ in pairs), sum(total for _, total in pairs)


def train_target(source_number: int) -> str:
    return f"train-{source_number:05d}"


def are_held_out(fraction: float) -> Iterator[bool]:
    """For document 0, 1, 2, ... whether it is held out for validation."""
    step = 4096
    for start in count(0, step):
        numbers = np.arange(start, start + step)
        yield from (uniform(0, 0, numbers, 0, stream=_VALIDATION_STREAM) < fraction).tolist()
