"""The rows of a source of the config, wherever it lies, for tasks with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlm.data.corpus import ReadSource, what_is_read
from distlm.data.hub import copy_dataset
from distlm.data.notes import Report
from distlm.data.readers import Piece
from distlm.data.rows import Row, read_rows
from distlm.data.sources import LocalTable, Source, UndecodableCount
from distlm.errors import InputError


class LabelledSource(ReadSource):
    """The rows of a source, with the columns that were asked for."""

    def __init__(
        self,
        key: str,
        source: Source,
        columns: Sequence[str],
        local: LocalTable,
        identity: list[Any] | None = None,
        **facts: Any,
    ) -> None:
        """`identity`: see `ReadSource`. `facts` are told beside the settings."""
        columns = list(columns)
        super().__init__(key, source, local, what_is_read(source) | {"read": columns} | facts, identity, rows=True)
        self._columns = columns
        self._is_copy = source.source == "datasets"
        self._docstrings: list[Row] | None = None
        self.num_rows = 0
        """That the last reading gave."""
        self.num_undecodable_rows = 0
        """Of those, with bytes that are not in the encoding of the file, each of which became U+FFFD."""
        self.first_undecodable = ""
        """FILE:LINE of the first such bytes."""

    def rows(self) -> Iterator[Row]:
        """All rows, in their order. The place of a row of a data set is NAME:ROW, from 1.

        Raises InputError, with the key of the config, where files cannot be read as asked, and at the end where too
        many rows are not in the encoding of the files.
        """
        undecodable = UndecodableCount()
        try:
            for number, row in enumerate(self._read(), start=1):
                undecodable.add(Piece("", True, row.undecodable_at))
                yield row._replace(place=f"{self.name}:{number}") if self._is_copy else row
        except InputError as error:
            problems = (replace(one, key=f"{self.key}.{one.key}" if one.key else self.key) for one in error.problems)
            raise InputError(*problems) from error
        self.num_rows = undecodable.num_documents
        self.num_undecodable_rows = undecodable.num_undecodable
        self.first_undecodable = undecodable.first
        self._refuse(undecodable)

    def _read(self) -> Iterable[Row]:
        """Docstrings are parsed once and kept, since that takes far longer than reading them."""
        if self._local.source != "python-docs":
            return read_rows(self._local, self._columns, self._files)
        if self._docstrings is None:
            self._docstrings = list(read_rows(self._local, self._columns, self._files))
        return self._docstrings


def open_labelled(
    key: str, source: Source, columns: Sequence[str], cache: Path, report: Report, commit: str | None = None
) -> LabelledSource:
    """The source, which stands at `key` in the config, such as data.train.0; one of the library `datasets` is copied
    into the cache first. `commit`: see `copy_dataset`."""
    if source.source != "datasets":
        return LabelledSource(key, source, columns, source)
    copy = copy_dataset(key, source, cache, report, commit, columns)
    facts = {"commit": copy.commit, "reached_limit": copy.reached_limit}
    return LabelledSource(key, source, columns, copy.files, copy.identity, **facts)
