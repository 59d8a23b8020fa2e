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
    key: str

    @property
    def names(self) -> list[str]:
        return [name for name in (self.text, self.pair, self.label) if name is not None]


class LabelledRow(NamedTuple):
    """A row of a source."""

    row: Row
    columns: Columns

    @property
    def text(self) -> Any:
        return self.row.values[self.columns.text]

    @property
    def pair(self) -> Any:
        return self.row.values[self.columns.pair] if self.columns.pair is not None else None

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
        """The samples of each row of one source. Raises InputError for a bad row."""
        ...
