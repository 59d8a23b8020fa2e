"""From sources to blocks on disk, once: the tokenizer and the packed data of a run, in a cache that runs share.

    CACHE/dataset-FINGERPRINT/       the text of a `datasets` source
    CACHE/tokenizer-FINGERPRINT/     what `AutoTokenizer.from_pretrained` loads
    CACHE/data-FINGERPRINT/          train-00000.arrow (one for each source), validation.arrow, info.json

A fingerprint covers everything that the content depends on: path, size and time of change of each file, the settings,
the tokenizer's content and `FORMAT_VERSION`. Whole folders appear by a rename; what a killed process has begun is gone
on with. How many processes tokenize changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from distlm.data.blocks import BlockFiles, blocks_path, remove_journal
from distlm.data.cache import fingerprint, make_folder
from distlm.data.corpus import VALIDATION, Corpus, CorpusSource, train_target
from distlm.data.hub import copy_dataset
from distlm.data.notes import PreparationProgress, Report
from distlm.data.pack import BlockLayout
from distlm.data.parallel import Chunk, Packing, Totals, pack_in_order
from distlm.data.sources import Source
from distlm.data.tokenize import load_tokenizer, tokenizer_digest
from distlm.data.train_tokenizer import TokenizerType, train_tokenizer
from distlm.errors import InputError, Problem
from distlm.limits import available_cpus
from distlm.run_folder import read_json, write_json

FORMAT_VERSION = 2
"""Of the blocks and of info.json; another one means other samples."""
INFO = "info.json"
_DOCUMENTS_BETWEEN_REPORTS = 1000


class TrainedTokenizerConfig(Protocol):
    @property
    def type(self) -> TokenizerType: ...
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
    @property
    def num_proc(self) -> int | None: ...


@dataclass
class SplitInfo(Totals):
    """What the blocks of a split were made of."""

    content_sha256: str = ""
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
    """For each source of each split: `name`, its settings, `num_files` and `num_file_bytes`, the `SourceCounts` of
    reading it, and the `Totals` of what became of it, held-out documents included; `num_train_blocks` and
    `content_sha256` of a training source are without those."""
    seconds: float
    """Time that reading, tokenizing and packing took."""
    labels: dict[str, Any] | None = None
    """`distlm.data.labels.LabelInfo`; None: the samples have no labels."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DataInfo:
        validation = SplitInfo(**data["validation"]) if data["validation"] else None
        return cls(**{**data, "train": SplitInfo(**data["train"]), "validation": validation})


@dataclass(frozen=True)
class PreparedData:
    """Where the prepared data of a run is."""

    tokenizer_path: Path
    train_paths: list[Path]
    """Blocks of each training source."""
    validation_path: Path | None
    info: DataInfo
    cached: bool
    """Nothing was tokenized: the data was there."""


def prepare_data(
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    cache: Path,
    report: Report = lambda progress: None,
    commits: Mapping[str, str] | None = None,
) -> PreparedData:
    """Copy `datasets` sources, train or load the tokenizer, tokenize and pack; each step only if the cache lacks its
    result.

    Where there are no validation sources, each training document is held out with probability `validation_fraction`, by
    its number alone, whatever the seed of the run. `report` is told how far the work is; `commits` maps the config keys
    of sources on the Hub to what a run has begun with. Raises InputError where a source or the tokenizer is bad, or
    where there is too little text.
    """
    cache.mkdir(parents=True, exist_ok=True)

    def corpus_sources(split: str, sources: Sequence[Source]) -> Iterator[CorpusSource]:
        for number, source in enumerate(sources):
            key = f"data.{split}.{number}"
            if source.source == "datasets":
                copy = copy_dataset(key, source, cache, report, (commits or {}).get(key))
                facts = {"commit": copy.commit, "reached_limit": copy.reached_limit}
                yield CorpusSource(key, source, copy.files, copy.identity, **facts)
            elif source.source != "parallel":  # which has no documents: refused by resolve.contradictions
                yield CorpusSource(key, source, source)

    corpus = Corpus(
        list(corpus_sources("train", data.train)),
        list(corpus_sources("validation", data.validation)),
        data.validation_fraction,
    )
    tokenizer, tokenizer_path = _prepare_tokenizer(corpus, data.max_seq_length, tokenizer_config, cache, report)
    digest = tokenizer_digest(tokenizer)
    folder_name = fingerprint(FORMAT_VERSION, corpus.identity, data.max_seq_length, digest)

    def write(folder: Path) -> None:
        if not (folder / INFO).exists():  # else whoever made this was killed just before it was renamed
            pack(folder)
        remove_journal(folder)

    def pack(folder: Path) -> None:
        layout = BlockLayout.of(tokenizer, data.max_seq_length)
        with BlockFiles(folder, layout, corpus.targets) as files:
            packing = Packing(tokenizer.backend_tokenizer.to_str(), layout, files.parts_folder)
            _pack(corpus, packing, data.num_proc or available_cpus(), files, report)
            for source in corpus.sources:
                source.check_unchanged()
            files.finish()
            info = _info(corpus, files, len(tokenizer), data.max_seq_length, folder_name, digest)
            _check_amount(info, data)
        write_json(folder / INFO, asdict(info))

    return make_data(cache / f"data-{folder_name}", write, len(data.train), tokenizer_path)


def make_data(
    folder: Path, write: Callable[[Path], object], num_train_sources: int, tokenizer_path: Path
) -> PreparedData:
    """Have `write` fill a folder of the cache with samples and info.json, unless it is there, and say what it holds."""
    was_written = make_folder(folder, write)
    info = DataInfo.from_json(read_json(folder / INFO))
    return PreparedData(
        tokenizer_path=tokenizer_path,
        train_paths=[blocks_path(folder, train_target(number)) for number in range(num_train_sources)],
        validation_path=blocks_path(folder, VALIDATION) if info.validation else None,
        info=info,
        cached=not was_written,
    )


def existing_tokenizer(name_or_path: str, cache: Path, needs_mask: bool = True) -> tuple[PreTrainedTokenizerFast, Path]:
    """A tokenizer of a folder or the Hub, and the folder of the cache that holds it."""
    tokenizer = load_tokenizer(name_or_path, needs_mask)
    folder = cache / f"tokenizer-{tokenizer_digest(tokenizer)[:20]}"
    make_folder(folder, tokenizer.save_pretrained)
    return tokenizer, folder


def _prepare_tokenizer(
    corpus: Corpus, max_seq_length: int, config: TokenizerConfig, cache: Path, report: Report
) -> tuple[PreTrainedTokenizerFast, Path]:
    """The tokenizer and the folder of the cache that holds it."""
    if config.train is None:
        if config.name_or_path is None:
            raise InputError(Problem("give either name_or_path or train", "tokenizer"))
        return existing_tokenizer(config.name_or_path, cache)

    settings = config.train

    def texts() -> Iterator[str]:
        for number, text in enumerate(islice(corpus.texts(), settings.max_documents), start=1):
            yield text
            if number % _DOCUMENTS_BETWEEN_REPORTS == 0:
                report(PreparationProgress("reading text to train the tokenizer", num_documents=number))
        report(PreparationProgress("training the tokenizer"))

    def train(folder: Path) -> None:
        arguments = (settings.vocab_size, settings.lowercase, max_seq_length, settings.type)
        train_tokenizer(texts(), *arguments).save_pretrained(folder)

    key = [settings.type, settings.vocab_size, settings.lowercase, settings.max_documents, max_seq_length]
    sources = [source.identity for source in corpus.train]
    folder = cache / f"tokenizer-{fingerprint(FORMAT_VERSION, sources, key)}"
    make_folder(folder, train)
    return load_tokenizer(str(folder)), folder


def _pack(corpus: Corpus, packing: Packing, num_proc: int, files: BlockFiles, report: Report) -> None:
    """Tokenize and pack what is not in the files yet. All text is read, since only reading tells where a chunk ends."""
    read: dict[int, tuple[int, int, int, int]] = {}
    num_documents = 0

    def chunks_to_do() -> Iterator[Chunk]:
        nonlocal num_documents
        for source_number, chunk in corpus.chunks():
            num_documents += sum(entry.ends_document for entry in chunk.entries)
            if chunk.number >= files.num_chunks:
                read[chunk.number] = (source_number, num_documents, *corpus.bytes_read())
                yield chunk

    with closing(pack_in_order(chunks_to_do(), packing, num_proc)) as packed:
        for chunk, parts in packed:
            source_number, documents_done, bytes_done, bytes_total = read.pop(chunk.number)
            files.append(source_number, parts)
            num_tokens = files.totals().num_tokens
            report(PreparationProgress("tokenizing", bytes_done, bytes_total, documents_done, num_tokens))


def _info(
    corpus: Corpus, files: BlockFiles, vocab_size: int, max_seq_length: int, folder_name: str, digest: str
) -> DataInfo:
    def split(targets: list[str]) -> SplitInfo:
        totals = sum((files.totals(target=target) for target in targets), Totals())
        content = "".join(files.digests[target] for target in targets)
        return SplitInfo(**asdict(totals), content_sha256=hashlib.sha256(content.encode()).hexdigest())

    def told(number: int, source: CorpusSource) -> dict[str, Any]:
        totals = asdict(files.totals(source_number=number))
        counts = asdict(source.counts)  # wins where both count documents: it counts the empty ones, too
        told = {"name": source.name} | source.settings | source.size | totals | counts
        if number >= len(corpus.train):
            return told | {"num_train_blocks": 0}
        target = train_target(number)
        train_blocks = files.totals(source_number=number, target=target).num_blocks
        return told | {"num_train_blocks": train_blocks, "content_sha256": files.digests[target]}

    sources = [told(number, source) for number, source in enumerate(corpus.sources)]
    train_targets = [target for target in corpus.targets if target != VALIDATION]
    return DataInfo(
        format_version=FORMAT_VERSION,
        fingerprint=folder_name,
        train=split(train_targets),
        validation=split([VALIDATION]) if VALIDATION in corpus.targets else None,
        tokenizer_fingerprint=digest,
        vocab_size=vocab_size,
        max_seq_length=max_seq_length,
        sources={"train": sources[: len(corpus.train)], "validation": sources[len(corpus.train) :]},
        seconds=round(files.seconds, 3),
    )


def _check_amount(info: DataInfo, data: DataConfig) -> None:
    train, validation = info.train, info.validation
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
