"""Settings and documents that the tests of data preparation share."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer

from distlm.data.pack import PackedDataset
from distlm.data.prepare import PreparedData
from distlm.data.tables import FormatName
from distlm.data.train_tokenizer import TokenizerType

REAL_DATA = Path(os.environ.get("DISTLM_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@dataclass(frozen=True)
class Files:
    paths: list[str]
    text_column: str = "text"
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "replace"
    format: FormatName | None = None
    column_names: list[str] | None = None
    delimiter: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    document_column: str | None = None
    max_documents: int | None = None
    source: Literal["files"] = "files"


@dataclass(frozen=True)
class PythonDocs:
    packages: list[str] | None
    max_documents: int | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    document_column: str | None = None
    source: Literal["python-docs"] = "python-docs"


@dataclass(frozen=True)
class HubDataset:
    path: str
    data_files: list[str] | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    streaming: bool = True
    max_documents: int | None = None
    max_gib: float = 1.0
    text_pair_column: str | None = None
    label_column: str | None = None
    document_column: str | None = None
    source: Literal["datasets"] = "datasets"


@dataclass(frozen=True)
class Data:
    train: list[Any]
    validation: list[Any] = field(default_factory=list)
    validation_fraction: float = 0.1
    max_seq_length: int = 32
    num_proc: int | None = 2


@dataclass(frozen=True)
class Train:
    type: TokenizerType = "wordpiece"
    vocab_size: int = 300
    lowercase: bool = True
    max_documents: int | None = None


@dataclass(frozen=True)
class TokenizerSettings:
    name_or_path: str | None = None
    train: Train | None = None


TRAIN_TOKENIZER = TokenizerSettings(train=Train())


def text(number: int) -> str:
    generator = random.Random(number)
    return f"d{number} " + " ".join(generator.choices(["alpha", "beta", "gamma", "delta"], k=generator.randint(1, 60)))


def write_corpus(path: Path, num_documents: int = 400) -> Files:
    path.write_text("".join(json.dumps({"text": text(number)}) + "\n" for number in range(num_documents)))
    return Files([str(path)])


def unpack(prepared: PreparedData, path: Path | None) -> list[str]:
    """The documents as the blocks of one chunk hold them, decoded."""
    assert path is not None
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    dataset = PackedDataset([path])
    blocks = dataset[np.arange(len(dataset))]
    assert (blocks[:, 0] == tokenizer.cls_token_id).all()
    body = blocks[:, 1:-1].reshape(-1)
    body = body[body != tokenizer.pad_token_id]
    documents = np.split(body, np.flatnonzero(body == tokenizer.sep_token_id))
    return [tokenizer.decode(ids[ids != tokenizer.sep_token_id]) for ids in documents if len(ids) > 1]


def content(prepared: PreparedData) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prepared.train_paths[0].parent.glob("*.arrow")}
