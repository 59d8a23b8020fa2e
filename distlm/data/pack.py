"""Blocks of token ids: how documents fill them, and the file that holds them.

A block is [CLS] body [SEP], all blocks of a file of the same length. The bodies, one after the other, are the tokens of
the documents with one separator [SEP] between two documents; documents flow over the borders of blocks. That is the
FULL-SENTENCES packing of RoBERTa (Liu et al. 2019), and it wastes next to nothing: only the last block of each chunk
(see distlm.data.parallel) is padded.

The file is an Arrow IPC stream, so `datasets.Dataset.from_file` opens it too: a schema, record batches, an end mark,
each a message of its own, so that batches which were written by several processes need only be joined. Its one column
`input_ids` is a fixed-size list of uint16, or int32 where the vocabulary needs it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_BATCH_BYTES = 4 * 2**20

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class SpecialIds(Protocol):
    """What of a Hugging Face tokenizer decides the layout."""

    cls_token_id: int | None
    sep_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class BlockLayout:
    """Where things stand in a block of `length` ids.

    `first` opens each block; `separator` ends it and stands between documents. A tokenizer that has neither [CLS] nor a
    token for the beginning of a text has no `first`, and so for `separator`.
    """

    length: int
    first: int | None
    separator: int | None
    pad: int
    vocab_size: int
    unknown: int | None = None

    @classmethod
    def of(cls, tokenizer: SpecialIds, max_seq_length: int) -> BlockLayout:
        """The layout for a tokenizer; GPT's bos and eos stand in for BERT's [CLS] and [SEP]."""
        assert tokenizer.pad_token_id is not None
        return cls(
            length=max_seq_length,
            first=tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id,
            separator=tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id,
            pad=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            unknown=tokenizer.unk_token_id,
        )

    @property
    def body(self) -> slice:
        """The part of a block that holds the text."""
        return slice(0 if self.first is None else 1, self.length - (0 if self.separator is None else 1))

    @property
    def body_length(self) -> int:
        return self.body.stop - self.body.start

    @property
    def dtype(self) -> np.dtype[np.uint16] | np.dtype[np.int32]:
        return np.dtype(np.uint16) if self.vocab_size <= 2**16 else np.dtype(np.int32)

    @property
    def schema(self) -> pa.Schema:
        item = pa.from_numpy_dtype(self.dtype)
        return pa.schema([pa.field("input_ids", pa.list_(item, self.length), nullable=False)])

    @property
    def blocks_per_batch(self) -> int:
        return max(1, _BATCH_BYTES // (self.length * self.dtype.itemsize))


class BlockWriter:
    """Packs documents into record batches, which it appends to a file; memory is that of a few of them.

    The file's schema and end mark are its owner's. `close` pads the last block; `num_tokens` (special tokens included,
    padding not), `num_unknown_tokens` and `num_blocks` are complete then.
    """

    def __init__(self, file: IO[bytes], layout: BlockLayout) -> None:
        self.num_tokens = 0
        self.num_unknown_tokens = 0
        self.num_blocks = 0
        self._file = file
        self._layout = layout
        self._schema = layout.schema
        self._pending = array("i")
        self._is_separator_due = False
        self._body_tokens_per_batch = layout.blocks_per_batch * layout.body_length

    def add(self, ids: list[int], ends_document: bool = True) -> None:
        """Append the ids of a document, or of a part of it. No separator is written for a document without ids."""
        if ids:
            if self._is_separator_due and self._layout.separator is not None:
                self._pending.append(self._layout.separator)
            self._is_separator_due = False
            self._pending.extend(ids)
        if ends_document and (self._pending or self.num_blocks):
            self._is_separator_due = True
        while len(self._pending) >= self._body_tokens_per_batch:
            self._write(self._pending[: self._body_tokens_per_batch])
            del self._pending[: self._body_tokens_per_batch]

    def close(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = array("i")

    def _write(self, body_tokens: array[int]) -> None:
        """One record batch. Only the last batch may hold a number of tokens that does not fill its blocks."""
        layout = self._layout
        num_blocks = -(-len(body_tokens) // layout.body_length)
        num_missing = num_blocks * layout.body_length - len(body_tokens)
        blocks = np.full((num_blocks, layout.length), layout.pad, layout.dtype)
        if layout.first is not None:
            blocks[:, 0] = layout.first
        body = np.full(num_blocks * layout.body_length, layout.pad, layout.dtype)
        body[: len(body_tokens)] = body_tokens
        blocks[:, layout.body] = body.reshape(num_blocks, layout.body_length)
        if layout.separator is not None:
            blocks[:, -1] = layout.separator
            if num_missing:
                blocks[-1, -1] = layout.pad
                blocks[-1, -1 - num_missing] = layout.separator
        column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), layout.length)
        self._file.write(pa.record_batch([column], schema=self._schema).serialize())
        self.num_tokens += blocks.size - num_missing
        self.num_unknown_tokens += int((body == layout.unknown).sum()) if layout.unknown is not None else 0
        self.num_blocks += num_blocks


class PackedDataset:
    """The blocks of one or several files, one after the other, memory-mapped: opening reads the headers of the record
    batches, and a block is read from disk when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.sizes: list[int] = []
        """Blocks in each file."""
        self._batches: list[NDArray[np.uint16] | NDArray[np.int32]] = []
        for path in paths:
            first_batch = len(self._batches)
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                self.max_seq_length: int = stream.schema.field("input_ids").type.list_size
                for batch in stream:
                    ids = batch.column(0).flatten().to_numpy(zero_copy_only=True)
                    self._batches.append(ids.reshape(-1, self.max_seq_length))
            self.sizes.append(sum(map(len, self._batches[first_batch:])))
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The blocks of these indices, [n] -> [n, max_seq_length]. Raises IndexError outside [0, len)."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"block indices must be in [0, {len(self)})")
        blocks = np.empty((len(indices), self.max_seq_length), np.int64)
        batches = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(batches):
            chosen = batches == number
            batch = self._batches[number]
            blocks[chosen] = batch[indices[chosen] - (self._ends[number] - len(batch))]
        return blocks
