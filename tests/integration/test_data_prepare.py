"""From sources to blocks in the cache: content, reuse, races, and refusals."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from distlm.data import prepare
from distlm.data.pack import PackedDataset
from distlm.data.prepare import PreparedData, prepare_data
from distlm.data.sources import Source, documents
from distlm.errors import InputError

REAL_DATA = Path(os.environ.get("DISTLM_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@dataclass(frozen=True)
class Files:
    paths: list[str]
    text_column: str = "text"
    max_documents: int | None = None
    source: Literal["files"] = "files"


@dataclass(frozen=True)
class PythonDocs:
    packages: list[str] | None
    max_documents: int | None = None
    source: Literal["python-docs"] = "python-docs"


@dataclass(frozen=True)
class Data:
    train: list[Files | PythonDocs]
    validation: list[Files | PythonDocs] = field(default_factory=list)
    validation_fraction: float = 0.1
    max_seq_length: int = 32


@dataclass(frozen=True)
class Train:
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


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data([write_corpus(tmp_path / "corpus.jsonl")])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "cache"


def unpack(prepared: PreparedData, path: Path | None) -> list[str]:
    """The documents as the blocks hold them, decoded."""
    assert path is not None
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    dataset = PackedDataset(path)
    blocks = dataset[np.arange(len(dataset))]
    assert (blocks[:, 0] == tokenizer.cls_token_id).all()
    body = blocks[:, 1:-1].reshape(-1)
    body = body[body != tokenizer.pad_token_id]
    documents = np.split(body, np.flatnonzero(body == tokenizer.sep_token_id))
    return [tokenizer.decode(ids[ids != tokenizer.sep_token_id]) for ids in documents if len(ids) > 1]


def test_blocks_hold_all_documents_once_in_order(data: Data, cache: Path) -> None:
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    train, held_out = (unpack(prepared, path) for path in (prepared.train_path, prepared.validation_path))
    number_of = {text(number): number for number in range(400)}
    train_numbers, held_out_numbers = ([number_of[document] for document in split] for split in (train, held_out))
    assert sorted(train_numbers + held_out_numbers) == list(range(400))
    assert train_numbers == sorted(train_numbers)
    assert held_out_numbers == sorted(held_out_numbers)
    assert 20 < len(held_out) < 60

    info = prepared.info
    assert info.validation is not None
    assert (info.train.num_documents, info.validation.num_documents) == (len(train), len(held_out))
    assert info.train.num_text_bytes == sum(len(document) for document in train)
    assert info.train.num_blocks == len(PackedDataset(prepared.train_path))
    assert info.train.num_tokens == PackedDataset(prepared.train_path).num_tokens
    assert info.vocab_size == len(AutoTokenizer.from_pretrained(prepared.tokenizer_path))
    assert info.sources["train"][0]["paths"] == data.train[0].paths  # type: ignore[union-attr]


def test_second_call_tokenizes_nothing(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(data, TRAIN_TOKENIZER, cache)

    def refuse(*arguments: object) -> None:
        raise AssertionError("worked again")

    monkeypatch.setattr(prepare, "token_ids", refuse)
    monkeypatch.setattr(prepare, "train_tokenizer", refuse)
    monkeypatch.setattr(prepare, "documents", refuse)
    again = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert not first.cached
    assert again == replace(first, cached=True)


def test_every_change_of_content_or_settings_is_prepared_anew(data: Data, cache: Path, tmp_path: Path) -> None:
    seen = {prepare_data(data, TRAIN_TOKENIZER, cache).train_path}

    def is_new(changed: Data, settings: TokenizerSettings = TRAIN_TOKENIZER) -> bool:
        prepared = prepare_data(changed, settings, cache)
        is_new = not prepared.cached and prepared.train_path not in seen
        seen.add(prepared.train_path)
        return is_new

    assert not is_new(data)
    assert is_new(replace(data, max_seq_length=33))
    assert is_new(replace(data, validation_fraction=0.2))
    assert is_new(replace(data, validation=[write_corpus(tmp_path / "held-out.jsonl", 9)]))
    assert is_new(replace(data, train=[replace(data.train[0], max_documents=300)]))
    assert is_new(data, TokenizerSettings(train=Train(vocab_size=200)))
    assert is_new(data, TokenizerSettings(train=Train(lowercase=False)))
    (tmp_path / "corpus.jsonl").write_text((tmp_path / "corpus.jsonl").read_text().replace("alpha", "omega"))
    assert is_new(data)
    os.utime(tmp_path / "corpus.jsonl", ns=(1, 1))
    assert is_new(data)


def test_held_out_documents_are_chosen_by_their_number_alone(data: Data, cache: Path, tmp_path: Path) -> None:
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    longer = Data([write_corpus(tmp_path / "longer.jsonl", 500)])
    held_out = unpack(prepared, prepared.validation_path)
    prepared = prepare_data(longer, TRAIN_TOKENIZER, cache)
    assert unpack(prepared, prepared.validation_path)[: len(held_out)] == held_out


def test_validation_sources_replace_the_fraction(data: Data, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("alpha beta\n\ngamma\n")
    prepared = prepare_data(replace(data, validation=[Files([str(tmp_path / "held-out.txt")])]), TRAIN_TOKENIZER, cache)
    assert unpack(prepared, prepared.validation_path) == ["alpha beta", "gamma"]
    assert prepared.info.train.num_documents == 400


def test_no_validation(data: Data, cache: Path) -> None:
    prepared = prepare_data(replace(data, validation_fraction=0.0), TRAIN_TOKENIZER, cache)
    assert prepared.validation_path is None
    assert prepared.info.validation is None
    assert prepared.info.train.num_documents == 400
    assert not (prepared.train_path.parent / "validation.arrow").exists()


def test_documents_without_text_are_counted(cache: Path, tmp_path: Path) -> None:
    texts = [text(0), None, "", " \n", text(1)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in texts))
    data = Data([Files([str(tmp_path / "a.jsonl")])], validation_fraction=0.0, max_seq_length=8)
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert (prepared.info.train.num_documents, prepared.info.train.num_empty_documents) == (2, 3)
    assert unpack(prepared, prepared.train_path) == [text(0), text(1)]


def test_an_existing_tokenizer_is_copied_into_the_cache(data: Data, cache: Path, tmp_path: Path) -> None:
    trained = prepare_data(data, TRAIN_TOKENIZER, cache)
    trained.tokenizer_path.rename(tmp_path / "mine")
    loaded = prepare_data(data, TokenizerSettings(name_or_path=str(tmp_path / "mine")), cache)
    assert loaded.tokenizer_path.parent == cache
    assert loaded.cached  # the same tokens, wherever the tokenizer came from
    assert (loaded.tokenizer_path / "tokenizer.json").read_bytes() == (tmp_path / "mine/tokenizer.json").read_bytes()


def test_python_docs_are_parsed_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count_calls(source: Source) -> Iterator[str]:
        calls.append(source)
        return documents(source)

    monkeypatch.setattr(prepare, "documents", count_calls)
    data = Data([PythonDocs(["json", "logging", "email"])], validation_fraction=0.2)
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert prepared.info.train.num_documents > 10
    assert len(calls) == 1


def test_datasets_opens_the_file(data: Data, cache: Path) -> None:
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    opened = datasets.Dataset.from_file(str(prepared.train_path))
    blocks = PackedDataset(prepared.train_path)
    assert np.array(opened["input_ids"]).tolist() == blocks[np.arange(len(blocks))].tolist()


def prepare_and_send(data: Data, cache: Path, barrier: object, queue: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    queue.put((prepared.train_path, prepared.info))  # type: ignore[attr-defined]


def test_two_processes_at_once_end_with_one_result(data: Data, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=prepare_and_send, args=(data, cache, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1]
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["data", "tokenizer"]


def test_the_loser_of_a_race_takes_the_winners_result(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process commits while this one is about to."""
    real_pack, winners = prepare._pack, []

    def pack_after_the_other(*arguments: object) -> object:
        monkeypatch.setattr(prepare, "_pack", real_pack)
        winners.append(prepare_data(data, TRAIN_TOKENIZER, cache))
        return real_pack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_pack", pack_after_the_other)
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert prepared == winners[0]
    assert not list(cache.glob("*.tmp"))


def test_failure_leaves_nothing_behind(data: Data, cache: Path, tmp_path: Path) -> None:
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("not JSON\n")
    with pytest.raises(InputError, match=r"corpus\.jsonl:401"):
        prepare_data(data, TokenizerSettings(train=Train(max_documents=50)), cache)
    assert [path.name.partition("-")[0] for path in cache.iterdir()] == ["tokenizer"]


def test_left_over_folders_of_the_dead_are_removed(data: Data, cache: Path) -> None:
    owners = {"dead": socket.gethostname(), "alive": socket.gethostname(), "elsewhere": "another-host"}
    for name, host in owners.items():
        (cache / f"data-{name}.tmp").mkdir(parents=True)
        (cache / f"data-{name}.tmp" / "lock").write_text(f"{host} 1\n")
    with open(cache / "data-alive.tmp" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare_data(data, TRAIN_TOKENIZER, cache)
        assert sorted(path.name for path in cache.glob("*.tmp")) == ["data-alive.tmp", "data-elsewhere.tmp"]


def test_data_that_changes_while_it_is_read_is_refused(
    data: Data, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pack = prepare._pack

    def pack_and_change(*arguments: object) -> object:
        os.utime(tmp_path / "corpus.jsonl", ns=(1, 1))
        return real_pack(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare, "_pack", pack_and_change)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare_data(data, TRAIN_TOKENIZER, cache)
    assert not list(cache.glob("data-*"))


def test_too_little_text_is_refused_with_what_to_change(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha beta gamma\n")
    data = Data([Files([str(tmp_path / "a.txt")])], validation_fraction=0.01)
    with pytest.raises(InputError) as caught:
        prepare_data(data, TRAIN_TOKENIZER, cache)
    train, validation = caught.value.problems
    assert train.key == "data.train"
    assert "tokens, less than one sample of data.max_seq_length = 32" in train.message
    assert (validation.key, validation.value) == ("data.validation_fraction", "0.01")
    assert "none of the 1 training documents" in validation.message


def test_validation_sources_without_text_are_refused(data: Data, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=r"data\.validation: the validation sources hold no text"):
        prepare_data(replace(data, validation=[Files([str(tmp_path / "empty.jsonl")])]), TRAIN_TOKENIZER, cache)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; set DISTLM_TEST_DATA")
@pytest.mark.parametrize(
    ("path", "num_documents"),
    [("peps/*.jsonl", 60), ("wikitext2/wiki.valid.tokens", 500), ("tang_poems/train.jsonl", 2000), ("banking77", 2000)],
)
def test_real_corpora(cache: Path, path: str, num_documents: int) -> None:
    source = Files([str(REAL_DATA / path)], max_documents=num_documents)
    prepared = prepare_data(Data([source], max_seq_length=128), TokenizerSettings(train=Train(4000)), cache)
    train, validation = prepared.info.train, prepared.info.validation
    assert validation is not None
    assert train.num_documents + validation.num_documents + train.num_empty_documents >= 0.99 * num_documents
    dataset = PackedDataset(prepared.train_path)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    blocks = dataset[np.arange(len(dataset))]
    assert (blocks == tokenizer.unk_token_id).mean() < 0.01
    assert (blocks[:-1] != tokenizer.pad_token_id).all()
    assert blocks.max() < len(tokenizer) <= 4000
