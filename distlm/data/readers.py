"""Documents out of one file: its text, as paragraphs of plain text or as a column of a table; standard library only at
import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distlm.data.lines import Lines, TextFile, bad_file, place
from distlm.data.tables import (
    FormatName,
    TableSettings,
    describe_unsupported,
    format_of,
    is_table,
    read_table,
)

MAX_PIECE_CHARACTERS = 8 * 2**20
"""A document that is longer comes in more than one piece, so that memory stays bounded."""


class Piece(NamedTuple):
    """A document, or a part of one that is very long."""

    text: str
    ends_document: bool = True
    undecodable_at: str = ""
    """FILE:LINE of the first bytes in it that are not in the file's encoding; empty: there are none."""


class FileReader:
    """The documents of one file, at least one; to be iterated over once.

    `form` is the file's format; None: what its suffix tells. Of a table the documents are the values of the column of
    text, of plain text the paragraphs. Iterating raises InputError where the file is not what its format and the
    settings say, and InfrastructureError where the storage does not give it.
    """

    def __init__(
        self,
        path: Path,
        table: TableSettings | None = None,
        encoding: str = "utf-8",
        encoding_errors: str = "replace",
        form: FormatName | None = None,
    ) -> None:
        self._file = TextFile(path, encoding, encoding_errors)
        self._table = table or TableSettings(only_text=True)
        self._form = form or format_of(path)

    @property
    def bytes_read(self) -> int:
        """How far reading has come in the file as it lies on the disk."""
        return self._file.bytes_read

    def __iter__(self) -> Iterator[Piece]:
        if self._form is None:
            raise bad_file(describe_unsupported(self._file.path), self._file.path)
        if is_table(self._form, self._table):
            return self._file.explained(_read_table(self._file, self._form, self._table))
        return self._file.explained(_read_paragraphs(self._file))


def _read_table(file: TextFile, form: FormatName, table: TableSettings) -> Iterator[Piece]:
    path = file.path
    for (text,), _, bad_line in read_table(file, form, [table.text_column], table):
        yield Piece(text or "", True, place(path, bad_line)) if bad_line else Piece(text or "")


def _read_paragraphs(file: TextFile) -> Iterator[Piece]:
    with Lines(file, limit=MAX_PIECE_CHARACTERS) as lines:
        parts: list[str] = []
        num_characters = 0
        has_begun = False  # the paragraph, with a piece of its own
        for line in lines:
            is_blank = not line.strip()
            if not is_blank:
                parts.append(line)
                num_characters += len(line)
            if is_blank and (parts or has_begun):
                yield _end_of_paragraph(parts, has_begun, file, lines)
                parts, num_characters, has_begun = [], 0, False
            elif num_characters >= MAX_PIECE_CHARACTERS:
                text = "".join(parts)
                yield Piece(text if has_begun else text.lstrip(), False, _take_place(file, lines))
                parts, num_characters, has_begun = [], 0, True
        if parts or has_begun:
            yield _end_of_paragraph(parts, has_begun, file, lines)


def _end_of_paragraph(parts: list[str], has_begun: bool, file: TextFile, lines: Lines) -> Piece:
    text = "".join(parts).rstrip()
    return Piece(text if has_begun else text.lstrip(), True, _take_place(file, lines))


def _take_place(file: TextFile, lines: Lines) -> str:
    """FILE:LINE of the first undecodable bytes since the last call; empty: there were none."""
    line = lines.take_undecodable()
    return place(file.path, line) if line else ""
