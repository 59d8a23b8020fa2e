"""From rows with labels to samples on disk, once, in the cache that runs share.

    CACHE/data-FINGERPRINT/          train-00000.arrow (one for each source), validation.arrow, info.json

The labels that a model is to know are those of the training rows; `distlm.data.labels` says what becomes of others.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from distlm.config.resolve import looks_at_documents
from distlm.config.schema import DataConfig, TextClassificationTask, TokenClassificationTask
from distlm.data.blocks import blocks_path
from distlm.data.cache import fingerprint
from distlm.data.corpus import VALIDATION, are_held_out, train_target
from distlm.data.labels import LabelInfo
from distlm.data.notes import PreparationProgress, Report
from distlm.data.parallel import Totals
from distlm.data.prepare import INFO, DataInfo, PreparedData, SplitInfo, existing_tokenizer, make_data
from distlm.data.row_encoder import Columns, LabelledRow, RowCounts, RowEncoder
from distlm.data.row_source import LabelledSource, open_labelled
from distlm.data.rows import document_column, label_column, labelled_columns, text_columns
from distlm.data.samples import SampleWriter, sample_schema
from distlm.data.sources import Source
from distlm.data.tagged import TaggedRows
from distlm.data.texts import TextRows
from distlm.data.tokenize import tokenizer_digest
from distlm.errors import InputError, Problem
from distlm.run_folder import write_json

FORMAT_VERSION = 2
"""Of the samples; another one means other samples. In 1, some windows labelled no word."""
ROWS_AT_ONCE = 1024
"""Rows that are encoded together: documents as context end where these end."""

LabelledTask = TextClassificationTask | TokenClassificationTask


def prepare_labelled(
    data: DataConfig,
    task: LabelledTask,
    tokenizer_name_or_path: str,
    labels_of_model: Sequence[str],
    cache: Path,
    report: Report = lambda progress: None,
    commits: Mapping[str, str] | None = None,
) -> PreparedData:
    """Read, check and encode all rows, unless the cache has them. `labels_of_model` are those that a pretrained model
    knows, by their ids; the other arguments are those of `prepare_data`.

    Raises InputError where a source, the tokenizer, a row or a label is bad.
    """
    cache.mkdir(parents=True, exist_ok=True)
    sources = _Sources(data, looks_at_documents(task), cache, report, commits or {})
    tokenizer, tokenizer_path = existing_tokenizer(tokenizer_name_or_path, cache, needs_mask=False)
    digest = tokenizer_digest(tokenizer)
    told = task.model_dump(exclude={"class_weights", "label_smoothing_factor"})  # these are no matter of the samples
    folder_name = fingerprint(
        "labelled", FORMAT_VERSION, sources.identity, data.max_seq_length, digest, told, list(labels_of_model)
    )

    def write(folder: Path) -> None:
        if (folder / INFO).exists():  # whoever made this was killed just before it was renamed
            return
        encoder = make_encoder(task, tokenizer, data.max_seq_length, labels_of_model)
        info = _Preparation(sources, encoder, folder, report).info(folder_name, digest, len(tokenizer), data)
        for source in sources.all:
            source.check_unchanged()
        _check_amount(info, data)
        write_json(folder / INFO, asdict(info))

    return make_data(cache / f"data-{folder_name}", write, len(data.train), tokenizer_path)


def make_encoder(
    task: LabelledTask,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    labels_of_model: Sequence[str] = (),
) -> RowEncoder:
    if task.type == "token-classification":
        return TaggedRows(task, tokenizer, max_seq_length, labels_of_model)
    return TextRows(task, tokenizer, max_seq_length, labels_of_model)


class _Sources:
    """The training and the validation sources of a run."""

    def __init__(
        self, data: DataConfig, has_documents: bool, cache: Path, report: Report, commits: Mapping[str, str]
    ) -> None:
        """`has_documents`: the task looks at which documents rows belong to."""

        def opened(split: str, sources: Sequence[Source]) -> list[LabelledSource]:
            keys = [f"data.{split}.{number}" for number in range(len(sources))]
            return [
                open_labelled(key, source, labelled_columns(source, has_documents), cache, report, commits.get(key))
                for key, source in zip(keys, sources, strict=True)
            ]

        self.train, self.validation = opened("train", data.train), opened("validation", data.validation)
        self.columns = [
            columns_of(source, opened_source.key, has_documents)
            for source, opened_source in zip([*data.train, *data.validation], self.all, strict=True)
        ]
        self.fraction = 0.0 if data.validation else data.validation_fraction

    @property
    def all(self) -> list[LabelledSource]:
        return [*self.train, *self.validation]

    @property
    def targets(self) -> list[str]:
        """Names of the files: one for each training source, and one for all that is held out, if anything is."""
        names = [train_target(number) for number in range(len(self.train))]
        return [*names, VALIDATION] if self.validation or self.fraction else names

    @property
    def identity(self) -> list[Any]:
        train, validation = ([source.identity for source in split] for split in (self.train, self.validation))
        return [train, validation, self.fraction]


def columns_of(source: Source, key: str, has_documents: bool) -> Columns:
    """Where the source that stands at `key` in the config has what a task reads."""
    return Columns(
        text=text_columns(source)[0],
        pair=source.text_pair_column,
        label=label_column(source),
        document=document_column(source) if has_documents else None,
        key=key,
    )


@dataclass
class _Split:
    """What goes into one file."""

    writer: SampleWriter
    digest: Any = field(default_factory=hashlib.sha256)
    totals: Totals = field(default_factory=Totals)


@dataclass
class _SourceFindings:
    counts: RowCounts = field(default_factory=RowCounts)
    totals: Totals = field(default_factory=Totals)
    trained: Totals = field(default_factory=Totals)
    num_documents_in_training: int = 0
    """Held-out texts that stand in the training data, too."""


class _Preparation:
    """One pass over the training rows for their labels, one to encode them, and one for what is held out."""

    def __init__(self, sources: _Sources, encoder: RowEncoder, folder: Path, report: Report) -> None:
        self._all, self._encoder, self._report = sources, encoder, report
        self._training_texts: set[bytes] = set()
        """Digests, to tell which held-out texts a model has seen."""
        self._num_rows = itertools.count(1)
        self._started_s = time.monotonic()
        self._sources = [_SourceFindings() for _ in sources.all]
        self._labels: LabelInfo = encoder.learn(lambda: (row for _, row in self._rows(is_training=True)))
        with ExitStack() as files:
            schema = sample_schema(encoder.has_token_types, encoder.label_type)
            self._splits = {
                target: _Split(SampleWriter(files.enter_context(blocks_path(folder, target).open("wb")), schema))
                for target in sources.targets
            }
            for is_training in (True, False):
                for number, found in itertools.groupby(self._rows(is_training), key=lambda pair: pair[0]):
                    rows = (row for _, row in found)
                    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
                        self._add(number, some, is_training)
            for split in self._splits.values():
                split.writer.close()

    def _rows(self, is_training: bool) -> Iterator[tuple[int, LabelledRow]]:
        """(number of the source, row) of all rows that are trained, or of all that are held out."""
        held_out = are_held_out(self._all.fraction)
        numbers = itertools.count()
        for number, source in enumerate(self._all.all):
            is_validation = number >= len(self._all.train)
            for row in source.rows():
                if (is_validation or next(held_out)) != is_training:
                    yield number, LabelledRow(row, self._all.columns[number], next(numbers))

    def _add(self, number: int, rows: list[LabelledRow], is_training: bool) -> None:
        """Encode rows of a source and write their samples."""
        split = self._splits[train_target(number) if is_training else VALIDATION]
        source = self._sources[number]
        encoded = self._encoder.encode(rows, source.counts, is_training)
        for row, samples in zip(rows, encoded, strict=True):
            text = self._encoder.words(row)
            for sample in samples:
                split.writer.add(sample.input_ids, sample.labels, sample.rows, sample.token_type_ids)
            is_empty = not text.strip()
            added = Totals(
                num_documents=int(not is_empty),
                num_empty_documents=int(is_empty),
                num_text_bytes=len(text.encode("utf-8", "surrogatepass")),
                num_tokens=sum(len(sample.input_ids) for sample in samples),
                num_unknown_tokens=sum(sample.num_unknown_tokens for sample in samples),
                num_blocks=len(samples),
            )
            split.totals += added
            source.totals += added
            if is_training:
                source.trained += added
            split.digest.update(repr((text, row.label)).encode("utf-8", "surrogatepass"))
            text_digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if is_training:
                self._training_texts.add(text_digest)
            elif text_digest in self._training_texts and not is_empty:
                source.num_documents_in_training += 1
            if (count := next(self._num_rows)) % ROWS_AT_ONCE == 0:
                self._report(PreparationProgress("encoding rows", num_documents=count))

    def info(self, folder_name: str, digest: str, vocab_size: int, data: DataConfig) -> DataInfo:
        all_sources = self._all

        def told(number: int) -> dict[str, Any]:
            source, found = all_sources.all[number], self._sources[number]
            facts = {"name": source.name} | source.settings | source.size | asdict(found.totals)
            facts |= asdict(found.counts) | {
                "num_huge_documents": 0,
                "num_undecodable_documents": source.num_undecodable_rows,
                "first_undecodable": source.first_undecodable,
                "num_train_blocks": found.trained.num_blocks,
                "num_documents_in_training": found.num_documents_in_training,
            }
            if number < len(all_sources.train):
                facts["content_sha256"] = self._splits[train_target(number)].digest.hexdigest()
            return facts

        def split(targets: list[str]) -> SplitInfo:
            totals = sum((self._splits[target].totals for target in targets), Totals())
            content = "".join(self._splits[target].digest.hexdigest() for target in targets)
            return SplitInfo(**asdict(totals), content_sha256=hashlib.sha256(content.encode()).hexdigest())

        sources = [told(number) for number in range(len(all_sources.all))]
        return DataInfo(
            format_version=FORMAT_VERSION,
            fingerprint=folder_name,
            train=split([target for target in all_sources.targets if target != VALIDATION]),
            validation=split([VALIDATION]) if VALIDATION in all_sources.targets else None,
            tokenizer_fingerprint=digest,
            vocab_size=vocab_size,
            max_seq_length=data.max_seq_length,
            sources={"train": sources[: len(all_sources.train)], "validation": sources[len(all_sources.train) :]},
            seconds=round(time.monotonic() - self._started_s, 3),
            labels=asdict(self._labels),
        )


def _check_amount(info: DataInfo, data: DataConfig) -> None:
    if not info.train.num_blocks:
        raise InputError(Problem("the training sources hold no row that is trained", "data.train"))
    if info.validation is not None and not info.validation.num_blocks:
        if data.validation:
            raise InputError(Problem("the validation sources hold no rows", "data.validation"))
        message = (
            f"none of the {info.train.num_blocks} training rows was held out; raise it, name sources under "
            "data.validation, or set it to 0 for no evaluation"
        )
        raise InputError(Problem(message, "data.validation_fraction", str(data.validation_fraction)))
