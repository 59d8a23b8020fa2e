"""Rows of labelled data out of a config: real files of many formats, and data sets of the library `datasets`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from data_settings import REAL_DATA
from pydantic import TypeAdapter

from distlm.config.schema import Source
from distlm.data import hub
from distlm.data.row_source import LabelledSource, open_labelled
from distlm.data.rows import check_rows, labelled_columns
from distlm.errors import InputError

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}")


def opened(keys: dict[str, Any] | str, cache: Path, *columns: str) -> LabelledSource:
    """The source as a config gives it, in YAML or as a mapping."""
    source = TypeAdapter(Source).validate_python(yaml.safe_load(keys) if isinstance(keys, str) else keys)
    wanted = list(columns) or labelled_columns(source)
    assert check_rows(source, wanted) == []
    cache.mkdir(parents=True, exist_ok=True)
    return open_labelled("data.train.0", source, wanted, cache, lambda progress: None)


def values(keys: dict[str, Any] | str, cache: Path, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values.values()) for row in opened(keys, cache, *columns).rows()]


# ----------------------------------------------------------------------------------------------------------- real files


@needs_real_data
@pytest.mark.parametrize(
    ("split", "sentences", "tokens"), [("train", 14_041, 203_621), ("dev", 3_250, 51_362), ("test", 3_453, 46_435)]
)
def test_conll2003(cache: Path, split: str, sentences: int, tokens: int) -> None:
    rows = values(f"{{source: files, paths: [{REAL_DATA}/conll2003/{split}.conll]}}", cache)
    assert (len(rows), sum(len(words) for words, _ in rows)) == (sentences, tokens)
    assert all(len(words) == len(tags) for words, tags in rows)
    kinds = {tag.partition("-")[2] for _, tags in rows for tag in tags}
    assert kinds == {"", "PER", "LOC", "ORG", "MISC"}


@needs_real_data
@pytest.mark.parametrize(("split", "size"), [("train", 6_920), ("dev", 872), ("test", 1_821)])
def test_sst2_has_no_header(cache: Path, split: str, size: int) -> None:
    config = f"{{source: files, paths: [{REAL_DATA}/sst2/{split}.tsv], column_names: [text, label]}}"
    rows = values(config, cache)
    assert len(rows) == size and {label for _, label in rows} == {"0", "1"}


@needs_real_data
@pytest.mark.parametrize(("split", "size"), [("train", 9_600), ("dev", 1_200), ("test", 1_200)])
def test_chnsenticorp_has_quotes_that_are_text(cache: Path, split: str, size: int) -> None:
    config = f"{{source: files, paths: [{REAL_DATA}/chnsenticorp/{split}.tsv], text_column: text_a}}"
    rows = values(config, cache)
    assert len(rows) == size and {label for _, label in rows} == {"0", "1"}
    assert any('"' in text for text, _ in rows)


@needs_real_data
@pytest.mark.parametrize(("split", "size"), [("train", 10_003), ("test", 3_080)])
def test_banking77_has_line_ends_in_its_fields(cache: Path, split: str, size: int) -> None:
    config = f"{{source: files, paths: [{REAL_DATA}/banking77/{split}.csv], label_column: category}}"
    rows = values(config, cache)
    assert len(rows) == size and len({label for _, label in rows}) == 77
    assert split != "train" or any("\n" in text for text, _ in rows)


@needs_real_data
def test_financial_phrasebank_has_a_delimiter_of_its_own(cache: Path) -> None:
    config = f"""
        source: files
        paths: [{REAL_DATA}/financial_phrasebank/Sentences_50Agree.txt]
        delimiter: "@"
        column_names: [text, label]
    """
    rows = values(config, cache)
    assert Counter(label for _, label in rows) == {"neutral": 2_879, "positive": 1_363, "negative": 604}
    assert any("ñ" in text for text, _ in rows) and not any("@" in text for text, _ in rows)


@needs_real_data
@pytest.mark.parametrize(("split", "size"), [("train", 4_478), ("valid", 500), ("test", 893)])
def test_atis_is_three_parallel_files(cache: Path, split: str, size: int) -> None:
    folder = REAL_DATA / "atis" / split
    config = f"""
        source: parallel
        columns: {{text: {folder}/seq.in, slots: {folder}/seq.out, label: {folder}/label}}
    """
    rows = values(config, cache, "text", "slots", "label")
    assert len(rows) == size
    assert all(len(text.split()) == len(slots.split()) for text, slots, _ in rows)
    assert values(config + "\n        label_column: slots", cache) == [(text, slots) for text, slots, _ in rows]


@needs_real_data
def test_movielens_has_suffixes_that_tell_nothing(cache: Path) -> None:
    ratings = f"""
        source: files
        paths: [{REAL_DATA}/ml-100k/u.data]
        format: tsv
        column_names: [user, item, rating, timestamp]
        text_column: item
        label_column: rating
    """
    rows = values(ratings, cache)
    assert len(rows) == 100_000 and {label for _, label in rows} == set("12345") and rows[0] == ("242", "3")
    flags = ", ".join(f"genre {number}" for number in range(19))
    films = f"""
        source: files
        paths: [{REAL_DATA}/ml-100k/u.item]
        format: tsv
        delimiter: "|"
        column_names: [item, text, date, video date, url, {flags}]
        label_column: genre 5
    """
    found = values(films, cache)
    assert len(found) == 1_682 and found[0] == ("Toy Story (1995)", "1")


# ------------------------------------------------------------------------------------------------------------- datasets


TEXTS = ["one", "two", None, "four"]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A local data set with class labels, lists of them, and words."""
    names = datasets.ClassLabel(names=["neg", "pos"])
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X", "I-X"]))
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": names,
            "ner": tags,
            "tokens": datasets.Sequence(datasets.Value("string")),
        }
    )
    columns = {
        "text": TEXTS,
        "label": [1, 0, -1, None],
        "ner": [[0, 1], [], [2], [0]],
        "tokens": [["a", "b"], [], ["c"], ["d"]],
    }
    folder = tmp_path / "data_set"
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_class_labels_come_as_their_names(parquet: Path, cache: Path, streaming: bool) -> None:
    keys = {"source": "datasets", "path": str(parquet), "streaming": streaming}
    assert values(keys, cache) == [("one", "pos"), ("two", "neg"), (None, None), ("four", None)]
    words = keys | {"text_column": "tokens", "label_column": "ner"}
    source = opened(words, cache)
    assert [row.values for row in source.rows()] == [
        {"tokens": ["a", "b"], "ner": ["O", "B-X"]},
        {"tokens": [], "ner": []},
        {"tokens": ["c"], "ner": ["I-X"]},
        {"tokens": ["d"], "ner": ["O"]},
    ]
    assert [row.place for row in source.rows()][1] == f"{parquet}/train:2" and source.num_rows == 4
    assert len(list(cache.glob("dataset-*"))) == 2
    before = {path: path.stat().st_mtime_ns for path in cache.glob("dataset-*/*.parquet")}
    assert opened(words, cache).identity == source.identity
    assert {path: path.stat().st_mtime_ns for path in cache.glob("dataset-*/*.parquet")} == before


def test_a_copy_of_many_parts_goes_on_where_it_was_killed(
    parquet: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_PART_BYTES", 1)
    rows = hub._Copy._rows

    def break_off(copy: hub._Copy, dataset: Any) -> Iterator[dict[str, Any]]:
        yield from islice(rows(copy, dataset), 2)
        raise KeyboardInterrupt

    keys = {"source": "datasets", "path": str(parquet)}
    with monkeypatch.context() as patch:
        patch.setattr(hub._Copy, "_rows", break_off)
        with pytest.raises(KeyboardInterrupt):
            opened(keys, cache)
    assert values(keys, cache) == [("one", "pos"), ("two", "neg"), (None, None), ("four", None)]
    assert len(list(cache.glob("dataset-*/part-*"))) == 4  # one of them without any text or label


def test_builders_of_local_files(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"t{number}", "label": number % 3, "score": number / 2, "more": "x"} for number in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"{row["text"]}",l{row["label"]}\n' for row in rows))
    limited = {"source": "datasets", "path": "json", "data_files": [f"{tmp_path}/a.jsonl"], "max_documents": 20}
    source = opened(limited, cache, "label", "score", "text")
    assert [tuple(row.values.values()) for row in source.rows()] == [(n % 3, n / 2, f"t{n}") for n in range(20)]
    assert source.settings["reached_limit"] == "max_documents = 20"
    keys = {"source": "datasets", "path": "csv", "data_files": [f"{tmp_path}/*.csv"]}
    assert values(keys, cache) == [(row["text"], f"l{row['label']}") for row in rows]


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (
            {"label_column": "labl"},
            "label_column",
            "no column 'labl'; the columns are 'text', 'label', 'ner', 'tokens'",
        ),
        ({"text_pair_column": "b"}, "text_pair_column", "no column 'b'"),
        ({"text_column": "txt"}, "text_column", "did you mean 'text'?"),
    ],
)
def test_an_unknown_column_of_a_data_set_is_refused_with_its_key(
    parquet: Path, cache: Path, change: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        opened({"source": "datasets", "path": str(parquet)} | change, cache)
    (found,) = caught.value.problems
    assert found.key == f"data.train.0.{key}" and message in found.message
    assert not list(cache.glob("dataset-*"))


# ---------------------------------------------------------------------------------------------------- a labelled source


def test_what_is_wrong_comes_with_the_key_of_the_config(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\nx\ty\n")
    source = opened({"source": "files", "paths": [str(path)]}, cache, "text", "label")
    path.write_text("text\tx\nx\ty\n")
    with pytest.raises(InputError) as caught:
        list(source.rows())
    assert caught.value.problems[0].key == "data.train.0.label_column"
    path.write_bytes(b"text\tlabel\nx\ty\n" + b"x\t\xff\n" * 20)
    with pytest.raises(InputError) as caught:
        list(source.rows())
    assert caught.value.problems[0].key == "data.train.0.encoding"
    assert (source.num_rows, source.num_undecodable_rows) == (21, 20)
    assert source.first_undecodable == f"{path}:3"
    with pytest.raises(InputError, match="a file of the data changed while it was read"):
        source.check_unchanged()


def test_the_identity_of_rows_is_of_what_is_read(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n")
    keys = {"source": "files", "paths": [str(path)], "column_names": ["text", "label"]}
    same = opened(keys, cache).identity
    assert opened(keys | {"label_column": "label", "weight": 2.0}, cache).identity == same
    assert opened(keys | {"column_names": ["label", "text"]}, cache).identity != same
    assert opened(keys, cache, "text").identity != same
