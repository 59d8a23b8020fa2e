"""Arguments of commands that read tables: what their columns are called. The control plane and the data plane parse
the same ones."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Self


@dataclass(frozen=True)
class TableArguments:
    """What the command line says about tables; None: as in the run's first training source, or as the file says."""

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    column_names: str | None = None
    """Separated by commas."""
    delimiter: str | None = None
    encoding: str | None = None
    format: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        return cls(**{field.name: getattr(options, field.name, None) for field in fields(cls)})

    def as_arguments(self) -> list[str]:
        """As they are written on a command line."""
        return [f"{option(name)}={value}" for name, value in asdict(self).items() if value is not None]


def option(name: str) -> str:
    """The spelling of an argument on the command line."""
    return f"--{name.replace('_', '-')}"


def add_table_arguments(parser: argparse.ArgumentParser, *, with_labels: bool) -> None:
    group = parser.add_argument_group("columns", "By default those of the run's first training source.")
    group.add_argument("--text-column", metavar="NAME", help="column that holds the text, or the words")
    group.add_argument("--text-pair-column", metavar="NAME", help="column that holds the second text of a pair")
    if with_labels:
        group.add_argument("--label-column", metavar="NAME", help="column that holds the label, or the labels")
    group.add_argument("--column-names", metavar="A,B,C", help="names of all columns, of a table without a header")
    group.add_argument("--delimiter", metavar="CHAR", help="between the fields of .csv, .tsv and .txt")
    group.add_argument("--encoding", metavar="NAME", help="encoding of the text, such as latin-1 (default: utf-8)")
    group.add_argument(
        "--format", choices=("txt", "jsonl", "csv", "tsv", "parquet", "conll", "conllu"),
        help="format of the input (default: what its suffix tells)",
    )  # fmt: skip
