"""Rows of named columns out of a source on this machine, for tasks with labels; standard library only at import.

Values come as the source holds them (see `distlm.data.tables`). Whether a value is a good label, the reader does not
judge: whoever refuses one names `Row.place`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from distlm.data.lines import Lines, TextFile, bad_file, place
from distlm.data.python_docs import module_docs, package_of
from distlm.data.readers import Piece
from distlm.data.sources import (
    FilesSource,
    LocalTable,
    ParallelSource,
    PythonDocsSource,
    Source,
    check_dataset,
    check_files,
    files_of,
)
from distlm.data.tables import (
    DOCSTART,
    TableSettings,
    describe_missing_column,
    describe_unsupported,
    format_of,
    read_table,
)
from distlm.errors import InputError, Problem

DEFAULT_LABEL_COLUMN = "label"
PYTHON_DOCS_COLUMNS = ["text", "package"]


class Row(NamedTuple):
    """An example of a task with labels."""

    values: dict[str, Any]
    """The columns that were asked for. Null is None."""
    place: str
    """FILE:LINE of its beginning (of Parquet: FILE:ROW; of a Python module: FILE)."""
    undecodable_at: str = ""
    """FILE:LINE of the first bytes in it that are not in the file's encoding; empty: there are none."""


def text_columns(source: Source) -> list[str]:
    """The column of text, and that of the second text where the source has one."""
    text = "text" if source.source == "python-docs" else source.text_column
    return [text] if source.text_pair_column is None else [text, source.text_pair_column]


def label_column(source: Source) -> str:
    return source.label_column or DEFAULT_LABEL_COLUMN


def document_column(source: Source) -> str | None:
    """The column that tells the documents of a source apart; None: all rows are one document."""
    return source.document_column or (DOCSTART if source.source == "files" else None)


def labelled_columns(source: Source, has_documents: bool = False) -> list[str]:
    """What a task with one label for each row (or for each word) reads; with `has_documents` also what tells documents
    apart."""
    document = document_column(source) if has_documents else None
    columns = [*text_columns(source), label_column(source), *([document] if document is not None else [])]
    return list(dict.fromkeys(columns))


def column_keys(source: Source) -> dict[str, str]:
    """From the name of a column to the key of the source that names it."""
    names = {label_column(source): "label_column"}
    if source.document_column is not None:
        names[source.document_column] = "document_column"
    if source.text_pair_column is not None:
        names[source.text_pair_column] = "text_pair_column"
    return names if source.source == "python-docs" else names | {source.text_column: "text_column"}


def read_rows(source: LocalTable, columns: Sequence[str], files: Sequence[Path] | None = None) -> Iterator[Row]:
    """The first `max_documents` rows of a source, with those columns.

    `files` are what `files_of(source, rows=True)` has found; None: they are looked up. Raises InputError where a file
    is missing, unreadable, empty, lacks a column or is not what its format says, with the key of the source in question
    (such as `label_column`) as the key of the problem, and InfrastructureError where the storage fails.
    """
    files = files_of(source, rows=True) if files is None else files
    rows: Iterator[Row]
    if source.source == "files":
        rows = chain.from_iterable(_read_file(source, columns, file) for file in files)
    elif source.source == "parallel":
        rows = _read_parallel(source, columns, dict(zip(source.columns, files, strict=True)))
    else:
        rows = _read_docs(source, columns, files)
    return islice(rows, source.max_documents)


def check_rows(source: Source, columns: Sequence[str]) -> list[Problem]:
    """As `sources.check_source`, of a source that is read as rows with those columns."""
    if source.source == "datasets":
        return check_dataset(source)
    if source.source == "files":
        return check_files(source, lambda file: map(_as_piece, _read_file(source, columns, file)), rows=True)
    try:
        for _ in read_rows(source, columns):
            break
    except InputError as error:
        return list(error.problems)
    return []


def _as_piece(row: Row) -> Piece:
    return Piece("", True, row.undecodable_at)


def _read_file(source: FilesSource, columns: Sequence[str], path: Path) -> Iterator[Row]:
    table = TableSettings(
        text_column=source.text_column,
        label_column=label_column(source),
        column_names=source.column_names,
        delimiter=source.delimiter,
        keys=column_keys(source),
    )
    form = source.format or format_of(path, rows=True)
    if form is None:
        raise bad_file(describe_unsupported(path, rows=True), path)
    file = TextFile(path, source.encoding, source.encoding_errors)
    name = place(path)
    has_documents = DOCSTART in columns
    columns = [column for column in columns if column != DOCSTART or form == "conll"]
    for values, line, bad_line in file.explained(read_table(file, form, columns, table)):
        row = dict(zip(columns, values, strict=True))
        if has_documents:  # a file ends a document
            row[DOCSTART] = (name, row.get(DOCSTART))
        yield Row(row, f"{name}:{line}", f"{name}:{bad_line}" if bad_line else "")


# ------------------------------------------------------------------------------------------------------- parallel files


def _read_parallel(source: ParallelSource, columns: Sequence[str], files: Mapping[str, Path]) -> Iterator[Row]:
    for column in columns:
        if column not in files:
            key = column_keys(source).get(column, "")
            raise InputError(Problem(describe_missing_column(column, files, key or "text_column"), key))
    names = {column: place(path) for column, path in files.items()}
    readers = {column: _ParallelFile(source, path) for column, path in files.items()}
    streams = [iter(reader) for reader in readers.values()]
    for number, lines in enumerate(zip_longest(*streams), start=1):
        if None in lines:
            for stream in streams:
                deque(stream, maxlen=0)  # so that each file is counted to its end
            counts = ", ".join(f"{names[column]} has {reader.num_lines:,}" for column, reader in readers.items())
            message = f"line i of each file is row i, so the files need equally many lines; {counts}"
            raise InputError(Problem(message, "columns"))
        values = dict(zip(readers, lines, strict=True))
        bad = [names[column] for column, reader in readers.items() if reader.take_undecodable()]
        yield Row(
            {column: values[column] for column in columns},
            f"{names[columns[0]]}:{number}",
            f"{bad[0]}:{number}" if bad else "",
        )


class _ParallelFile:
    """The lines of a file without their ends, blank ones included."""

    def __init__(self, source: ParallelSource, path: Path) -> None:
        self._file = TextFile(path, source.encoding, source.encoding_errors)
        self.num_lines = 0
        """So far."""

    def __iter__(self) -> Iterator[str]:
        return self._file.explained(self._read())

    def _read(self) -> Iterator[str]:
        with Lines(self._file) as lines:
            for line in lines:
                self.num_lines = lines.number
                yield line.rstrip("\r\n")

    def take_undecodable(self) -> int:
        """The line of the first undecodable bytes since the last call; 0: there were none."""
        return self._file.lines.take_undecodable() if self._file.lines is not None else 0


# --------------------------------------------------------------------------------------------------------- python-docs


def _read_docs(source: PythonDocsSource, columns: Sequence[str], files: Sequence[Path]) -> Iterator[Row]:
    for column in columns:
        if column not in PYTHON_DOCS_COLUMNS:
            key = column_keys(source).get(column, "")
            raise InputError(Problem(describe_missing_column(column, PYTHON_DOCS_COLUMNS, key or "text_column"), key))
    for path, text in module_docs(files):
        values = {"text": text, "package": package_of(path)}
        yield Row({column: values[column] for column in columns}, place(path))
