"""The lines of one file: its compression and its encoding; standard library only at import.

A file is read in bounded memory, one record at a time. What cannot be read as asked is an InputError with file and
line: nothing is skipped or repaired in silence. Bytes that the encoding does not know are replaced and reported with
their document, or refused, as asked.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import errno
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from distlm.errors import InfrastructureError, InputError, Problem

REPLACEMENT_CHARACTER = "\ufffd"

Record = TypeVar("Record")


class TextFile:
    """A file that is read once. `encoding` is the name of a codec of Python's, and `encoding_errors` what to do about
    bytes that it does not know: `replace` them by U+FFFD, or `strict`: raise."""

    def __init__(self, path: Path, encoding: str = "utf-8", encoding_errors: str = "replace") -> None:
        self.path = path
        self.encoding = codecs.lookup(encoding).name
        self.is_strict = encoding_errors == "strict"
        self.lines: Lines | None = None
        self.share_read = 0.0
        self.raw: IO[bytes] | None = None
        """The file as it lies on the disk, while text is read from it."""

    @property
    def bytes_read(self) -> int:
        """How far reading has come in the file as it lies on the disk."""
        if self.raw is not None and not self.raw.closed:
            return self.raw.tell()
        return int(self.share_read * status(self.path).st_size)

    def explained(self, records: Iterator[Record]) -> Iterator[Record]:
        """The records, at least one. Raises InputError where the file is not what its suffix and the settings say, and
        InfrastructureError where the storage does not give it."""
        is_empty = True
        try:
            for record in records:
                is_empty = False
                yield record
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            # A compression that complains, and not the system.
            if suffixes(self.path)[1] and getattr(error, "errno", None) is None:
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


def bad_file(message: str, path: Path, line: int | None = None, key: str = "") -> InputError:
    """`key`: the setting of the source that the problem is about, if it is one."""
    return InputError(Problem(message, key, location=place(path, line)))


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


# ------------------------------------------------------------------------------------------------ bytes and characters


def _open_zstd(raw: IO[bytes]) -> Any:
    import pyarrow as pa  # the standard library has zstd from Python 3.14 on

    return pa.CompressedInputStream(raw, "zstd")


COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix that tells the format, and that of the compression or nothing."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSIONS else (suffix, "")


# How files begin that are compressed though their names do not say so, as `_mark_undecodable` leaves it in UTF-8.
_COMPRESSED_BEGINNINGS = {"\x1f\udc8b": ".gz", "(\udcb5/\udcfd": ".zst", "\udcfd7zXZ": ".xz"}
_UTF_16_BEGINNINGS = ("\udcff\udcfe", "\udcfe\udcff")


def _mark_undecodable(error: UnicodeError) -> tuple[str, int]:
    """A handler for decoding errors: one lone surrogate for the bytes, which no valid text holds, tells the first."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(0xDC00 + error.object[error.start]), error.end


MARKING = "distlm.mark"
"""Name of that handler, for `decode`."""
MARK = re.compile("[\udc00-\udcff]")
codecs.register_error(MARKING, _mark_undecodable)


class Lines:
    """The lines of a file with their ends; a byte order mark is dropped. A line is cut after `limit` characters."""

    def __init__(self, file: TextFile, limit: int = -1) -> None:
        file.lines = self
        self.number = 0
        """Of the line last given, from 1."""
        self.undecodable_line = 0
        """Number of the first one with undecodable bytes since the last `take_undecodable`; 0: none."""
        self._file = file
        self._limit = limit
        self._is_in_line = False
        file.raw = open(file.path, "rb")  # noqa: SIM115 - closed with the text
        compression = suffixes(file.path)[1]
        binary = COMPRESSIONS[compression](file.raw) if compression else file.raw
        self._text = io.TextIOWrapper(binary, file.encoding, MARKING, newline="\n")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._file.raw is not None
        self._file.raw.close()

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
        if not line.isascii() and (mark := MARK.search(line)):
            self.undecodable_line = self.undecodable_line or self.number
            if self._file.is_strict:
                what = f"byte 0x{ord(mark[0]) - 0xDC00:02x} in column {mark.start() + 1} is"
                error, self.undecodable_line = self._file.not_in_encoding(self.number, what), 0
                raise error
            line = MARK.sub(REPLACEMENT_CHARACTER, line)
        return line

    def _begin(self, line: str) -> str:
        if line.startswith(_UTF_16_BEGINNINGS):
            raise bad_file("the file begins as UTF-16 does; set encoding: utf-16", self._file.path, 1)
        for beginning, suffix in _COMPRESSED_BEGINNINGS.items():
            if line.startswith(beginning):
                message = f"the file is compressed; give it a name that ends in {suffix}"
                raise bad_file(message, self._file.path)
        # An empty string would look like the end of the file.
        return line.removeprefix("\ufeff") or "\n"

    def take_undecodable(self) -> int:
        """The line of the first undecodable bytes since the last call; 0: there were none."""
        line, self.undecodable_line = self.undecodable_line, 0
        return line
