"""One source of rows of the config, ready to be read as often as is needed; the counterpart of `CorpusSource`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from distlm.data.corpus import file_states, settings_of
from distlm.data.lines import status
from distlm.data.readers import Piece
from distlm.data.row_encoder import Columns, LabelledRow
from distlm.data.rows import label_column, read_rows, text_columns
from distlm.data.sources import LocalTable, Source, UndecodableCount, files_of, source_name
from distlm.errors import InputError


class RowSource:
    """The rows of a source, with the columns that a task with labels reads."""

    def __init__(
        self, key: str, source: Source, local: LocalTable, identity: list[Any] | None = None, **facts: Any
    ) -> None:
        """`identity` tells the content from other content; None: files with sizes and times of change do. `facts` are
        told beside the settings."""
        self.key = key
        self.name = source_name(source)
        self.columns = Columns(text_columns(source)[0], source.text_pair_column, label_column(source), key)
        columns = {"text_pair_column": self.columns.pair, "label_column": self.columns.label}
        self.settings = settings_of(source) | columns | facts
        self._local = local
        self._files = files_of(local, rows=True)
        sizes = [status(file).st_size for file in self._files]
        self.size = {"num_files": len(sizes), "num_file_bytes": sum(sizes)}
        self._is_fixed = identity is not None
        self.identity = [self.settings, identity or file_states(self._files)]
        self.undecodable = UndecodableCount()

    def check_unchanged(self) -> None:
        """Raises InputError if a file changed since this object was made."""
        if not self._is_fixed and self.identity[1] != file_states(files_of(self._local, rows=True)):
            raise InputError("a file of the data changed while it was read; try again when nothing writes to it")

    def rows(self) -> Iterator[LabelledRow]:
        """All rows from the first on. Raises InputError for a file that is not what it should be, or where too many
        rows hold bytes that are not in its encoding."""
        self.undecodable = UndecodableCount()
        try:
            for row in read_rows(self._local, self.columns.names, self._files):
                self.undecodable.add(Piece("", True, row.undecodable_at))
                yield LabelledRow(row, self.columns)
        except InputError as error:
            named = (replace(p, key=f"{self.key}.{p.key}") if p.key else p for p in error.problems)
            raise InputError(*named) from error
        encoding = getattr(self._local, "encoding", None)
        if encoding is not None and (problems := self.undecodable.problems(encoding)):
            raise InputError(*(replace(problem, key=f"{self.key}.encoding") for problem in problems))
