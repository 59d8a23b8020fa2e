"""From sources to blocks on disk, once: the tokenizer and the packed data of a run, in a cache that runs share.

    CACHE/tokenizer-FINGERPRINT/     what `AutoTokenizer.from_pretrained` loads
    CACHE/data-FINGERPRINT/          train.arrow, validation.arrow, info.json

A fingerprint covers everything that the content depends on: path, size and time of change of each file, the settings,
the tokenizer's content and `_FORMAT_VERSION`. A folder appears complete, by a rename; of two processes that prepare the
same, the slower one discards its work.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from distlm.data.order import uniform
from distlm.data.pack import BlockLayout, BlockWriter
from distlm.data.sources import Source, documents, files_of
from distlm.data.tokenize import load_tokenizer, token_ids, tokenizer_digest, train_tokenizer
from distlm.errors import InputError, Problem
from distlm.run_folder import read_json, write_json

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LOCK = "lock"
_VALIDATION_STREAM = 1_000_001  # of order.uniform: which documents are held out


class TrainedTokenizerConfig(Protocol):
    @property
    def vocab_size(self) -> int: ...
    @property
    def lowercase(self) -> bool: ...
    @property
    def max_documents(self) -> int | None: ...


class TokenizerConfig(Protocol):
    """Exactly one of the two is given."""

    @property
    def name_or_path(self) -> str | None: ...
    @property
    def train(self) -> TrainedTokenizerConfig | None: ...


class DataConfig(Protocol):
    @property
    def train(self) -> Sequence[Source]: ...
    @property
    def validation(self) -> Sequence[Source]: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def max_seq_length(self) -> int: ...


@dataclass(frozen=True)
class SplitInfo:
    """What one file of blocks was made of."""

    num_documents: int
    """Documents with text."""
    num_empty_documents: int
    """Documents that gave no token."""
    num_text_bytes: int
    """Size of the text in UTF-8."""
    num_tokens: int
    """Tokens in all blocks, special tokens included, padding not."""
    num_blocks: int
    content_sha256: str
    """Over the documents, in their order."""


@dataclass(frozen=True)
class DataInfo:
    """info.json: what was prepared, from what."""

    format_version: int
    fingerprint: str
    train: SplitInfo
    validation: SplitInfo | None
    tokenizer_fingerprint: str
    vocab_size: int
    max_seq_length: int
    sources: dict[str, list[dict[str, Any]]]
    """Settings of the sources of each split."""
    seconds: float
    """Time that reading, tokenizing and packing took."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DataInfo:
        validation = SplitInfo(**data["validation"]) if data["validation"] else None
        return cls(**{**data, "train": SplitInfo(**data["train"]), "validation": validation})


@dataclass(frozen=True)
class PreparedData:
    """Where the prepared data of a run is."""

    tokenizer_path: Path
    train_path: Path
    validation_path: Path | None
    info: DataInfo
    cached: bool
    """Nothing was tokenized: the data was there."""


def prepare_data(data: DataConfig, tokenizer_config: TokenizerConfig, cache: Path) -> PreparedData:
    """Train or load the tokenizer, tokenize and pack the sources; each step only if the cache lacks its result.

    Where there are no validation sources, each training document is held out with probability `validation_fraction`, by
    its number alone, whatever the seed of the run. Raises InputError where a source or the tokenizer is bad, or where
    there is too little text.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    train, validation = _Corpus(data.train), _Corpus(data.validation)
    fraction = 0.0 if data.validation else data.validation_fraction
    tokenizer, tokenizer_path = _prepare_tokenizer(train, data.max_seq_length, tokenizer_config, cache)
    layout = BlockLayout.of(tokenizer, data.max_seq_length)
    digest = tokenizer_digest(tokenizer)
    fingerprint = _fingerprint(train.identity, validation.identity, fraction, data.max_seq_length, digest)

    def write(folder: Path) -> None:
        begin = time.monotonic()
        train_info, validation_info = _pack(train, validation, fraction, tokenizer, layout, folder)
        _check_amount(train_info, validation_info, data)
        train.check_unchanged()
        validation.check_unchanged()
        info = DataInfo(
            format_version=_FORMAT_VERSION,
            fingerprint=fingerprint,
            train=train_info,
            validation=validation_info,
            tokenizer_fingerprint=digest,
            vocab_size=len(tokenizer),
            max_seq_length=data.max_seq_length,
            sources={"train": train.settings, "validation": validation.settings},
            seconds=round(time.monotonic() - begin, 3),
        )
        write_json(folder / "info.json", asdict(info))

    folder = cache / f"data-{fingerprint}"
    was_written = _make_folder(folder, write)
    info = DataInfo.from_json(read_json(folder / "info.json"))
    return PreparedData(
        tokenizer_path=tokenizer_path,
        train_path=folder / "train.arrow",
        validation_path=folder / "validation.arrow" if info.validation else None,
        info=info,
        cached=not was_written,
    )


class _Corpus:
    """The documents of several sources, to be read again and again. Docstrings are parsed once and kept, since parsing
    them takes far longer than reading them, and what is installed fits into memory."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._docstrings: dict[int, list[str]] = {}
        self.settings = [_settings(source) for source in sources]
        self.identity = [_identity(source) for source in sources]
        """Settings and files with their sizes and times of change; another value means other documents."""

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._documents(number, source) for number, source in enumerate(self._sources))

    def _documents(self, number: int, source: Source) -> Iterable[str]:
        if source.source == "files":
            return documents(source)
        if number not in self._docstrings:
            self._docstrings[number] = list(documents(source))
        return self._docstrings[number]

    def check_unchanged(self) -> None:
        """Raises InputError if a file changed since this object was made: its text would go under a wrong name."""
        if self.identity != [_identity(source) for source in self._sources]:
            raise InputError("a file of the data changed while it was read; try again when nothing writes to it")


def _settings(source: Source) -> dict[str, Any]:
    settings: dict[str, Any] = {"source": source.source, "max_documents": source.max_documents}
    if source.source == "files":
        return settings | {"paths": source.paths, "text_column": source.text_column}
    return settings | {"packages": source.packages}


def _identity(source: Source) -> list[Any]:
    files = [(path.absolute(), path.stat()) for path in files_of(source)]
    return [_settings(source), [[str(path), status.st_size, status.st_mtime_ns] for path, status in files]]


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT_VERSION, *parts]).encode()).hexdigest()[:20]


def _prepare_tokenizer(
    corpus: _Corpus, max_seq_length: int, config: TokenizerConfig, cache: Path
) -> tuple[PreTrainedTokenizerFast, Path]:
    """The tokenizer and the folder of the cache that holds it."""
    if config.train is None:
        if config.name_or_path is None:
            raise InputError(Problem("give either name_or_path or train", "tokenizer"))
        tokenizer = load_tokenizer(config.name_or_path)
        folder = cache / f"tokenizer-{tokenizer_digest(tokenizer)[:20]}"
        _make_folder(folder, tokenizer.save_pretrained)
        return tokenizer, folder

    settings = config.train

    def train(temporary: Path) -> None:
        texts = islice(corpus, settings.max_documents)
        train_tokenizer(texts, settings.vocab_size, settings.lowercase, max_seq_length).save_pretrained(temporary)

    key = [settings.vocab_size, settings.lowercase, settings.max_documents, max_seq_length]
    folder = cache / f"tokenizer-{_fingerprint(corpus.identity, key)}"
    _make_folder(folder, train)
    return load_tokenizer(str(folder)), folder


class _Split:
    """One file of blocks in the making, and what goes into it."""

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self._num_documents = self._num_empty_documents = self._num_text_bytes = 0
        self._sha256 = hashlib.sha256()
        self._document_has_ids = False

    def count_text(self, document: str) -> None:
        data = document.encode()
        self._num_text_bytes += len(data)
        self._sha256.update(len(data).to_bytes(8, "little"))
        self._sha256.update(data)

    def add(self, ids: list[int], ends_document: bool) -> None:
        self._writer.add(ids, ends_document)
        self._document_has_ids |= bool(ids)
        if ends_document:
            self._num_documents += self._document_has_ids
            self._num_empty_documents += not self._document_has_ids
            self._document_has_ids = False

    def info(self) -> SplitInfo:
        """After the writer was closed."""
        return SplitInfo(
            num_documents=self._num_documents,
            num_empty_documents=self._num_empty_documents,
            num_text_bytes=self._num_text_bytes,
            num_tokens=self._writer.num_tokens,
            num_blocks=self._writer.num_blocks,
            content_sha256=self._sha256.hexdigest(),
        )


def _pack(
    train: _Corpus,
    validation: _Corpus,
    fraction: float,
    tokenizer: PreTrainedTokenizerFast,
    layout: BlockLayout,
    folder: Path,
) -> tuple[SplitInfo, SplitInfo | None]:
    """Write train.arrow and, where there are validation sources or a fraction is held out, validation.arrow."""
    with ExitStack() as files:
        train_split = _Split(files.enter_context(BlockWriter(folder / "train.arrow", layout)))
        if not validation.settings and not fraction:
            _pack_documents(train, repeat(train_split), tokenizer)
            validation_split = None
        else:
            validation_split = _Split(files.enter_context(BlockWriter(folder / "validation.arrow", layout)))
            held_out = _are_held_out(fraction)
            _pack_documents(train, (validation_split if held else train_split for held in held_out), tokenizer)
            _pack_documents(validation, repeat(validation_split), tokenizer)
    return train_split.info(), validation_split.info() if validation_split else None


def _pack_documents(corpus: _Corpus, splits: Iterable[_Split], tokenizer: PreTrainedTokenizerFast) -> None:
    """Each document goes to the split that stands at its place in `splits`."""
    being_tokenized: deque[_Split] = deque()

    def texts() -> Iterator[str]:
        for document, split in zip(corpus, splits, strict=False):
            split.count_text(document)
            being_tokenized.append(split)
            yield document

    for ids, ends_document in token_ids(tokenizer, texts()):
        being_tokenized[0].add(ids, ends_document)
        if ends_document:
            being_tokenized.popleft()


def _are_held_out(fraction: float) -> Iterator[bool]:
    """For document 0, 1, 2, ... whether it is held out for validation."""
    step = 4096
    for start in count(0, step):
        numbers = np.arange(start, start + step)
        yield from (uniform(0, 0, numbers, 0, stream=_VALIDATION_STREAM) < fraction).tolist()


def _check_amount(train: SplitInfo, validation: SplitInfo | None, data: DataConfig) -> None:
    problems = []
    if train.num_tokens < data.max_seq_length:
        message = (
            f"the training text has {train.num_tokens} tokens, less than one sample of data.max_seq_length = "
            f"{data.max_seq_length}; add text or lower data.max_seq_length"
        )
        problems.append(Problem(message, "data.train"))
    if validation is not None and not validation.num_blocks and data.validation:
        problems.append(Problem("the validation sources hold no text", "data.validation"))
    elif validation is not None and not validation.num_blocks:
        message = (
            f"none of the {train.num_documents} training documents ({train.num_tokens} tokens) was held out; raise it, "
            "name sources under data.validation, or set it to 0 for no evaluation"
        )
        problems.append(Problem(message, "data.validation_fraction", str(data.validation_fraction)))
    if problems:
        raise InputError(*problems)


def _make_folder(folder: Path, write: Callable[[Path], object]) -> bool:
    """Have `write` fill the folder unless it exists; it appears whole or not at all. Whether `write` was called."""
    if folder.is_dir():
        return False
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    lock_path = temporary / _LOCK
    try:
        with open(lock_path, "w") as lock:
            _try_lock(lock)
            lock.write(f"{socket.gethostname()} {os.getpid()}\n")
            lock.flush()
            write(temporary)
            lock_path.unlink()
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                logger.info("another process prepared %s at the same time; using its result", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _remove_leftovers(cache: Path) -> None:
    """Remove the temporary folders of processes of this host that died: the kernel has released their locks."""
    for lock_path in cache.glob(f"*.tmp/{_LOCK}"):
        with suppress(FileNotFoundError), open(lock_path, "r+") as lock:
            # An empty file belongs to a process that is about to take the lock.
            owner_host = lock.read().partition(" ")[0]
            if owner_host == socket.gethostname() and _try_lock(lock):
                shutil.rmtree(lock_path.parent, ignore_errors=True)


def _try_lock(file: TextIO) -> bool:
    """Lock a file until it is closed. False where another process holds it or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
