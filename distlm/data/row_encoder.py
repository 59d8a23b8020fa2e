"""The interface between the preparation of labelled data and the kinds of rows: texts or words, with their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from distlm.data.labels import LabelInfo
from distlm.data.rows import Row
from distlm.errors import InputError, Problem


@dataclass(frozen=True)
class Columns:
    """Where a source has what a task reads, and the config key of that source."""

    text: str
    pair: str | None
    label: str
    document: str | None
    """What tells the documents that rows belong to apart; None: nothing does."""
    key: str


class LabelledRow(NamedTuple):
    """A row of a source."""

    row: Row
    columns: Columns
    number: int
    """In its split, from 0."""

    @property
    def text(self) -> Any:
        return self.row.values[self.columns.text]

    @property
    def pair(self) -> Any:
        return self.row.values[self.columns.pair] if self.columns.pair is not None else None

    @property
    def document(self) -> Any:
        return self.row.values[self.columns.document] if self.columns.document is not None else None

    @property
    def label(self) -> Any:
        return self.row.values[self.columns.label]

    def problem(self, message: str, column: str) -> InputError:
        """An error about the row; `column`: text, text_pair or label."""
        return InputError(Problem(message, f"{self.columns.key}.{column}_column", location=self.row.place))


class Sample(NamedTuple):
    """One row of the file of samples, see `distlm.data.samples`."""

    input_ids: Sequence[int]
    token_type_ids: Sequence[int]
    labels: Sequence[Any]
    rows: Sequence[int]
    """Numbers of the rows that the labels are of: one for each label, or for all."""
    num_unknown_tokens: int


@dataclass
class RowCounts:
    """What the rows of a source had that their owner should know."""

    num_truncated_documents: int = 0
    """Texts that were longer than a sample, and were cut."""
    num_divided_documents: int = 0
    """Texts that were longer than a sample, and became several."""
    num_unknown_labels: int = 0
    """Labels of held-out rows that the training data has not."""
    num_illformed_tags: int = 0
    """Tags that cannot follow the one before, read as the beginning of an entity."""


class RowEncoder(Protocol):
    """Makes samples of rows."""

    label_type: pa.DataType
    """Of an element of a sample's labels."""
    has_token_types: bool

    def learn(self, training_rows: Callable[[], Iterator[LabelledRow]]) -> LabelInfo:
        """Find the labels to know; to be called before `encode`. The result's names grow while rows are encoded."""
        ...

    def words(self, row: LabelledRow) -> str:
        """The text of a row as one string, to be counted and compared. Raises InputError where it is none."""
        ...

    def encode(self, rows: list[LabelledRow], counts: RowCounts, is_training: bool) -> Iterator[list[Sample]]:
        """For each row, of one source, the samples that are complete with it; all of them with the last one. Raises
        InputError for a bad row."""
        ...
