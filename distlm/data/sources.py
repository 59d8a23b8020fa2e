"""Documents out of the sources that the user names; standard library only at import, so that `validate` can use it.

Files are read in bounded memory, one record at a time, always in the same order. Whatever cannot be read as asked is
an InputError with file and line: nothing is skipped or repaired in silence. A record with no text is no error; it comes
out as an empty document, and the reader of the documents counts it.
"""

from __future__ import annotations

import ast
import csv
import difflib
import glob
import hashlib
import importlib.util
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

from distlm.errors import InputError, Problem


class FilesSource(Protocol):
    """Text files: `paths` are files, folders (everything of a supported suffix below them) or globs."""

    @property
    def source(self) -> Literal["files"]: ...
    @property
    def paths(self) -> list[str]: ...
    @property
    def text_column(self) -> str: ...
    @property
    def max_documents(self) -> int | None: ...


class PythonDocsSource(Protocol):
    """Docstrings of installed packages; `packages` are top-level import names, None stands for all."""

    @property
    def source(self) -> Literal["python-docs"]: ...
    @property
    def packages(self) -> list[str] | None: ...
    @property
    def max_documents(self) -> int | None: ...


Source = FilesSource | PythonDocsSource


def documents(source: Source) -> Iterator[str]:
    """All documents of a source, empty ones included, in an order that depends on names only.

    Raises InputError where a file is missing, unreadable, empty or not what its suffix says.
    """
    files = files_of(source)
    if source.source == "files":
        texts = (_read(path, source.text_column) for path in files)
        return islice(chain.from_iterable(texts), source.max_documents)
    return islice(_module_docs(files), source.max_documents)


def files_of(source: Source) -> list[Path]:
    """The files that `documents` reads, in its order. Raises InputError where a name matches nothing."""
    if source.source == "files":
        files, problems = _find_text_files(source)
    elif not (problems := _missing_packages(source)):
        return _find_modules(source)
    if problems:
        raise InputError(*problems)
    return files


def check_source(source: Source) -> list[Problem]:
    """What is wrong with a source as far as its files and the first record of each can tell."""
    if source.source == "python-docs":
        return _missing_packages(source)
    files, problems = _find_text_files(source)
    has_pyarrow = importlib.util.find_spec("pyarrow") is not None  # a client may lack it; whoever reads the data has it
    for path in files:
        if path.suffix.lower() == ".parquet" and not has_pyarrow:
            continue
        try:
            next(_read(path, source.text_column))
        except InputError as error:
            problems.extend(error.problems)
    return problems


# ---------------------------------------------------------------------------------------------------------- text files


def _find_text_files(source: FilesSource) -> tuple[list[Path], list[Problem]]:
    files: dict[Path, None] = {}  # a file that two names match is read once
    problems: list[Problem] = []
    for name in source.paths:
        try:
            files.update(dict.fromkeys(_match(name)))
        except InputError as error:
            problems.extend(error.problems)
        except OSError as error:
            problems.append(Problem(f"cannot be looked up: {error.strerror}", value=name))
    return list(files), problems


def _match(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))]
        supported = sorted(file for file in files if file.suffix.lower() in _READERS)
        if not supported:
            raise InputError(Problem(f"the folder holds no file with a supported suffix ({_SUFFIXES})", value=name))
        return supported
    if path.exists():
        matches = [path]
    elif glob.has_magic(name):
        matches = [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if not file.is_dir()]
        if not matches:
            raise InputError(Problem(f"no file matches this pattern, seen from {Path.cwd()}", value=name))
    else:
        raise InputError(Problem(_describe_missing(path), value=name))
    unsupported = [file for file in matches if file.suffix.lower() not in _READERS]
    if unsupported:
        raise InputError(*(Problem(f"unsupported suffix; use one of {_SUFFIXES}", value=str(f)) for f in unsupported))
    if special := [file for file in matches if file.exists() and not file.is_file()]:
        raise InputError(*(Problem("not a regular file", value=str(f)) for f in special))
    return matches


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _describe_missing(path: Path) -> str:
    message = "no such file or folder" if path.is_absolute() else f"no such file or folder, seen from {Path.cwd()}"
    if not path.parent.is_dir():
        return f"{message}; the folder {path.parent} does not exist either"
    return message + _nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _read(path: Path, text_column: str) -> Iterator[str]:
    """The texts of one file, at least one; InputError names the file and, where there are lines, the line."""
    is_empty = True
    try:
        for text in _READERS[path.suffix.lower()](path, text_column):
            is_empty = False
            yield text
    except OSError as error:
        raise _unreadable(path, error) from error
    if is_empty:
        message = "the file is empty" if path.stat().st_size == 0 else "the file holds no records"
        raise _bad_file(f"{message}; remove it from the sources or mend it", path)


def _bad_file(message: str, path: Path, line: int | None = None) -> InputError:
    return InputError(Problem(message, location=str(path) if line is None else f"{path}:{line}"))


def _unreadable(path: Path, error: OSError) -> InputError:
    return _bad_file(f"cannot be read: {error.strerror or error}", path)


def _missing_column(text_column: str, columns: list[str], path: Path, line: int | None = None) -> InputError:
    hint = _nearest(text_column, columns) or "; name the column of text in text_column"
    names = ", ".join(map(repr, columns)) or "none"
    return _bad_file(f"no column {text_column!r}; the columns are {names}{hint}", path, line)


def _no_text(text_column: str, kind: str, path: Path, line: int | None = None) -> InputError:
    return _bad_file(f"column {text_column!r} holds {kind}, not text; name a column of text in text_column", path, line)


def _read_lines(path: Path) -> Iterator[str]:
    """The lines with their ends; a byte order mark is dropped."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                # The decoder of the first line does not count a byte order mark that it has dropped.
                start = error.start + len(line) - len(error.object)
                raise _bad_file(
                    f"byte {offset + start} (0x{line[start]:02x}) is not UTF-8; convert the file, for example with: "
                    "iconv -f LATIN1 -t UTF-8",
                    path,
                    number,
                ) from error
            offset += len(line)


# A text without blank lines is one paragraph; beyond this it is cut at the end of a line, so that memory stays bounded.
_MAX_PARAGRAPH_CHARACTERS = 16 * 2**20


def _read_paragraphs(path: Path, text_column: str) -> Iterator[str]:
    lines: list[str] = []
    num_characters = 0
    for line in _read_lines(path):
        is_blank = not line.strip()
        if not is_blank:
            lines.append(line)
            num_characters += len(line)
        if lines and (is_blank or num_characters > _MAX_PARAGRAPH_CHARACTERS):
            yield "".join(lines).strip()
            lines, num_characters = [], 0
    if lines:
        yield "".join(lines).strip()


def _read_json_lines(path: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise _bad_file(f"the line is not JSON ({reason}); put one object on each line", path, number) from error
        if not isinstance(record, dict):
            kind = _json_kind(record)
            raise _bad_file(f"the line holds {kind}; put an object with the key {text_column!r} there", path, number)
        if text_column not in record:
            raise _missing_column(text_column, list(record), path, number)
        text = record[text_column]
        if text is not None and not isinstance(text, str):
            raise _no_text(text_column, _json_kind(text), path, number)
        if half := _SURROGATE.search(text or ""):
            code = f"\\u{ord(half[0]):04x}"
            raise _bad_file(
                f"column {text_column!r} holds {code}, half of a surrogate pair; write the whole character",
                path,
                number,
            )
        yield text or ""


# JSON can spell these, but they are no characters and cannot be tokenized.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_csv(path: Path, text_column: str) -> Iterator[str]:
    # Strict, because otherwise a quote that is never closed swallows the rest of the file without a word.
    return _read_table(csv.reader(_read_lines(path), strict=True), path, text_column)


def _read_tsv(path: Path, text_column: str) -> Iterator[str]:
    # A line is a row and a quote is a character: text/tab-separated-values, as registered with IANA, has no quoting.
    reader = csv.reader(_read_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    return _read_table(reader, path, text_column)


def _read_table(reader: Any, path: Path, text_column: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    try:
        header: list[str] = next(reader, [])
        if header and text_column not in header:
            raise _missing_column(text_column, header, path, 1)
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise _bad_file(
                    f"the row has {len(row)} fields and the header has {len(header)}; a field that holds separators "
                    "must stand in quotes",
                    path,
                    reader.line_num,
                )
            yield row[header.index(text_column)]
    except csv.Error as error:
        raise _bad_file(
            f"{error}; a field that holds quotes must stand in quotes, with each of its quotes written twice (or "
            "convert the file to .jsonl)",
            path,
            reader.line_num,
        ) from error


def _read_parquet(path: Path, text_column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise _missing_column(text_column, columns, path)
            column_type = file.schema_arrow.field(text_column).type
            if pa.types.is_dictionary(column_type):
                column_type = column_type.value_type
            if not (pa.types.is_string(column_type) or pa.types.is_large_string(column_type)):
                raise _no_text(text_column, str(column_type), path)
            for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except UnicodeDecodeError as error:
        raise _bad_file(f"column {text_column!r} holds bytes that are not UTF-8", path) from error
    except pa.ArrowException as error:
        raise _bad_file(f"not a readable Parquet file: {error}", path) from error


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
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
_SUFFIXES = ", ".join(_READERS)

# -------------------------------------------------------------------------------------------------------- Python's docs

_TEST_FOLDERS = {"test", "tests", "idle_test"}  # their docstrings say little, and fixtures are full of broken files
_MIN_WORDS = 10


def _import_roots() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")))


def _missing_packages(source: PythonDocsSource) -> list[Problem]:
    """Named packages that are not installed. Looks at the import system's roots only."""
    installed = {path.name.removesuffix(".py") for root in _import_roots() for path in Path(root).glob("*")}
    return [
        Problem(
            f"no such package is installed; give the name that `import` takes{_nearest(name, installed)}", value=name
        )
        for name in sorted(set(source.packages or ()) - installed)
    ]


def _find_modules(source: PythonDocsSource) -> list[Path]:
    """The Python files below the roots of the import system, ordered by a hash of their names, so that the first few
    are of many packages. The names alone decide, not where Python is installed."""
    wanted = set(source.packages) if source.packages is not None else None
    modules: dict[str, Path] = {}
    for root in _import_roots():
        for folder, subfolders, names in os.walk(root):
            if folder == root and wanted is not None:
                subfolders[:] = [name for name in subfolders if name in wanted]
                names = [name for name in names if name.removesuffix(".py") in wanted]
            subfolders[:] = [
                name
                for name in subfolders
                if name not in _TEST_FOLDERS and name not in ("site-packages", "__pycache__")
            ]
            for name in names:
                path = Path(folder, name)
                if name.endswith(".py") and path.is_file():  # editors leave dangling links
                    modules.setdefault(path.relative_to(root).as_posix(), path)
    return [modules[name] for name in sorted(modules, key=_hash)]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "ignore"), digest_size=16).digest()


def _module_docs(paths: Iterable[Path]) -> Iterator[str]:
    """One document for each module that has docstrings: those of the module, its classes and its functions, of ten
    words or more, joined by blank lines. A docstring that came before is left out."""
    seen: set[bytes] = set()
    for path in paths:
        new = []
        for docstring in _docstrings(path):
            digest = _hash(docstring)
            if digest not in seen:
                seen.add(digest)
                new.append(docstring)
        if new:
            yield "\n\n".join(new)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if b'"""' not in code and b"'''" not in code:
        return  # saves the time of parsing; a docstring of ten words in single quotes is rare
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return  # templates and code for other versions of Python
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)  # as inspect.cleandoc leaves it
            if docstring and len(docstring.split()) >= _MIN_WORDS:
                yield docstring.encode("utf-8", "ignore").decode()


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The tree and all statements below it, in the order of the file; expressions are not visited."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for block in ("finalbody", "orelse", "handlers", "body"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                stack.extend(reversed(statements))
