"""Chunks of documents to packed blocks, in several processes, in order, in bounded memory.

    reader (this process) --Chunk--> pack_chunk in any process --Parts--> joined in the order of the chunks

What a chunk becomes depends on nothing but the chunk and the tokenizer, so the result is the same for every number of
processes. Not transformers but the tokenizer's JSON goes to the processes, which makes them small and quick to start.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import types
from array import array
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

from distlm.data.encode import Encoder
from distlm.data.pack import BlockLayout, BlockWriter
from distlm.errors import InfrastructureError
from distlm.processes import end_with_parent


class Entry(NamedTuple):
    """A document of a chunk, or a part of one that is very long."""

    target: str
    """Name of the blocks that it goes to."""
    text: str
    starts_document: bool
    ends_document: bool


@dataclass(frozen=True)
class Chunk:
    """What is tokenized and packed in one go."""

    number: int
    entries: list[Entry]
    is_full: bool
    """Its size is that of most chunks; the last one of a source is smaller."""


@dataclass
class Totals:
    """Counts of what became blocks; they add up."""

    num_documents: int = 0
    """Documents with text."""
    num_empty_documents: int = 0
    """Documents that gave no token."""
    num_text_bytes: int = 0
    """Size of the text in UTF-8."""
    num_tokens: int = 0
    """Tokens in all blocks, special tokens included, padding not."""
    num_unknown_tokens: int = 0
    """Tokens that stand for text which the tokenizer does not know."""
    num_blocks: int = 0

    def __add__(self, other: Totals) -> Self:
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Totals)))


@dataclass(frozen=True)
class Part:
    """The blocks that a chunk gave to one target."""

    path: Path
    """File of record batches, without schema and end mark."""
    totals: Totals
    sha256: str
    """Of the texts and their lengths."""


@dataclass(frozen=True)
class Packing:
    """How chunks are packed, and the folder for the parts."""

    tokenizer_json: str
    layout: BlockLayout
    folder: Path

    def pack(self, chunk: Chunk, encoder: Encoder) -> dict[str, Part]:
        """Tokenize and pack a chunk: a part for each target it has entries for."""
        with ExitStack() as files:
            parts: dict[str, _PartWriter] = {}
            for target in dict.fromkeys(entry.target for entry in chunk.entries):
                path = self.folder / f"part-{chunk.number:08d}-{target}"
                parts[target] = _PartWriter(path, files.enter_context(open(path, "wb")), self.layout)
            entries = iter(chunk.entries)
            entry, has_ids = None, False
            for ids, ends_text in encoder.ids(entry.text for entry in chunk.entries):
                entry = entry or next(entries)
                has_ids |= bool(ids)
                parts[entry.target].writer.add(ids, ends_text and entry.ends_document)
                if ends_text:
                    parts[entry.target].count(entry, has_ids)
                    entry, has_ids = None, False
            return {
                target: part.close([entry.text for entry in chunk.entries if entry.target == target])
                for target, part in parts.items()
            }


class _PartWriter:
    def __init__(self, path: Path, file: object, layout: BlockLayout) -> None:
        self.writer = BlockWriter(file, layout)  # type: ignore[arg-type]
        self._path = path
        self._totals = Totals()

    def count(self, entry: Entry, has_ids: bool) -> None:
        if entry.ends_document:
            is_empty = entry.starts_document and not has_ids
            self._totals.num_documents += not is_empty
            self._totals.num_empty_documents += is_empty

    def close(self, texts: list[str]) -> Part:
        self.writer.close()
        data = "".join(texts).encode()
        digest = hashlib.sha256(array("Q", map(len, texts)).tobytes() + data).hexdigest()
        self._totals.num_text_bytes = len(data)
        self._totals.num_tokens = self.writer.num_tokens
        self._totals.num_unknown_tokens = self.writer.num_unknown_tokens
        self._totals.num_blocks = self.writer.num_blocks
        return Part(self._path, self._totals, digest)


# --------------------------------------------------------------------------------------------------------- in processes


def pack_in_order(
    chunks: Iterator[Chunk], packing: Packing, num_proc: int
) -> Generator[tuple[Chunk, dict[str, Part]], None, None]:
    """Each chunk, in its order, with its parts. At most num_proc + 2 chunks are in memory.

    Processes are started for the first full chunk; what is less is packed in this one. Raises InfrastructureError where
    one of them is killed.
    """
    pending: deque[tuple[Chunk, Future[dict[str, Part]]]] = deque()
    pool: ProcessPoolExecutor | None = None
    encoder = Encoder(packing.tokenizer_json)
    try:
        for chunk in chunks:
            if pool is None and not chunk.is_full:
                yield chunk, packing.pack(chunk, encoder)
                continue
            pool = pool or _start_pool(packing, num_proc)
            with _without_main_module():
                pending.append((chunk, pool.submit(_pack_here, chunk)))
            if len(pending) >= num_proc + 2:
                yield _result(pending)
        while pending:
            yield _result(pending)
    except BrokenProcessPool as error:
        message = (
            "a process that tokenizes was killed, perhaps for want of memory; lower data.num_proc and resume the run, "
            "which goes on where it stopped"
        )
        raise InfrastructureError(message) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _result(pending: deque[tuple[Chunk, Future[dict[str, Part]]]]) -> tuple[Chunk, dict[str, Part]]:
    chunk, future = pending.popleft()
    return chunk, future.result()


def _start_pool(packing: Packing, num_proc: int) -> ProcessPoolExecutor:
    # A server without threads forks the processes: this one may have threads, and Ray's and the tokenizer's libraries.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(num_proc, context, _begin, (packing,))


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes that begin here do not import this program's main module, which they have no use for: in a Ray task it
    is Ray's, and takes a second and 100 MB."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_packing: Packing
_encoder: Encoder


def _begin(packing: Packing) -> None:
    """In a new process: what all chunks need, one thread, and an end as soon as the parent has ended, however."""
    global _packing, _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _packing, _encoder = packing, Encoder(packing.tokenizer_json)
    end_with_parent()


def _pack_here(chunk: Chunk) -> dict[str, Part]:
    return _packing.pack(chunk, _encoder)
