"""Samples of different lengths with labels: the file that holds them, and batches of them. numpy and pyarrow only.

The file is an Arrow IPC stream with one row for each sample:

    input_ids        list of int32, special tokens included, no padding
    token_type_ids   list of int8, as long; only where the model is given some
    labels           list: of int32, one id (text) or one for each token; of float32, one for each label or one number
    rows             list of int64, numbers of the rows of the data that the sample is made of: one for each label that
                     is not IGNORED, or one for all

B samples, S tokens of the longest of them, or of what a batch is padded to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distlm.data.pack import END_OF_STREAM

IGNORED = -100
"""Label of a token that is not predicted, as everywhere in transformers."""

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Samples:
    """Some samples, each an array of its own."""

    input_ids: list[Ids]
    token_type_ids: list[Ids] | None
    labels: list[NDArray[Any]]
    rows: list[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.input_ids)

    def padded_length(self, max_seq_length: int) -> int:
        """Tokens that each is padded to, side by side."""
        longest = max(map(len, self.input_ids), default=0)
        return min(int(round_up(longest)), max(longest, max_seq_length))


def sample_schema(has_token_types: bool, label_type: pa.DataType) -> pa.Schema:
    """`label_type`: int32 or float32."""
    fields = [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(label_type)), ("rows", pa.list_(pa.int64()))]
    return pa.schema([*fields, ("token_type_ids", pa.list_(pa.int8()))] if has_token_types else fields)


class SampleWriter:
    """Writes a file of samples; memory is that of one record batch."""

    _SAMPLES_PER_BATCH = 4096

    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        self._file, self._schema = file, schema
        self._columns: dict[str, list[Any]] = {name: [] for name in schema.names}
        file.write(schema.serialize())

    def add(
        self, input_ids: Sequence[int], labels: Sequence[Any], rows: Sequence[int], token_type_ids: Sequence[int]
    ) -> None:
        values = {"input_ids": input_ids, "labels": labels, "rows": rows, "token_type_ids": token_type_ids}
        for name, column in self._columns.items():
            column.append(values[name])
        if len(self._columns["rows"]) == self._SAMPLES_PER_BATCH:
            self._flush()

    def close(self) -> None:
        if self._columns["rows"]:
            self._flush()
        self._file.write(END_OF_STREAM)

    def _flush(self) -> None:
        self._file.write(pa.record_batch(self._columns, schema=self._schema).serialize())
        self._columns = {name: [] for name in self._schema.names}


class SampleDataset:
    """The samples of one or several files, one after the other, memory-mapped."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.sizes: list[int] = []
        """Samples in each file."""
        self._batches: list[dict[str, tuple[NDArray[Any], NDArray[Any]]]] = []
        for path in paths:
            size = 0
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    self._batches.append({name: _ragged(batch[name]) for name in batch.schema.names})
                    size += batch.num_rows
            self.sizes.append(size)
        self._sizes = [len(lists["input_ids"][1]) - 1 for lists in self._batches]
        self._ends = np.cumsum(self._sizes, dtype=np.int64)
        lengths = [np.diff(lists["input_ids"][1]) for lists in self._batches]
        self.lengths: NDArray[np.int32] = np.concatenate(lengths).astype(np.int32) if lengths else np.zeros(0, np.int32)
        """Tokens of each sample."""

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, indices: NDArray[np.int64]) -> Samples:
        """Raises IndexError outside [0, len)."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"sample indices must be in [0, {len(self)})")
        batches = np.searchsorted(self._ends, indices, side="right").tolist()
        places = [
            (number, int(index - (self._ends[number] - self._sizes[number])))
            for number, index in zip(batches, indices, strict=True)
        ]

        def column(name: str) -> list[NDArray[Any]]:
            found = []
            for number, place in places:
                values, offsets = self._batches[number][name]
                found.append(values[offsets[place] : offsets[place + 1]])
            return found

        has_types = bool(self._batches) and "token_type_ids" in self._batches[0]
        return Samples(
            input_ids=column("input_ids"),
            token_type_ids=column("token_type_ids") if has_types else None,
            labels=column("labels"),
            rows=column("rows"),
        )


def _ragged(column: pa.ListArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """(values, offsets) of a list column, without a copy."""
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy()


def round_up(lengths: Any) -> Any:
    """Lengths of batches, of which there are so only few: any up to 16, then 8 from each power of two to the next, so
    that a twenty-fifth is added on average.

    oneDNN makes kernels for each length that it meets and keeps the newest thousand: with all lengths, making them
    takes up to a tenth of a step's time, and they up to 0.8 GiB.
    """
    power = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    multiple = 2 ** np.maximum(power - 4, 0)
    return -(-lengths // multiple) * multiple


def pad(
    sequences: Iterable[NDArray[Any]], value: float, dtype: Any = np.int64, length: int | None = None
) -> NDArray[Any]:
    """Sequences side by side, [B, S], filled up at their ends with `value`; S is `length`, or that of the longest."""
    sequences = list(sequences)
    padded = np.full((len(sequences), length or max(map(len, sequences), default=0)), value, dtype)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded
