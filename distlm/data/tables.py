"""Rows of named columns out of one file, format by format; standard library only at import.

A format gives the values of the columns that are asked for, with the line that the row begins in. Values come as the
format holds them: text from tables of text, lists of text from .conll, anything from JSON and Parquet; null is None.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, get_args

from distlm.data.lines import (
    COMPRESSIONS,
    MARK,
    MARKING,
    REPLACEMENT_CHARACTER,
    Lines,
    TextFile,
    bad_file,
    nearest,
    suffixes,
)

Record = tuple[Sequence[Any], int, int]
"""Values of the columns that are asked for, in that order; the line (of Parquet: the row) that they begin in, from 1;
and the first line of the row with bytes that are not in the file's encoding, 0 if there is none."""

FormatName = Literal["txt", "jsonl", "csv", "tsv", "parquet", "conll", "conllu"]

_SUFFIXES: dict[str, FormatName] = {
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".tokens": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json-lines": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
"""Of files that hold documents."""
_TOKEN_SUFFIXES: dict[str, FormatName] = {
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".conllu": "conllu",
}
"""Of files that hold words with labels."""

DOCSTART = "-DOCSTART-"
"""How a line begins that begins a document in CoNLL's formats."""
CONLLU_COLUMNS = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


@dataclass(frozen=True)
class TableSettings:
    """What a source says about its tables."""

    text_column: str = "text"
    label_column: str = "label"
    column_names: Sequence[str] | None = None
    """Of a file without a header."""
    delimiter: str | None = None
    """Between fields; None: the format's own."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """From the name of a column to the setting that names it; a column that is not in it is said without one."""
    only_text: bool = False
    """Each value must be text or nothing."""


def read_table(file: TextFile, form: FormatName, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    """All rows of a file, with those columns. Raises InputError, with file and line, where it is not in that format or
    lacks a column."""
    if form not in _DELIMITED and table.delimiter is not None:
        message = f"the format {form} has no delimiter; leave it out, or set format to csv, tsv or txt"
        raise bad_file(message, file.path, key="delimiter")
    if form in ("jsonl", "parquet") and table.column_names is not None:
        message = f"the format {form} names its columns itself; leave column_names out"
        raise bad_file(message, file.path, key="column_names")
    if form in _OF_WORDS and table.only_text:
        raise bad_file(describe_no_text(columns[0], "lists of words"), file.path, key=table.keys.get(columns[0], ""))
    return _FORMATS[form](file, columns, table)


def is_table(form: FormatName, table: TableSettings) -> bool:
    """Whether rows have columns of their own; else a file is plain text."""
    return form != "txt" or table.delimiter is not None or table.column_names is not None


# -------------------------------------------------------------------------------------------------------------- columns


def describe_missing_column(column: str, columns: Iterable[str], key: str = "text_column", more: str = "") -> str:
    """`key`: the setting that names the column. `more`: advice where no name is near."""
    columns = list(columns)
    what = {"text_column": "the column of text", "label_column": "the column of labels"}.get(key, "it")
    hint = nearest(column, columns) or f"; name {what} in {key}{more}"
    return f"no column {column!r}; the columns are {', '.join(map(_short, columns)) or 'none'}{hint}"


def _short(name: str, limit: int = 60) -> str:
    return repr(name if len(name) <= limit else name[: limit - 3] + "...")


def describe_no_text(text_column: str, kind: str) -> str:
    return f"column {text_column!r} holds {kind}, not text; name a column of text in text_column"


def check_columns(
    columns: Sequence[str],
    found: Sequence[str],
    keys: Mapping[str, str],
    path: Path,
    line: int | None = None,
    more: str = "",
) -> None:
    """Raises InputError unless each column is found, and once. `keys` as in `TableSettings`; `more`: see above."""
    for column in columns:
        key = keys.get(column, "")
        if column not in found:
            message = describe_missing_column(column, found, key or "text_column", more)
            raise bad_file(message, path, line, key)
        if found.count(column) > 1:
            raise bad_file(f"there is more than one column {column!r}; rename the others", path, line, key)


# -------------------------------------------------------------------------------------------------------------- formats


def _read_lines(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    """A line is a row, with one column; blank lines are none."""
    more = "; a line is a row of that one column, unless delimiter or column_names is set"
    check_columns(columns, [table.text_column], table.keys, file.path, 1, more)
    with Lines(file) as lines:
        for line in lines:
            if not line.isspace():
                yield (line.rstrip("\r\n"),) * len(columns), lines.number, lines.take_undecodable()


def _read_txt(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    return (_read_tsv if is_table("txt", table) else _read_lines)(file, columns, table)


def _read_json_lines(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    path = file.path
    decode = json.JSONDecoder().decode
    get = itemgetter(*columns)
    with Lines(file) as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = decode(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                message = f"the line is not JSON ({reason}); put one object on each line"
                raise bad_file(message, path, lines.number) from error
            if not isinstance(record, dict):
                message = f"the line holds {_json_kind(record)}; put an object with the key {columns[0]!r} there"
                raise bad_file(message, path, lines.number)
            try:
                values = get(record) if len(columns) > 1 else (get(record),)
            except KeyError:
                check_columns(columns, list(record), table.keys, file.path, lines.number)
                raise
            for value in values:
                if not (
                    value is None or (value.__class__ is str and (value.isascii() or not _SURROGATE.search(value)))
                ):
                    _check_values(columns, values, table, file, lines.number)
            yield values, lines.number, lines.take_undecodable()


# JSON can spell these, but they are no characters and cannot be tokenized.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_values(
    columns: Sequence[str], values: Sequence[Any], table: TableSettings, file: TextFile, line: int
) -> None:
    for column, value in zip(columns, values, strict=True):
        key = table.keys.get(column, "")
        if table.only_text and value is not None and not isinstance(value, str):
            raise bad_file(describe_no_text(column, _json_kind(value)), file.path, line, key)
        for text in _strings(value):
            if half := _SURROGATE.search(text):
                code = f"\\u{ord(half[0]):04x}"
                message = f"column {column!r} holds {code}, half of a surrogate pair; write the whole character"
                raise bad_file(message, file.path, line, key)


def _strings(value: Any) -> Iterator[str]:
    """All text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else [*value, *value.values()]:
            yield from _strings(item)


def _json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_csv(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    # Strict, because otherwise a quote that is never closed swallows the rest of the file without a word.
    return _read_delimited(file, columns, table, delimiter=table.delimiter or ",", strict=True)


def _read_tsv(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    # A line is a row and a quote is a character: text/tab-separated-values, as registered with IANA, has no quoting.
    dialect = {"delimiter": table.delimiter or "\t", "quoting": csv.QUOTE_NONE, "strict": True}
    return _read_delimited(file, columns, table, **dialect)


_NO_HEADER = ", or those of a file without a header in column_names"


def _read_delimited(file: TextFile, columns: Sequence[str], table: TableSettings, **dialect: Any) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with Lines(file) as lines:
        rows = csv.reader(lines, **dialect)
        try:
            header = next(rows, []) if table.column_names is None else list(table.column_names)
            if not header:
                return
            more = _NO_HEADER if table.column_names is None else ""
            check_columns(columns, header, table.keys, file.path, lines.number or 1, more)
            num_fields = len(header)
            positions = [header.index(column) for column in columns]
            # A slice gives a list, as several positions give a tuple.
            chosen = positions if len(positions) > 1 else [slice(positions[0], positions[0] + 1)]
            values_of = itemgetter(*chosen)
            line = rows.line_num + 1
            for row in rows:
                first_line, line = line, rows.line_num + 1
                if not row:
                    continue
                if len(row) != num_fields:
                    message = f"the row has {len(row)} fields and the header has {num_fields}"
                    if table.column_names is not None:
                        message = f"the row has {len(row)} fields and column_names has {num_fields}"
                    can_quote = dialect.get("quoting") != csv.QUOTE_NONE
                    remedy = "must stand in quotes" if can_quote else "needs quotes, which the format csv has"
                    message = f"{message}; a field that holds separators {remedy}"
                    raise bad_file(message, file.path, rows.line_num)
                yield values_of(row), first_line, lines.undecodable_line and lines.take_undecodable()
        except csv.Error as error:
            raise bad_file(
                f"{error}; a field that holds quotes must stand in quotes, with each of its quotes written twice (or "
                "convert the file to .jsonl)",
                file.path,
                rows.line_num,
            ) from error


def _read_conll(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    return _read_sentences(file, columns, table, is_conllu=False)


def _read_conllu(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    return _read_sentences(file, columns, table, is_conllu=True)


def _read_sentences(file: TextFile, columns: Sequence[str], table: TableSettings, is_conllu: bool) -> Iterator[Record]:
    """A row is a sentence: a line for each word, ended by a blank line. A value is the list of a column's fields.

    A `-DOCSTART-` line ends a sentence and is none; the column of that name counts them. Of CoNLL-U are left out:
    comments, and the lines of contractions (1-2) and of words that are not written (1.1), so that each word comes once.
    """
    names = list(table.column_names) if table.column_names is not None else CONLLU_COLUMNS if is_conllu else None
    positions: list[int | None] = []
    words: list[list[str]] = []
    first_line = num_documents = 0

    def sentence() -> list[Any]:
        return [num_documents if p is None else [word[p] for word in words] for p in positions]

    with Lines(file) as lines:
        for line in lines:
            stripped = line.strip(" \t\r\n")
            if not stripped or line.startswith(DOCSTART):
                if words:
                    yield sentence(), first_line, lines.take_undecodable()
                    words = []
                num_documents += bool(stripped)
                continue
            if is_conllu and line.startswith("#"):
                continue
            fields = _fields(line)
            if not positions:
                names = names or _conll_names(len(fields), table)
                check_columns(columns, [*names, DOCSTART], table.keys, file.path, lines.number)
                positions = [None if column == DOCSTART else names.index(column) for column in columns]
                num_fields = len(names)
            if len(fields) != num_fields:
                message = f"the line has {len(fields)} fields and the first line has {num_fields}"
                if table.column_names is not None:
                    message = f"the line has {len(fields)} fields and column_names has {num_fields}"
                elif is_conllu:
                    message = f"the line has {len(fields)} fields and CoNLL-U has {num_fields}"
                raise bad_file(f"{message}; mend it, or name all columns in column_names", file.path, lines.number)
            if is_conllu and not fields[0].isdecimal():
                continue
            if not words:
                first_line = lines.number
            words.append(fields)
        if words:
            yield sentence(), first_line, lines.take_undecodable()


def _fields(line: str) -> list[str]:
    """Separated by tabs, where there is one; else by blanks. Other white space may be part of a word."""
    line = line.rstrip("\r\n")
    return line.split("\t") if "\t" in line else [part for part in line.split(" ") if part]


def _conll_names(num_columns: int, table: TableSettings) -> list[str]:
    """The words come first and their labels last."""
    middle = [f"column {number}" for number in range(2, num_columns)]
    return [table.text_column, *middle, table.label_column] if num_columns > 1 else [table.text_column]


def _read_parquet(file: TextFile, columns: Sequence[str], table: TableSettings) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = file.path
    try:
        with pq.ParquetFile(path) as parquet:
            check_columns(columns, parquet.schema_arrow.names, table.keys, path)
            for column in columns if table.only_text else ():
                kind = parquet.schema_arrow.field(column).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise bad_file(describe_no_text(column, str(kind)), path, key=table.keys.get(column, ""))
            num_read = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=list(columns)):
                yield from _batch_records(batch, columns, num_read, file)
                num_read += batch.num_rows
                file.share_read = num_read / parquet.metadata.num_rows
    except pa.ArrowException as error:
        raise bad_file(f"not a readable Parquet file: {error}", path) from error


def _batch_records(batch: Any, columns: Sequence[str], num_before: int, file: TextFile) -> Iterator[Record]:
    """Parquet's strings are UTF-8, but not every program that writes them sees to it."""
    bad_rows: set[int] = set()
    lists = []
    for column in columns:
        try:
            lists.append(batch.column(column).to_pylist())
        except UnicodeDecodeError:
            lists.append(_repaired(batch.column(column), column, num_before, file, bad_rows))
    for row, values in enumerate(zip(*lists, strict=True), start=num_before + 1):
        yield values, row, row if row in bad_rows else 0


def _repaired(column: Any, name: str, num_before: int, file: TextFile, bad_rows: set[int]) -> list[str | None]:
    import pyarrow as pa

    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    texts: list[str | None] = []
    for row, data in enumerate(column.cast(pa.large_binary()).to_pylist(), start=num_before + 1):
        text = None if data is None else data.decode("utf-8", MARKING)
        if text is not None and MARK.search(text):
            if file.is_strict:
                message = f"column {name!r} holds bytes that are not UTF-8; write the file anew"
                raise bad_file(message, file.path, row)
            bad_rows.add(row)
            text = MARK.sub(REPLACEMENT_CHARACTER, text)
        texts.append(text)
    return texts


_FORMATS: dict[FormatName, Callable[[TextFile, Sequence[str], TableSettings], Iterator[Record]]] = {
    "txt": _read_txt,
    "jsonl": _read_json_lines,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "conll": _read_conll,
    "conllu": _read_conllu,
}
_DELIMITED = ("txt", "csv", "tsv")
_DELIMITERS: dict[FormatName, str] = {"txt": "\t", "csv": ",", "tsv": "\t"}
_OF_WORDS = ("conll", "conllu")
assert set(_FORMATS) == set(get_args(FormatName))


def column_names(file: TextFile, form: FormatName, table: TableSettings) -> list[str] | None:
    """The names of all columns of a file; None: each row has its own (.jsonl). The file is one that `read_table` has
    found a row in."""
    if form == "jsonl":
        return None
    if form == "parquet":
        import pyarrow.parquet as pq

        return list(pq.read_schema(file.path).names)
    if not is_table(form, table):
        return [table.text_column]
    if table.column_names is not None:
        return list(table.column_names)
    if form == "conllu":
        return CONLLU_COLUMNS
    with Lines(file) as lines:
        if form == "conll":
            words = (line for line in lines if line.strip(" \t\r\n") and not line.startswith("-DOCSTART-"))
            return _conll_names(len(_fields(next(words, ""))), table)
        dialect: dict[str, Any] = {"delimiter": table.delimiter or _DELIMITERS[form]}
        if form != "csv":
            dialect["quoting"] = csv.QUOTE_NONE
        return next(csv.reader(lines, **dialect), [])


# ------------------------------------------------------------------------------------------------------- names of files

_COMPRESSED = f"all but .parquet may be compressed ({', '.join(COMPRESSIONS)})"
SUFFIXES = f"{', '.join(_SUFFIXES)}; {_COMPRESSED}"
"""What can be read as documents, for people."""
TABLE_SUFFIXES = f"{', '.join(_SUFFIXES | _TOKEN_SUFFIXES)}; {_COMPRESSED}"
"""What can be read as rows, for people."""


def format_of(path: Path, rows: bool = False) -> FormatName | None:
    """The format that the suffix tells; None: none that can be read as documents, or as `rows`."""
    form = (_SUFFIXES | _TOKEN_SUFFIXES if rows else _SUFFIXES).get(suffixes(path)[0])
    return None if form == "parquet" and suffixes(path)[1] else form


def describe_unsupported(path: Path, rows: bool = False) -> str:
    if suffixes(path)[0] == ".parquet":
        return "Parquet compresses its columns itself; unpack the file, and name it .parquet"
    return f"unsupported suffix; use one of {TABLE_SUFFIXES if rows else SUFFIXES}, or set format"


def needs_pyarrow(path: Path, form: FormatName | None = None) -> bool:
    """Whether the file can be read only where pyarrow is installed, which a client may lack. `form`: its format, where
    the suffix does not tell."""
    return form == "parquet" or bool({".parquet", ".zst"}.intersection(suffixes(path)))
