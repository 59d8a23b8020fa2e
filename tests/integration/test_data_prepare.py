"""From sources to blocks in the cache: content, reuse, what is counted, and refusals."""

from __future__ import annotations

import concurrent.futures
import fcntl
import gzip
import itertools
import json
import lzma
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_settings import (
    REAL_DATA,
    TRAIN_TOKENIZER,
    Data,
    Files,
    HubDataset,
    PythonDocs,
    TokenizerSettings,
    Train,
    content,
    text,
    unpack,
    write_corpus,
)
from transformers import AutoTokenizer

from distlm.data import corpus, hub, prepare, readers, sources
from distlm.data.cache import LOCK, make_folder
from distlm.data.corpus import CorpusSource
from distlm.data.encode import Encoder
from distlm.data.notes import notes
from distlm.data.pack import PackedDataset
from distlm.data.prepare import prepare_data
from distlm.data.sources import SourceReader
from distlm.errors import InputError


def test_blocks_hold_all_documents_once_in_order(data: Data, cache: Path) -> None:
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    train, held_out = (unpack(prepared, path) for path in (prepared.train_paths[0], prepared.validation_path))
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
    assert info.train.num_blocks == len(PackedDataset(prepared.train_paths))
    assert info.vocab_size == len(AutoTokenizer.from_pretrained(prepared.tokenizer_path))
    assert info.sources["train"][0]["paths"] == data.train[0].paths  # type: ignore[union-attr]


def test_second_call_tokenizes_nothing(data: Data, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(data, TRAIN_TOKENIZER, cache)

    def refuse(*arguments: object) -> None:
        raise AssertionError("worked again")

    monkeypatch.setattr(Encoder, "ids", refuse)
    monkeypatch.setattr(prepare, "train_tokenizer", refuse)
    monkeypatch.setattr(SourceReader, "__iter__", refuse)
    again = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert not first.cached
    assert again == replace(first, cached=True)


def test_every_change_of_content_or_settings_is_prepared_anew(data: Data, cache: Path, tmp_path: Path) -> None:
    seen = {prepare_data(data, TRAIN_TOKENIZER, cache).train_paths[0]}

    def is_new(changed: Data, settings: TokenizerSettings = TRAIN_TOKENIZER) -> bool:
        prepared = prepare_data(changed, settings, cache)
        is_new = not prepared.cached and prepared.train_paths[0] not in seen
        seen.add(prepared.train_paths[0])
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


def test_what_names_the_data_in_the_cache_changes_with_no_key_that_is_not_given(tmp_path: Path) -> None:
    """Else a run that began before the key was there would not find its data again."""
    paths = [str(write_corpus(tmp_path / "a.jsonl").paths[0])]
    source = Files(paths)
    settings = CorpusSource("data.train.0", source, source).settings
    assert json.dumps(settings) == json.dumps(
        {
            "source": "files",
            "paths": paths,
            "text_column": "text",
            "encoding": "utf-8",
            "encoding_errors": "replace",
            "max_documents": None,
        }
    )
    told = {CorpusSource("a", one, one).settings.get("format") for one in (source, replace(source, format="jsonl"))}
    assert told == {None, "jsonl"}
    data_set = HubDataset("a/b", label_column="x")
    assert hub._what_is_read(data_set) == ["a/b", None, "train", None, None, "text", None, 1.0, []]


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
    assert not (prepared.train_paths[0].parent / "validation.arrow").exists()


def test_documents_without_text_are_counted(cache: Path, tmp_path: Path) -> None:
    texts = [text(0), None, "", " \n", text(1)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in texts))
    data = Data([Files([str(tmp_path / "a.jsonl")])], validation_fraction=0.0, max_seq_length=8)
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert (prepared.info.train.num_documents, prepared.info.train.num_empty_documents) == (2, 3)
    assert unpack(prepared, prepared.train_paths[0]) == [text(0), text(1)]


def test_an_existing_tokenizer_is_copied_into_the_cache(data: Data, cache: Path, tmp_path: Path) -> None:
    trained = prepare_data(data, TRAIN_TOKENIZER, cache)
    trained.tokenizer_path.rename(tmp_path / "mine")
    loaded = prepare_data(data, TokenizerSettings(name_or_path=str(tmp_path / "mine")), cache)
    assert loaded.tokenizer_path.parent == cache
    assert loaded.cached  # the same tokens, wherever the tokenizer came from
    assert (loaded.tokenizer_path / "tokenizer.json").read_bytes() == (tmp_path / "mine/tokenizer.json").read_bytes()


def test_python_docs_are_parsed_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    parse = sources.module_docs

    def count_calls(files: list[Path]) -> Iterator[str]:
        calls.append(files)
        return parse(files)

    monkeypatch.setattr(sources, "module_docs", count_calls)
    data = Data([PythonDocs(["json", "logging", "email"])], validation_fraction=0.2)
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    assert prepared.info.train.num_documents > 10
    assert len(calls) == 1


def test_datasets_opens_the_file(data: Data, cache: Path) -> None:
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache)
    opened = datasets.Dataset.from_file(str(prepared.train_paths[0]))
    blocks = PackedDataset(prepared.train_paths)
    assert np.array(opened["input_ids"]).tolist() == blocks[np.arange(len(blocks))].tolist()


def test_failure_leaves_nothing_behind(data: Data, cache: Path, tmp_path: Path) -> None:
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("not JSON\n")
    with pytest.raises(InputError, match=r"corpus\.jsonl:401"):
        prepare_data(data, TokenizerSettings(train=Train(max_documents=50)), cache)
    assert [path.name.partition("-")[0] for path in cache.iterdir()] == ["tokenizer"]


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
    prepared = prepare_data(Data([source], max_seq_length=128), TokenizerSettings(train=Train(vocab_size=4000)), cache)
    train, validation = prepared.info.train, prepared.info.validation
    assert validation is not None
    assert train.num_documents + validation.num_documents + train.num_empty_documents >= 0.99 * num_documents
    dataset = PackedDataset(prepared.train_paths)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    blocks = dataset[np.arange(len(dataset))]
    assert (blocks == tokenizer.unk_token_id).mean() < 0.01
    assert (blocks[:-1] != tokenizer.pad_token_id).all()
    assert blocks.max() < len(tokenizer) <= 4000


def test_what_is_unusual_is_counted_and_told(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_PIECE_CHARACTERS", 5000)
    monkeypatch.setattr(corpus, "MAX_PIECE_CHARACTERS", 5000)
    monkeypatch.setattr(corpus, "CHUNK_CHARACTERS", 12_000)
    lines = [json.dumps({"text": value}).encode() + b"\n" for value in [*map(text, range(1500)), "", "alpha " * 2001]]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines) + b'{"text": "beta \xff"}\n' * 3)
    huge = "gamma delta\n" * 1000
    (tmp_path / "b.txt").write_text(f"alpha\n\n{huge}\n秦川雄帝宅\n")
    data = Data([Files([str(tmp_path / "a.jsonl")]), Files([str(tmp_path / "b.txt")])], validation_fraction=0.0)
    settings = TokenizerSettings(train=Train(vocab_size=100, max_documents=50))
    prepared = prepare_data(data, settings, cache)
    first, second = prepared.info.sources["train"]
    counts = ("num_documents", "num_empty_documents", "num_huge_documents", "num_undecodable_documents")
    assert [first[name] for name in counts] == [1505, 1, 1, 3]
    assert [second[name] for name in counts] == [3, 0, 1, 0]
    assert first["first_undecodable"] == f"{tmp_path}/a.jsonl:1503"
    assert second["num_text_bytes"] == len(f"alpha{huge.rstrip()}秦川雄帝宅".encode())
    told = list(notes(prepared.info.sources))
    assert told[0] == (
        f"data: {tmp_path}/a.jsonl: 1 empty document, 1 longer than 5,000 characters (cut into slices, all trained), 3 "
        f"with bytes that are not utf-8 (first: {tmp_path}/a.jsonl:1503)"
    ).replace("5,000", f"{8 * 2**20:,}")
    assert told[1].startswith(f"data: {tmp_path}/b.txt: 1 longer than")
    # All of a document that is cut is there.
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    dataset = PackedDataset(prepared.train_paths[1:])
    ids = dataset[np.arange(len(dataset))]
    assert tokenizer.decode(ids.reshape(-1), skip_special_tokens=True).replace(" ", "").count("gammadelta") == 1000


def test_files_in_another_encoding_are_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\n\n".join(["Größe", "Maß", "klein"] * 100).encode("latin-1"))
    data = Data([Files([str(tmp_path / "a.txt")])])
    with pytest.raises(InputError) as caught:
        prepare_data(data, TRAIN_TOKENIZER, cache)
    (found,) = caught.value.problems
    assert (found.key, found.location) == ("data.train.0.encoding", f"{tmp_path}/a.txt:1")
    assert "200 of 300 documents hold bytes that are not UTF-8" in found.message
    latin = replace(data, train=[Files([str(tmp_path / "a.txt")], encoding="latin-1")])
    prepared = prepare_data(latin, TokenizerSettings(train=Train(lowercase=False)), cache)
    assert set(unpack(prepared, prepared.train_paths[0])) == {"Größe", "Maß", "klein"}


def test_unknown_text_is_warned_of(data: Data, cache: Path, tmp_path: Path) -> None:
    tokenizer = TokenizerSettings(name_or_path=str(prepare_data(data, TRAIN_TOKENIZER, cache).tokenizer_path))
    (tmp_path / "zh.txt").write_text("\n\n".join(["秦川雄帝宅 函谷壯皇居"] * 50))
    prepared = prepare_data(Data([Files([str(tmp_path / "zh.txt")])]), tokenizer, cache)
    (warning,) = notes(prepared.info.sources)
    assert re.match(r"warning: data: .*zh\.txt: [89]\d\.\d% of the tokens are unknown to the tokenizer", warning)


def test_a_tokenizer_learns_from_every_source(data: Data, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "zh.txt").write_text("\n\n".join(["秦川雄帝宅"] * 50))
    both = replace(data, train=[*data.train, Files([str(tmp_path / "zh.txt")])])
    prepared = prepare_data(both, TokenizerSettings(train=Train(max_documents=20)), cache)
    assert AutoTokenizer.from_pretrained(prepared.tokenizer_path).tokenize("秦") == ["秦"]


def test_a_second_process_waits_for_the_first(data: Data, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared = prepare_data(data, TRAIN_TOKENIZER, cache / "reference")
    name = prepared.train_paths[0].parent.name
    partial = cache / f"{name}.partial"
    partial.mkdir(parents=True)
    with open(partial / "lock", "w") as lock, concurrent.futures.ThreadPoolExecutor(1) as pool:
        lock.write("process 1 on a host")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(prepare_data, data, TRAIN_TOKENIZER, cache)
        with pytest.raises(TimeoutError):
            second.result(timeout=2)
        shutil.copytree(prepared.train_paths[0].parent, cache / name)
        shutil.rmtree(partial)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result(timeout=60).cached
    assert "waiting for process 1 on a host, which is making" in caplog.text


def test_a_folder_that_became_whole_in_between_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, is_dir = tmp_path / "data-x", Path.is_dir
    folder.mkdir()
    answers = iter([False])
    monkeypatch.setattr(Path, "is_dir", lambda path: next(answers, is_dir(path)))
    assert not make_folder(folder, lambda partial: pytest.fail("made again"))
    assert list(tmp_path.iterdir()) == [folder]


def test_the_lock_is_there_until_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def look(path: Path, to: Path) -> Path:
        assert (path / LOCK).exists()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", look)
    assert make_folder(tmp_path / "data-x", lambda partial: None)
    assert not list((tmp_path / "data-x").iterdir())


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; set DISTLM_TEST_DATA")
def test_gzip_parquet_and_plain_files_of_poems_give_the_same_samples(cache: Path, tmp_path: Path) -> None:
    with open(REAL_DATA / "tang_poems" / "train.jsonl", encoding="utf-8") as file:
        lines = list(itertools.islice(file, 1500))
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress("".join(lines).encode("gb18030")))
    pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in lines]}), tmp_path / "a.parquet")
    found = []
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.xz", "a.parquet"):
        encoding = "gb18030" if name == "b.jsonl.xz" else "utf-8"
        data = Data([Files([str(tmp_path / name)], encoding=encoding)], max_seq_length=128)
        prepared = prepare_data(data, TokenizerSettings(train=Train(vocab_size=4000)), cache)
        found.append((prepared.info.train.content_sha256, content(prepared)))
    assert all(one == found[0] for one in found)
    assert prepared.info.train.num_documents == 1342
