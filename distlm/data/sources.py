"""The sources of text that the user names: their files, and the documents in them.

Standard library only at import, so that `validate` can use it. Documents come always in the same order. A record with
no text is no error; it comes out as an empty document, and whoever reads the documents counts it.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from distlm.data.lines import is_storage_failure, nearest, place, status, unreadable
from distlm.data.python_docs import find_modules, missing_packages, module_docs
from distlm.data.readers import FileReader, Piece
from distlm.data.tables import (
    SUFFIXES,
    TABLE_SUFFIXES,
    FormatName,
    TableSettings,
    describe_unsupported,
    format_of,
    needs_pyarrow,
)
from distlm.errors import InputError, Problem
from distlm.redact import drop_queries


class LabelledSource(Protocol):
    """The columns of a source that tasks with labels read, beside its text; None: no second text, and `label`."""

    @property
    def text_pair_column(self) -> str | None: ...
    @property
    def label_column(self) -> str | None: ...
    @property
    def document_column(self) -> str | None: ...


class FilesSource(LabelledSource, Protocol):
    """Files: `paths` are files, folders (everything of a supported suffix below them) or globs."""

    @property
    def source(self) -> Literal["files"]: ...
    @property
    def paths(self) -> list[str]: ...
    @property
    def text_column(self) -> str: ...
    @property
    def encoding(self) -> str: ...
    @property
    def encoding_errors(self) -> Literal["strict", "replace"]: ...
    @property
    def format(self) -> FormatName | None: ...
    @property
    def column_names(self) -> list[str] | None: ...
    @property
    def delimiter(self) -> str | None: ...
    @property
    def max_documents(self) -> int | None: ...


class ParallelSource(LabelledSource, Protocol):
    """Files of which line i of each together are row i; `columns` maps the names of the columns to the files."""

    @property
    def source(self) -> Literal["parallel"]: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def text_column(self) -> str: ...
    @property
    def encoding(self) -> str: ...
    @property
    def encoding_errors(self) -> Literal["strict", "replace"]: ...
    @property
    def max_documents(self) -> int | None: ...


class DatasetsSource(LabelledSource, Protocol):
    """What `datasets.load_dataset` loads; the names are those of its arguments. Read by `distlm.data.hub`."""

    @property
    def source(self) -> Literal["datasets"]: ...
    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def data_files(self) -> list[str] | None: ...
    @property
    def text_column(self) -> str: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def max_documents(self) -> int | None: ...
    @property
    def max_gib(self) -> float: ...


class PythonDocsSource(LabelledSource, Protocol):
    """Docstrings of installed packages; `packages` are top-level import names, None stands for all."""

    @property
    def source(self) -> Literal["python-docs"]: ...
    @property
    def packages(self) -> list[str] | None: ...
    @property
    def max_documents(self) -> int | None: ...


LocalSource = FilesSource | PythonDocsSource
"""Of documents, on this machine."""
LocalTable = FilesSource | ParallelSource | PythonDocsSource
"""Of rows, on this machine."""
Source = FilesSource | ParallelSource | DatasetsSource | PythonDocsSource


def source_name(source: Source) -> str:
    """What people call it."""
    if source.source == "files":
        return ", ".join(source.paths)
    if source.source == "parallel":
        return ", ".join(source.columns.values())
    if source.source == "datasets":
        return drop_queries("/".join(part for part in (source.path, source.name, source.split) if part))
    return "python-docs" if source.packages is None else f"python-docs of {', '.join(source.packages)}"


class SourceReader:
    """The documents of a source from the first on, empty ones included; to be iterated over once.

    Iterating raises InputError where a file is missing, unreadable, empty or not what its suffix says, and
    InfrastructureError where the storage fails.
    """

    def __init__(self, source: LocalSource, files: Sequence[Path]) -> None:
        """`files` are what `files_of` has found."""
        self._source = source
        self._files = files
        self._num_bytes = sum(status(file).st_size for file in files) if source.source == "files" else 0
        self._bytes_of_finished = 0
        self._current: FileReader | None = None

    @property
    def bytes_read(self) -> int:
        """How far reading has come in the files on the disk; 0 always where that says nothing about the text."""
        return self._bytes_of_finished + (self._current.bytes_read if self._current else 0)

    def expected_bytes(self, num_documents: int) -> int:
        """How far it will come, as far as the first `num_documents` tell."""
        if not self._source.max_documents or not num_documents:
            return self._num_bytes
        return min(self._num_bytes, self.bytes_read * self._source.max_documents // num_documents)

    def __iter__(self) -> Iterator[Piece]:
        left = self._source.max_documents
        for piece in self._pieces():
            yield piece
            if left is not None and piece.ends_document:
                left -= 1
                if not left:
                    return

    def _pieces(self) -> Iterator[Piece]:
        if self._source.source == "python-docs":
            yield from (Piece(text) for _, text in module_docs(self._files))
            return
        for file in self._files:
            self._current = _file_reader(self._source, file)
            yield from self._current
            self._bytes_of_finished += self._current.bytes_read
            self._current = None


def _file_reader(source: FilesSource, file: Path) -> FileReader:
    table = TableSettings(
        text_column=source.text_column,
        column_names=source.column_names,
        delimiter=source.delimiter,
        only_text=True,
    )
    return FileReader(file, table, source.encoding, source.encoding_errors, source.format)


def files_of(source: LocalTable, rows: bool = False) -> list[Path]:
    """The files that hold the documents, or the rows, in their order; of a parallel source one for each column. Raises
    InputError where a name matches nothing."""
    if source.source == "python-docs":
        if not (problems := missing_packages(source.packages)):
            return find_modules(source.packages)
    elif source.source == "parallel":
        files, problems = _find_parallel_files(source)
    else:
        files, problems = _find_files(source.paths, source.format, rows)
    if problems:
        raise InputError(*problems)
    return files


def check_source(source: Source) -> list[Problem]:
    """What is wrong with a source of documents as far as local files and the first record of each can tell; the key of
    a problem, if any, is one of the source's. Raises InfrastructureError where the storage fails."""
    if source.source == "datasets":
        return check_dataset(source)
    if source.source == "parallel":
        return _find_parallel_files(source)[1]
    if source.source == "python-docs":
        return missing_packages(source.packages)
    return check_files(source, lambda file: iter(_file_reader(source, file)))


def check_files(source: FilesSource, read: Callable[[Path], Iterator[Piece]], rows: bool = False) -> list[Problem]:
    """What is wrong with the names, and with the first record of each file; with more where that one is damaged."""
    files, problems = _find_files(source.paths, source.format, rows)
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None  # a client may lack it; whoever reads the data has it
    count = UndecodableCount()
    all_is_read = True
    for file in files:
        if needs_pyarrow(file, source.format) and not has_pyarrow:
            all_is_read = False
            continue
        try:
            for piece in read(file):
                count.add(piece)
                # As long as nothing but damage comes, all the text may be in another encoding.
                if not piece.undecodable_at or count.num_documents > _MAX_CHECKED_DOCUMENTS:
                    all_is_read = False
                    break
        except InputError as error:
            problems.extend(error.problems)
    # A share of what has not been read is not known.
    return problems + (count.problems(source.encoding) if all_is_read else [])


_MAX_CHECKED_DOCUMENTS = 1000


class UndecodableCount:
    """Documents with bytes that are not in the encoding of their file. Some damage is repaired and reported; where much
    is, the encoding is wrong."""

    FEW = 10
    """Documents."""
    SHARE = 0.01
    """Of all documents."""

    def __init__(self) -> None:
        self.num_documents = 0
        self.num_undecodable = 0
        self.first = ""
        """FILE:LINE"""
        self._is_undecodable = False

    def add(self, piece: Piece) -> None:
        self._is_undecodable |= bool(piece.undecodable_at)
        self.first = self.first or piece.undecodable_at
        if piece.ends_document:
            self.num_documents += 1
            self.num_undecodable += self._is_undecodable
            self._is_undecodable = False

    def problems(self, encoding: str) -> list[Problem]:
        """What to say if there are too many: all documents, or more than a few that are more than a small share."""
        bad, total = self.num_undecodable, self.num_documents
        if not bad or (bad < total and (bad <= self.FEW or bad <= self.SHARE * total)):
            return []
        message = (
            f"{bad:,} of {total:,} documents hold bytes that are not {encoding.upper()}, so the files are probably in "
            "another encoding; set encoding to it, such as gb18030, latin-1 or utf-16"
        )
        return [Problem(message, location=self.first)]


BUILDERS = ("arrow", "csv", "json", "parquet", "text")
"""What `datasets` calls the formats that `data_files` may be in."""


def check_dataset(source: DatasetsSource) -> list[Problem]:
    """What is on this machine; a name on the Hub is looked up by whoever reads the data."""
    if source.path in BUILDERS and not source.data_files:
        message = f"is a builder and needs data_files: [FILES]; for a folder of that name write ./{source.path}"
        return [Problem(message, "path", source.path)]
    if source.path.startswith("~"):
        return [Problem("'~' is not expanded here; write ${HOME} for it", "path", source.path)]
    if source.path.startswith((".", "/")) and not Path(source.path).is_dir():
        message = f"no such folder; `path` is a folder, a name on the Hub, or one of {', '.join(BUILDERS)}"
        return [Problem(message, "path", source.path)]
    if source.path in BUILDERS:
        local = [name for name in source.data_files or [] if "://" not in name]
        missing = [name for name in local if not glob.glob(name, recursive=True)]
        return [Problem("no file matches", "data_files", name) for name in missing]
    return []


# --------------------------------------------------------------------------------------------------------------- files


def _find_parallel_files(source: ParallelSource) -> tuple[list[Path], list[Problem]]:
    files: list[Path] = []
    problems: list[Problem] = []
    for column, name in source.columns.items():
        path = Path(name).expanduser()
        message = "" if path.is_file() else "not a regular file" if path.exists() else _describe_missing(path)
        if message:
            problems.append(Problem(message, f"columns.{column}", name))
        files.append(path)
    return files, problems


def _find_files(names: list[str], form: FormatName | None, rows: bool) -> tuple[list[Path], list[Problem]]:
    files: dict[str, Path] = {}  # a file that two names match, or that has two names, is read once
    problems: list[Problem] = []
    for name in names:
        try:
            for file in _match(name, form, rows):
                files.setdefault(os.path.realpath(file), file)
        except InputError as error:
            problems.extend(error.problems)
        except OSError as error:
            if is_storage_failure(error):
                raise unreadable(Path(name), error) from error
            problems.append(Problem(f"cannot be looked up: {error.strerror}", value=name))
    return list(files.values()), problems


def _match(name: str, form: FormatName | None, rows: bool) -> list[Path]:
    """Of the folder, the file or the pattern; of any suffix where the format is given."""

    def is_supported(file: Path) -> bool:
        return form is not None or format_of(file, rows) is not None

    path = Path(name).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        supported = sorted(file for file in files if is_supported(file))
        if not supported:
            suffixes = "file" if form else f"file with a supported suffix ({TABLE_SUFFIXES if rows else SUFFIXES})"
            raise InputError(Problem(f"the folder holds no {suffixes}", value=name))
        return supported
    if path.exists():
        matches = [path]
    elif glob.has_magic(name):
        matches = [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if not file.is_dir()]
        if not matches:
            raise InputError(Problem(f"no file matches this pattern, seen from {Path.cwd()}", value=name))
    else:
        raise InputError(Problem(_describe_missing(path), value=name))
    if unsupported := [file for file in matches if not is_supported(file)]:
        raise InputError(*(Problem(describe_unsupported(file, rows), value=place(file)) for file in unsupported))
    if special := [file for file in matches if file.exists() and not file.is_file()]:
        raise InputError(*(Problem("not a regular file", value=place(f)) for f in special))
    return matches


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _describe_missing(path: Path) -> str:
    message = "no such file or folder" if path.is_absolute() else f"no such file or folder, seen from {Path.cwd()}"
    if not path.parent.is_dir():
        return f"{message}; the folder {path.parent} does not exist either"
    return message + nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))
