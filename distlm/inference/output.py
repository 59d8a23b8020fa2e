"""Files of predictions: the rows of the input with columns added, in the format that the suffix tells."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from distlm.data.rows import Row
from distlm.errors import InputError, Problem

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
WORD_SUFFIX = ".conll"
"""Only where each word has a label."""


class Columns(NamedTuple):
    """The columns of a file of predictions."""

    of_input: list[str]
    predicted: dict[str, str]
    """What is predicted -> the name of its column."""
    text: str
    """The column of the input that holds the text, or the words."""
    separator: str | None = None
    """Between the items of a list in a table of text; None: lists are written as JSON."""


def column_for(what: str, taken: Iterable[str]) -> str:
    """The name of a predicted column: `what`, or predicted_WHAT where the input has a column of that name."""
    names = set(taken)
    while what in names:
        what = f"predicted_{what}"
    return what


def check_output(path: Path, has_words: bool) -> None:
    """Raises InputError for a name that no predictions can be written under."""
    allowed = (*SUFFIXES, WORD_SUFFIX) if has_words else SUFFIXES
    if path.suffix not in allowed:
        message = f"unsupported suffix; use one of {', '.join(allowed)}"
        if path.suffix == WORD_SUFFIX:
            message += "; .conll is for labels of words (task token-classification)"
        raise InputError(Problem(message, "--out", str(path)))
    if path.is_dir():
        raise InputError(Problem("is a folder; name a file", "--out", str(path)))
    if not path.parent.is_dir():
        raise InputError(Problem(f"the folder {path.parent} does not exist", "--out", str(path)))


def check_row(row: Row, path: Path, columns: Columns) -> None:
    """Raises InputError for a row that the format cannot hold, with file and line."""
    if path.suffix == ".tsv":
        texts = [_cell(value, columns.separator) for value in row.values.values()]
        kind, holds = "a line of .tsv", "a tab or a line end"
    elif path.suffix == WORD_SUFFIX:
        texts = [field for word in _word_fields(row.values, columns) for field in word]
        kind, holds = "a field of .conll", "a tab or a line end"
    else:
        return
    if any(letter in text for text in texts for letter in "\t\r\n"):
        raise InputError(Problem(f"the row holds {holds}, which {kind} cannot; use --out FILE.jsonl",
                                 location=row.place))  # fmt: skip


def write_predictions(
    path: Path, columns: Columns, rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], schema: Any = None
) -> None:
    """Write the file, which appears whole or not at all.

    Args:
        rows: values of the input, and what is predicted.
        schema: of an input in Parquet, whose columns keep their types.

    Raises InputError where a column cannot be written in that format.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    named = (
        (values, {columns.predicted[what]: value for what, value in predicted.items()}) for values, predicted in rows
    )
    try:
        if path.suffix == ".parquet":
            _write_parquet(temporary, columns, named, schema)
        else:
            # Half a surrogate pair, which a column of JSON may hold, becomes \\udXXX, as JSON spells it.
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                _write_text(file, path.suffix, columns, named)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


NamedRows = Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _write_text(file: IO[str], suffix: str, columns: Columns, rows: NamedRows) -> None:
    if suffix == ".jsonl":
        for values, predicted in rows:
            file.write(json.dumps({**values, **predicted}, ensure_ascii=False, default=str) + "\n")
    elif suffix == WORD_SUFFIX:
        _write_conll(file, columns, rows)
    else:
        header = [*columns.of_input, *columns.predicted.values()]
        records = (
            [_cell({**values, **predicted}.get(name), columns.separator) for name in header]
            for values, predicted in rows
        )
        if suffix == ".csv":
            csv.writer(file, lineterminator="\n").writerows(chain([header], records))
        else:  # no quotes: a line is a row
            file.writelines("\t".join(record) + "\n" for record in chain([header], records))


def _write_conll(file: IO[str], columns: Columns, rows: NamedRows) -> None:
    """A line for each word: its fields in the input, if that has some, and the predicted label last."""
    (label_column,) = columns.predicted.values()
    for values, predicted in rows:
        words = zip(_word_fields(values, columns), predicted[label_column], strict=True)
        file.writelines("\t".join([*fields, label]) + "\n" for fields, label in words)
        file.write("\n")


def _word_fields(values: Mapping[str, Any], columns: Columns) -> list[list[str]]:
    """The fields of each word: the word, and what other columns have for it, in their order."""
    words = _words(values[columns.text])
    fields = [
        words if name == columns.text else [str(field) for field in value]
        for name, value in values.items()
        if name == columns.text or (isinstance(value, list) and len(value) == len(words))
    ]
    return [list(of_word) for of_word in zip(*fields, strict=True)]


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else [str(word) for word in value or []]


def _cell(value: Any, separator: str | None) -> str:
    """A value in a table of text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and separator is not None and all(_can_be_joined(item, separator) for item in value):
        return separator.join(value)
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _can_be_joined(item: Any, separator: str) -> bool:
    """Whether it can be told apart again."""
    return (
        isinstance(item, str) and item != "" and separator not in item and (separator != " " or len(item.split()) == 1)
    )


def _write_parquet(path: Path, columns: Columns, rows: NamedRows, schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def tables() -> Iterator[Any]:
        for some in _batched(rows, 1024):
            mine = [{name: values.get(name) for name in columns.of_input} for values, _ in some]
            table = pa.Table.from_pylist(mine, schema=schema)
            added = pa.Table.from_pylist([dict(predicted) for _, predicted in some])
            for name in columns.predicted.values():
                table = table.append_column(name, added[name])
            yield table

    try:
        pq.write_table(pa.concat_tables(tables(), promote_options="permissive"), path)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        reason = " ".join(str(error).split())
        message = f"the columns cannot be written as Parquet ({reason}); use --out FILE.jsonl"
        raise InputError(Problem(message, "--out")) from error


def _batched(rows: NamedRows, size: int) -> Iterator[Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    some = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
