"""Documents out of one file: its format, its compression and its encoding; standard library only at import.

A file is read in bounded memory, one record at a time. What cannot be read as asked is an InputError with file and
line: nothing is skipped or repaired in silence. Bytes that the encoding does not know are replaced and reported with
their document, or refused, as asked.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import errno
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from distlm.errors import InfrastructureError, InputError, Problem

MAX_PIECE_CHARACTERS = 8 * 2**20
"""A document that is longer comes in more than one piece, so that memory stays bounded."""

REPLACEMENT_CHARACTER = "\ufffd"


class Piece(NamedTuple):
    """A document, or a part of one that is very long."""

    text: str
    ends_document: bool = True
    undecodable_at: str = ""
    """FILE:LINE of the first bytes in it that are not in the file's encoding; empty: there are none."""


class FileReader:
    """The documents of one file, at least one; to be iterated over once.

    `text_column` is the key or column that holds the text, `encoding` the name of a codec of Python's, and
    `encoding_errors` what to do about bytes that it does not know: `replace` them by U+FFFD, or `strict`: raise.
    Iterating raises InputError where the file is not what its suffix, `text_column` and `encoding` say, and
    InfrastructureError where the storage does not give it.
    """

    def __init__(
        self, path: Path, text_column: str = "text", encoding: str = "utf-8", encoding_errors: str = "replace"
    ) -> None:
        self.path = path
        self.text_column = text_column
        self.encoding = codecs.lookup(encoding).name
        self.is_strict = encoding_errors == "strict"
        self.lines: _Lines | None = None
        self.share_read = 0.0
        self.raw: IO[bytes] | None = None
        """The file as it lies on the disk, while text is read from it."""

    @property
    def bytes_read(self) -> int:
        """How far reading has come in the file as it lies on the disk."""
        if self.raw is not None and not self.raw.closed:
            return self.raw.tell()
        return int(self.share_read * status(self.path).st_size)

    def __iter__(self) -> Iterator[Piece]:
        form, compression = suffixes(self.path)
        is_empty = True
        try:
            for piece in _FORMATS[form](self):
                is_empty = False
                yield piece
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if compression and getattr(error, "errno", None) is None:  # it is not the system that complains
                reason = " ".join(str(error).split())
                message = f"the compressed file is damaged or cut short ({reason}); copy or make it again"
                raise bad_file(message, self.path) from error
            raise unreadable(self.path, error) from error
        except InputError as error:
            # What follows from a wrong encoding is not what has to be mended.
            if self.lines is not None and self.lines.undecodable_line:
                raise self.not_in_encoding(self.lines.undecodable_line) from error
            raise
        except UnicodeError as error:  # the codec wants nothing of the file
            message = f"is not {self.encoding.upper()} ({error}); set encoding to what it is written in"
            raise bad_file(message, self.path) from error
        self.share_read = 1.0
        if is_empty:
            message = "the file is empty" if status(self.path).st_size == 0 else "the file holds no records"
            raise bad_file(f"{message}; remove it from the sources or mend it", self.path)

    def not_in_encoding(self, line: int, what: str = "holds bytes that are") -> InputError:
        message = (
            f"{what} not {self.encoding.upper()}; set encoding to what the file is written in, such as gb18030, "
            "latin-1 or utf-16"
        )
        return bad_file(message, self.path, line)


# ------------------------------------------------------------------------------------------------------------- problems


def bad_file(message: str, path: Path, line: int | None = None) -> InputError:
    return InputError(Problem(message, location=place(path, line)))


def place(path: Path, line: int | None = None) -> str:
    """FILE or FILE:LINE in valid Unicode, which a file's name need not be."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return name if line is None else f"{name}:{line}"


def unreadable(path: Path, error: Exception) -> InputError | InfrastructureError:
    message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return InfrastructureError(f"{place(path)}: {message}") if is_storage_failure(error) else bad_file(message, path)


def is_storage_failure(error: Exception) -> bool:
    """Whether the system complains of something else than the file's name, its kind or the permissions."""
    return isinstance(error, OSError) and error.errno not in _USERS_ERRORS


# Without a number it is a library that complains, of the content.
_USERS_ERRORS = {
    None,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}


def status(path: Path) -> os.stat_result:
    """Size and times of a file. Raises InputError where it has gone or cannot be looked at, InfrastructureError where
    the storage fails."""
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def nearest(name: str, names: Iterable[str]) -> str:
    """Advice on a name that is not one of `names`; empty where none is near."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def describe_missing_column(text_column: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    hint = nearest(text_column, columns) or "; name the column of text in text_column"
    return f"no column {text_column!r}; the columns are {', '.join(map(repr, columns)) or 'none'}{hint}"


def describe_no_text(text_column: str, kind: str) -> str:
    return f"column {text_column!r} holds {kind}, not text; name a column of text in text_column"


# ------------------------------------------------------------------------------------------------ bytes and characters


def _open_zstd(raw: IO[bytes]) -> Any:
    import pyarrow as pa  # the standard library has zstd from Python 3.14 on

    return pa.CompressedInputStream(raw, "zstd")


_COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}

# How files begin that are compressed though their names do not say so, as `_mark_undecodable` leaves it in UTF-8.
_COMPRESSED_BEGINNINGS = {"\x1f\udc8b": ".gz", "(\udcb5/\udcfd": ".zst", "\udcfd7zXZ": ".xz"}
_UTF_16_BEGINNINGS = ("\udcff\udcfe", "\udcfe\udcff")


def _mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    """A handler for decoding errors: one lone surrogate for the bytes, which no valid text holds, tells the first."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(0xDC00 + error.object[error.start]), error.end


_MARK = re.compile("[\udc00-\udcff]")
codecs.register_error("distlm.mark", _mark_undecodable)


class _Lines:
    """The lines of a file with their ends; a byte order mark is dropped. A line is cut after `limit` characters."""

    def __init__(self, reader: FileReader, limit: int = -1) -> None:
        reader.lines = self
        self.number = 0
        """Of the line last given, from 1."""
        self.undecodable_line = 0
        """Number of the first one with undecodable bytes since the last `take_undecodable`; 0: none."""
        self._reader = reader
        self._limit = limit
        self._is_in_line = False
        reader.raw = open(reader.path, "rb")  # noqa: SIM115 - closed with the text
        compression = suffixes(reader.path)[1]
        binary = _COMPRESSIONS[compression](reader.raw) if compression else reader.raw
        self._text = io.TextIOWrapper(binary, reader.encoding, "distlm.mark", newline="\n")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._reader.raw is not None
        self._reader.raw.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._limit)
        if not line:
            raise StopIteration
        if not self._is_in_line:
            self.number += 1
            if self.number == 1:
                line = self._begin(line)
        self._is_in_line = line[-1:] != "\n"
        if not line.isascii() and (mark := _MARK.search(line)):
            self.undecodable_line = self.undecodable_line or self.number
            if self._reader.is_strict:
                what = f"byte 0x{ord(mark[0]) - 0xDC00:02x} in column {mark.start() + 1} is"
                error, self.undecodable_line = self._reader.not_in_encoding(self.number, what), 0
                raise error
            line = _MARK.sub(REPLACEMENT_CHARACTER, line)
        return line

    def _begin(self, line: str) -> str:
        if line.startswith(_UTF_16_BEGINNINGS):
            raise bad_file("the file begins as UTF-16 does; set encoding: utf-16", self._reader.path, 1)
        for beginning, suffix in _COMPRESSED_BEGINNINGS.items():
            if line.startswith(beginning):
                message = f"the file is compressed; give it a name that ends in {suffix}"
                raise bad_file(message, self._reader.path)
        # An empty string would look like the end of the file.
        return line.removeprefix("\ufeff") or "\n"

    def take_undecodable(self) -> str:
        """FILE:LINE of the first undecodable bytes since the last call; empty: there were none."""
        if not self.undecodable_line:
            return ""
        line, self.undecodable_line = self.undecodable_line, 0
        return place(self._reader.path, line)


# -------------------------------------------------------------------------------------------------------------- formats


def _read_paragraphs(reader: FileReader) -> Iterator[Piece]:
    with _Lines(reader, limit=MAX_PIECE_CHARACTERS) as lines:
        parts: list[str] = []
        num_characters = 0
        has_begun = False  # the paragraph, with a piece of its own
        for line in lines:
            is_blank = not line.strip()
            if not is_blank:
                parts.append(line)
                num_characters += len(line)
            if is_blank and (parts or has_begun):
                yield _end_of_paragraph(parts, has_begun, lines)
                parts, num_characters, has_begun = [], 0, False
            elif num_characters >= MAX_PIECE_CHARACTERS:
                text = "".join(parts)
                yield Piece(text if has_begun else text.lstrip(), False, lines.take_undecodable())
                parts, num_characters, has_begun = [], 0, True
        if parts or has_begun:
            yield _end_of_paragraph(parts, has_begun, lines)


def _end_of_paragraph(parts: list[str], has_begun: bool, lines: _Lines) -> Piece:
    text = "".join(parts).rstrip()
    return Piece(text if has_begun else text.lstrip(), True, lines.take_undecodable())


def _read_json_lines(reader: FileReader) -> Iterator[Piece]:
    path, text_column = reader.path, reader.text_column
    with _Lines(reader) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                message = f"the line is not JSON ({reason}); put one object on each line"
                raise bad_file(message, path, lines.number) from error
            if not isinstance(record, dict):
                message = f"the line holds {_json_kind(record)}; put an object with the key {text_column!r} there"
                raise bad_file(message, path, lines.number)
            if text_column not in record:
                raise bad_file(describe_missing_column(text_column, record), path, lines.number)
            text = record[text_column]
            if text is not None and not isinstance(text, str):
                raise bad_file(describe_no_text(text_column, _json_kind(text)), path, lines.number)
            if text and not text.isascii() and (half := _SURROGATE.search(text)):
                code = f"\\u{ord(half[0]):04x}"
                message = f"column {text_column!r} holds {code}, half of a surrogate pair; write the whole character"
                raise bad_file(message, path, lines.number)
            yield Piece(text or "", True, lines.take_undecodable())


# JSON can spell these, but they are no characters and cannot be tokenized.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_csv(reader: FileReader) -> Iterator[Piece]:
    # Strict, because otherwise a quote that is never closed swallows the rest of the file without a word.
    return _read_table(reader, strict=True)


def _read_tsv(reader: FileReader) -> Iterator[Piece]:
    # A line is a row and a quote is a character: text/tab-separated-values, as registered with IANA, has no quoting.
    return _read_table(reader, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)


def _read_table(reader: FileReader, **dialect: Any) -> Iterator[Piece]:
    csv.field_size_limit(sys.maxsize)
    with _Lines(reader) as lines:
        rows = csv.reader(lines, **dialect)
        try:
            header: list[str] = next(rows, [])
            if header and reader.text_column not in header:
                raise bad_file(describe_missing_column(reader.text_column, header), reader.path, 1)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise bad_file(
                        f"the row has {len(row)} fields and the header has {len(header)}; a field that holds "
                        "separators must stand in quotes",
                        reader.path,
                        rows.line_num,
                    )
                yield Piece(row[header.index(reader.text_column)], True, lines.take_undecodable())
        except csv.Error as error:
            raise bad_file(
                f"{error}; a field that holds quotes must stand in quotes, with each of its quotes written twice (or "
                "convert the file to .jsonl)",
                reader.path,
                rows.line_num,
            ) from error


def _read_parquet(reader: FileReader) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, text_column = reader.path, reader.text_column
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise bad_file(describe_missing_column(text_column, columns), path)
            column_type = file.schema_arrow.field(text_column).type
            if pa.types.is_dictionary(column_type):
                column_type = column_type.value_type
            if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
                raise bad_file(describe_no_text(text_column, str(column_type)), path)
            num_read = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                yield from _texts(reader, batch.column(0), num_read)
                num_read += batch.num_rows
                reader.share_read = num_read / file.metadata.num_rows
    except pa.ArrowException as error:
        raise bad_file(f"not a readable Parquet file: {error}", path) from error


def _texts(reader: FileReader, column: Any, first_row: int) -> Iterator[Piece]:
    """Of a batch. Parquet's strings are UTF-8, but not every program that writes them sees to it."""
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow as pa

        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        for row, data in enumerate(column.cast(pa.large_binary()).to_pylist(), start=first_row + 1):
            text = (data or b"").decode("utf-8", "distlm.mark")
            is_bad = _MARK.search(text) is not None
            if is_bad and reader.is_strict:
                message = f"column {reader.text_column!r} holds bytes that are not UTF-8; write the file anew"
                raise bad_file(message, reader.path, row) from None
            yield Piece(_MARK.sub(REPLACEMENT_CHARACTER, text), True, place(reader.path, row) if is_bad else "")
    else:
        for text in texts:
            yield Piece(text or "")


_FORMATS: dict[str, Callable[[FileReader], Iterator[Piece]]] = {
    ".txt": _read_paragraphs,
    ".text": _read_paragraphs,
    ".md": _read_paragraphs,
    ".tokens": _read_paragraphs,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json-lines": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
SUFFIXES = f"{', '.join(_FORMATS)}; all but .parquet may be compressed ({', '.join(_COMPRESSIONS)})"
"""What can be read, for people."""


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the format, and that of the compression or nothing."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in _COMPRESSIONS else (suffix, "")


def is_supported(path: Path) -> bool:
    form, compression = suffixes(path)
    return form in _FORMATS and not (compression and form == ".parquet")


def describe_unsupported(path: Path) -> str:
    if suffixes(path)[0] == ".parquet":
        return "Parquet compresses its columns itself; unpack the file, and name it .parquet"
    return f"unsupported suffix; use one of {SUFFIXES}"


def needs_pyarrow(path: Path) -> bool:
    """Whether the file can be read only where pyarrow is installed, which a client may lack."""
    return bool({".parquet", ".zst"}.intersection(suffixes(path)))
