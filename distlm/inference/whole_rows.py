"""Rows of a file with all their columns, so that predictions can stand beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distlm.config.schema import FilesSource
from distlm.data.lines import Lines, TextFile
from distlm.data.rows import Row, column_keys, label_column, read_rows
from distlm.data.tables import FormatName, TableSettings, column_names, format_of


class WholeRows:
    """The rows of one file; every iteration begins anew."""

    def __init__(self, source: FilesSource, required: Sequence[str]) -> None:
        """`source` has one path; `required` are the columns that each row must have, `DOCSTART` perhaps among them. Raises InputError if the first row
        cannot be read."""
        self.source, self._required = source, list(required)
        (path,) = source.paths
        self.path = Path(path)
        form = source.format or format_of(self.path, rows=True)
        assert form is not None, "files_source has found out"
        self.format: FormatName = form
        for _ in read_rows(source, self._required):
            break
        table = TableSettings(
            text_column=source.text_column,
            label_column=label_column(source),
            column_names=source.column_names,
            delimiter=source.delimiter,
            keys=column_keys(source),
        )
        self.columns = column_names(self._file(), self.format, table)
        """Names of all columns; None: each row has its own."""

    def _file(self) -> TextFile:
        return TextFile(self.path, self.source.encoding, self.source.encoding_errors)

    def __iter__(self) -> Iterator[Row]:
        """Raises InputError, with file and line, for what is not as it should be."""
        if self.columns is not None:
            return read_rows(self.source, list(dict.fromkeys([*self.columns, *self._required])))
        return self._json_rows()

    def _json_rows(self) -> Iterator[Row]:
        """What is wrong with a line is said by the reader of the required columns, which comes first."""
        with Lines(self._file()) as lines:
            records: Iterator[dict[str, Any]] = (json.loads(line) for line in lines if line.strip())
            for row, record in zip(read_rows(self.source, self._required), records, strict=True):
                yield row._replace(values=row.values | record)
