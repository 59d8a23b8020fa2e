"""Files with labels become samples: which ids labels have, what is counted, and which rows are refused, by file, line
and key."""

from __future__ import annotations

import csv
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from distlm.config.schema import DataConfig, Task
from distlm.data.labelled import prepare_labelled
from distlm.data.labels import LabelInfo, as_label, as_labels, label_weights
from distlm.data.prepare import PreparedData
from distlm.data.samples import IGNORED, SampleDataset, Samples, SampleWriter, pad, round_up, sample_schema
from distlm.data.train_tokenizer import train_tokenizer
from distlm.errors import InputError

TEXT_TASK = {"type": "text-classification"}
MULTI_TASK = {**TEXT_TASK, "problem_type": "multi_label_classification"}
REGRESSION = {**TEXT_TASK, "problem_type": "regression"}
WORDS_TASK = {"type": "token-classification"}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


@cache
def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wordpiece/, which tells two texts apart by token types, and bpe/, which does not."""
    folder = tmp_path_factory.mktemp("tokenizers")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder / "wordpiece")
    train_tokenizer([" ".join(WORDS)] * 20, 300, True, 512, "bpe").save_pretrained(folder / "bpe")
    return folder


class Files:
    """Writes data, and prepares it."""

    def __init__(self, folder: Path, tokenizers: Path) -> None:
        self.folder, self.tokenizers = folder, tokenizers

    def jsonl(self, name: str, rows: list[dict[str, Any]]) -> str:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(self.folder / name)

    def csv(self, name: str, rows: list[dict[str, Any]]) -> str:
        with open(self.folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return str(self.folder / name)

    def text(self, name: str, content: str) -> str:
        (self.folder / name).write_text(content)
        return str(self.folder / name)

    def prepare(
        self,
        task: dict[str, Any],
        train: str | list[str],
        validation: str | None = None,
        labels_of_model: tuple[str, ...] = (),
        tokenizer: str = "wordpiece",
        columns: dict[str, Any] | None = None,
        **data: Any,
    ) -> PreparedData:
        def sources(path: str) -> dict[str, Any]:
            return {"source": "files", "paths": [path], **(columns or {})}

        trains = [train] if isinstance(train, str) else train
        tree: dict[str, Any] = {"train": [sources(path) for path in trains], "validation_fraction": 0.0, **data}
        if validation is not None:
            tree["validation"] = [sources(validation)]
        config = DataConfig.model_validate({"max_seq_length": 16, **tree})
        checked = TypeAdapter(Task).validate_python(task)
        cache_folder = self.folder / "cache"
        return prepare_labelled(config, checked, str(self.tokenizers / tokenizer), labels_of_model, cache_folder)  # type: ignore[arg-type]


@pytest.fixture
def files(tmp_path: Path, tokenizers: Path) -> Files:
    return Files(tmp_path, tokenizers)


def samples(prepared: PreparedData, split: str = "train") -> Samples:
    paths = prepared.train_paths if split == "train" else [prepared.validation_path]
    dataset = SampleDataset([path for path in paths if path is not None])
    return dataset[np.arange(len(dataset))]


def texts(prepared: PreparedData, split: str = "train") -> list[str]:
    tokenizer = tokenizer_of(prepared.tokenizer_path)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in samples(prepared, split).input_ids]


def labels(prepared: PreparedData, split: str = "train") -> list[str]:
    """Of texts with one label each."""
    info = prepared.info.labels
    assert info is not None
    return [info["names"][ids[0]] for ids in samples(prepared, split).labels]


def rows(*names: Any, key: str = "label") -> list[dict[str, Any]]:
    """A text for each label."""
    return [{"text": WORDS[number % 5], key: name} for number, name in enumerate(names)]


def refusal(*arguments: Any, **others: Any) -> tuple[str | None, str, str]:
    """(key, message, location) of the one problem."""
    files, *rest = arguments
    with pytest.raises(InputError) as error:
        files.prepare(*rest, **others)
    (problem,) = error.value.problems
    return problem.key, problem.message, problem.location or ""


# --- one label -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_texts_and_their_labels(files: Files, kind: str) -> None:
    data = rows("pos", "neg", "neg", "none of both", "pos")
    prepared = files.prepare(TEXT_TASK, getattr(files, kind)(f"a.{kind}", data))
    assert labels(prepared) == [row["label"] for row in data]
    assert texts(prepared) == [row["text"] for row in data]
    assert prepared.info.labels == {
        "names": ["neg", "none of both", "pos"], "num_known": 3, "counts": [2, 1, 2], "tag_scheme": "none",
    }  # fmt: skip
    assert [found.tolist() for found in samples(prepared).rows] == [[0], [1], [2], [3], [4]]
    assert prepared.info.train.num_documents == prepared.info.train.num_blocks == 5
    assert prepared.info.train.num_tokens == sum(map(len, samples(prepared).input_ids))


def test_numbers_as_labels_are_sorted_as_numbers_and_are_names(files: Files) -> None:
    prepared = files.prepare(TEXT_TASK, files.jsonl("a.jsonl", rows(10, 2, 1.0, "-1", "x", True)))
    assert labels(prepared) == ["10", "2", "1", "-1", "x", "true"]
    assert prepared.info.labels is not None
    assert prepared.info.labels["names"] == ["-1", "1", "2", "10", "true", "x"]


def test_several_sources_are_one_data_set(files: Files) -> None:
    one, other = files.csv("a.csv", rows("b", "c")), files.jsonl("b.jsonl", rows("a", "b"))
    prepared = files.prepare(TEXT_TASK, [one, other])
    assert labels(prepared) == ["b", "c", "a", "b"]
    assert [found.tolist() for found in samples(prepared).rows] == [[0], [1], [2], [3]]
    assert SampleDataset(prepared.train_paths).sizes == [2, 2]
    assert [source["num_train_blocks"] for source in prepared.info.sources["train"]] == [2, 2]


def test_labels_that_only_held_out_rows_have(files: Files) -> None:
    train, held_out = files.csv("a.csv", rows("b", "c", "b")), files.csv("v.csv", rows("c", "a", "d", "a"))
    prepared = files.prepare(TEXT_TASK, train, held_out)
    assert prepared.info.labels == {
        "names": ["b", "c", "a", "d"], "num_known": 2, "counts": [2, 1], "tag_scheme": "none",
    }  # fmt: skip
    assert labels(prepared, "validation") == ["c", "a", "d", "a"]
    assert prepared.info.sources["validation"][0]["num_unknown_labels"] == 3
    assert prepared.info.sources["train"][0]["num_unknown_labels"] == 0


def test_labels_of_the_config_have_its_order(files: Files) -> None:
    train, held_out = files.csv("a.csv", rows("no", "yes")), files.csv("v.csv", rows("yes", "maybe"))
    prepared = files.prepare({**TEXT_TASK, "labels": ["yes", "rarely", "no"]}, train, held_out)
    assert prepared.info.labels == {
        "names": ["yes", "rarely", "no", "maybe"], "num_known": 3, "counts": [1, 0, 1], "tag_scheme": "none",
    }  # fmt: skip
    key, message, _ = refusal(files, {**TEXT_TASK, "labels": ["ja", "noo"]}, files.csv("b.csv", rows("ja", "no")))
    assert key == "task.labels" and "the training data has the label 'no' too" in message and "noo" in message


def test_labels_of_a_pretrained_model_keep_their_ids_where_they_are_the_same(files: Files) -> None:
    train = files.csv("a.csv", rows("a", "b", "c"))
    same = files.prepare(TEXT_TASK, train, labels_of_model=("c", "a", "b"))
    other = files.prepare(TEXT_TASK, train, labels_of_model=("c", "a", "b", "d"))
    assert same.info.labels is not None and other.info.labels is not None
    assert (same.info.labels["names"], other.info.labels["names"]) == (["c", "a", "b"], ["a", "b", "c"])
    assert labels(same) == labels(other) == ["a", "b", "c"]


def test_a_label_alone_is_refused(files: Files) -> None:
    key, message, _ = refusal(files, TEXT_TASK, files.csv("a.csv", rows("a", "a")))
    assert (key, message) == (
        "data.train",
        "the training data has only the label 'a'; there is nothing to tell apart",
    )
    key, message, _ = refusal(files, MULTI_TASK, files.jsonl("b.jsonl", rows([], [])))
    assert key == "data.train" and message.startswith("the training data has no label")


@pytest.mark.parametrize("label", [None, "", "  "])
def test_a_row_without_label_is_refused_by_file_line_and_key(files: Files, label: str | None) -> None:
    path = files.jsonl("a.jsonl", [*rows("a", "b"), {"text": "alpha", "label": label}])
    key, message, location = refusal(files, TEXT_TASK, path)
    assert (key, location) == ("data.train.0.label_column", f"{path}:3")
    assert message == "the row has no label in 'label'; give it one, or remove it"
    good = files.jsonl("b.jsonl", rows("a", "b"))
    assert refusal(files, TEXT_TASK, good, path)[::2] == ("data.validation.0.label_column", f"{path}:3")


def test_lists_where_one_thing_is_wanted(files: Files) -> None:
    key, message, location = refusal(files, TEXT_TASK, files.jsonl("a.jsonl", rows("a", ["b"])))
    assert key == "data.train.0.label_column" and "multi_label_classification" in message and location[-2:] == ":2"
    bad = [*rows("a", "b"), {"text": ["alpha"], "label": "a"}]
    key, message, location = refusal(files, TEXT_TASK, files.jsonl("b.jsonl", bad))
    assert key == "data.train.0.text_column" and "the row holds a list" in message and location[-2:] == ":3"


# --- several labels, and numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lists", "separator"])
def test_any_number_of_labels(files: Files, kind: str) -> None:
    data = [["b", "a"], [], ["c"], ["a", "b", "c"]]
    unseen = [["d", "a"], ["e"], []]
    if kind == "lists":
        task, train, held_out = MULTI_TASK, files.jsonl("a.jsonl", rows(*data)), files.jsonl("v.jsonl", rows(*unseen))
    else:
        task = {**MULTI_TASK, "label_separator": ";"}
        train = files.csv("a.csv", rows(*("; ".join(row) for row in data)))
        held_out = files.csv("v.csv", rows(*("; ".join(row) for row in unseen)))
    prepared = files.prepare(task, train, held_out)
    assert prepared.info.labels == {
        "names": ["a", "b", "c", "d", "e"], "num_known": 3, "counts": [2, 2, 2], "tag_scheme": "none",
    }  # fmt: skip
    found = [row.tolist() for row in samples(prepared).labels]
    assert found == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    # As wide as the labels that were known when the row was written.
    assert pad(samples(prepared, "validation").labels, 0).tolist() == [[1, 0, 0, 1, 0], [0] * 4 + [1], [0] * 5]
    assert samples(prepared).labels[0].dtype == np.float32
    assert prepared.info.sources["validation"][0]["num_unknown_labels"] == 2


def test_numbers_to_predict(files: Files) -> None:
    prepared = files.prepare(REGRESSION, files.jsonl("a.jsonl", rows(1, "2.5", -3e2, True)))
    assert np.concatenate(samples(prepared).labels).tolist() == [1.0, 2.5, -300.0, 1.0]
    assert prepared.info.labels == {"names": [], "num_known": 0, "counts": [], "tag_scheme": "none"}


@pytest.mark.parametrize("value", ["two", None, "", "nan", "inf", [1]])
def test_what_is_no_number_is_refused_by_file_line_and_key(files: Files, value: Any) -> None:
    path = files.jsonl("a.jsonl", rows(1, 2, value))
    key, message, location = refusal(files, REGRESSION, path)
    assert (key, location) == ("data.train.0.label_column", f"{path}:3")
    assert f"'label' must hold a number (task.problem_type: regression), not {value!r}" in message


# --- texts -----------------------------------------------------------------------------------------------------------


def test_pairs(files: Files) -> None:
    data = [{"text": "alpha beta", "other": "gamma", "label": "a"}, {"text": "delta", "other": None, "label": "b"}]
    path = files.jsonl("a.jsonl", data)
    prepared = files.prepare(TEXT_TASK, path, columns={"text_pair_column": "other"})
    tokenizer = tokenizer_of(prepared.tokenizer_path)
    found = samples(prepared)
    assert tokenizer.decode(found.input_ids[0]) == "[CLS] alpha beta [SEP] gamma [SEP]"
    assert found.token_type_ids is not None
    second = found.input_ids[0].tolist().index(tokenizer.sep_token_id) + 1
    assert found.token_type_ids[0].tolist() == [0] * second + [1] * (len(found.input_ids[0]) - second)
    roberta = samples(files.prepare(TEXT_TASK, path, columns={"text_pair_column": "other"}, tokenizer="bpe"))
    assert roberta.token_type_ids is None


def test_long_texts_are_cut_and_counted(files: Files) -> None:
    data = [
        {"text": "alpha " * 14, "label": "a"},  # 14 and two special tokens: just fits
        {"text": "alpha " * 15, "label": "b"},
        {"text": "alpha " * 4000, "label": "b"},
    ]
    prepared = files.prepare(TEXT_TASK, files.jsonl("a.jsonl", data))
    assert list(map(len, samples(prepared).input_ids)) == [16, 16, 16]
    assert prepared.info.sources["train"][0]["num_truncated_documents"] == 2
    assert samples(prepared).input_ids[2][-1] == tokenizer_of(prepared.tokenizer_path).sep_token_id
    pair = [{"text": "alpha " * 3, "other": "beta " * 40, "label": name} for name in "ab"]
    columns = {"text_pair_column": "other"}
    cut = files.prepare(TEXT_TASK, files.jsonl("b.jsonl", pair), columns=columns)
    assert texts(cut)[0].split() == ["alpha"] * 3 + ["beta"] * 10, "the longer one first"
    assert cut.info.sources["train"][0]["num_truncated_documents"] == 2


def test_empty_texts_are_rows_like_others_and_are_counted(files: Files) -> None:
    data = [*rows("a", "b"), {"text": "", "label": "a"}, {"text": "  ", "label": "b"}, {"text": None, "label": "a"}]
    prepared = files.prepare(TEXT_TASK, files.jsonl("a.jsonl", data))
    assert (prepared.info.train.num_documents, prepared.info.train.num_empty_documents) == (2, 3)
    assert labels(prepared) == ["a", "b", "a", "b", "a"]
    assert list(map(len, samples(prepared).input_ids))[2:] == [2, 2, 2]


def test_unknown_tokens_are_counted(files: Files) -> None:
    data = [{"text": "alpha 漢 beta 字", "label": "a"}, {"text": "alpha", "label": "b"}]
    prepared = files.prepare(TEXT_TASK, files.jsonl("a.jsonl", data))
    assert prepared.info.train.num_unknown_tokens == 2


# --- splits and the cache --------------------------------------------------------------------------------------------


def test_a_fraction_is_held_out(files: Files) -> None:
    data = [{"text": f"alpha {'beta ' * (number % 9)}", "label": "ab"[number % 2]} for number in range(400)]
    path = files.jsonl("a.jsonl", data)
    prepared = files.prepare(TEXT_TASK, path, validation_fraction=0.2)
    assert prepared.info.validation is not None
    train, held_out = prepared.info.train.num_blocks, prepared.info.validation.num_blocks
    assert train + held_out == 400 and held_out == pytest.approx(80, abs=30)
    counted = Counter(zip(texts(prepared), labels(prepared), strict=True))
    counted += Counter(zip(texts(prepared, "validation"), labels(prepared, "validation"), strict=True))
    assert counted == Counter((row["text"].strip(), row["label"]) for row in data)
    assert prepared.info.sources["train"][0]["num_train_blocks"] == train
    key, message, _ = refusal(files, TEXT_TASK, files.jsonl("b.jsonl", data[:3]), validation_fraction=0.001)
    assert key == "data.validation_fraction" and "none of the 3 training rows was held out" in message
    assert files.prepare(TEXT_TASK, path).info.validation is None


def test_held_out_texts_that_are_trained_are_counted(files: Files) -> None:
    train = files.csv("a.csv", [{"text": text, "label": label} for text, label in zip(WORDS, "ababa", strict=True)])
    held_out = files.csv(
        "v.csv", [{"text": text, "label": "a"} for text in ("alpha", "beta beta", "gamma", "gamma", "")]
    )
    prepared = files.prepare(TEXT_TASK, train, held_out)
    assert prepared.info.sources["validation"][0]["num_documents_in_training"] == 3


def test_the_cache_is_hit_where_samples_are_the_same(files: Files) -> None:
    path = files.csv("a.csv", rows("a", "b", "a"))
    first = files.prepare(TEXT_TASK, path)
    again = files.prepare({**TEXT_TASK, "class_weights": "balanced", "label_smoothing_factor": 0.1}, path)
    assert (first.cached, again.cached) == (False, True)
    assert again.train_paths == first.train_paths and again.info == first.info
    for change in (
        {"task": {**TEXT_TASK, "labels": ["b", "a"]}},
        {"max_seq_length": 17},
        {"labels_of_model": ("b", "a")},
        {"tokenizer": "bpe"},
    ):
        task: Any = change.pop("task", TEXT_TASK)
        assert not files.prepare(task, path, **change).cached  # type: ignore[arg-type]
    files.csv("a.csv", rows("a", "b", "c"))
    changed = files.prepare(TEXT_TASK, path)
    assert not changed.cached and changed.info.train.content_sha256 != first.info.train.content_sha256


def test_other_labels_are_other_content(files: Files) -> None:
    one = files.prepare(TEXT_TASK, files.csv("a.csv", rows("a", "b", "b")))
    other = files.prepare(TEXT_TASK, files.csv("b.csv", rows("a", "b", "a")))
    same = files.prepare(TEXT_TASK, files.csv("c.csv", rows("a", "b", "a")))
    assert one.info.train.content_sha256 != other.info.train.content_sha256 == same.info.train.content_sha256


def test_nothing_at_all_is_refused(files: Files) -> None:
    good = files.csv("a.csv", rows("a", "b"))
    nothing = files.text("n.csv", "text,label\n")
    for arguments, key in (((nothing,), "data.train.0"), ((good, nothing), "data.validation.0")):
        with pytest.raises(InputError) as error:
            files.prepare(TEXT_TASK, *arguments)
        assert [problem.key for problem in error.value.problems] == [key]


# --- words -----------------------------------------------------------------------------------------------------------

CONLL = """\
-DOCSTART- O

alpha B-X
beta I-X

gamma O

-DOCSTART- O

delta B-Y
epsilon O
"""


def test_conll_with_documents_as_context(files: Files) -> None:
    path = files.text("a.conll", CONLL)
    alone = files.prepare(WORDS_TASK, path)
    together = files.prepare({**WORDS_TASK, "context": "document"}, path)
    assert alone.info.labels == {
        "names": ["B-X", "B-Y", "I-X", "O"], "num_known": 4, "counts": [1, 1, 1, 2], "tag_scheme": "iob2",
    }  # fmt: skip
    assert texts(alone) == ["alpha beta", "gamma", "delta epsilon"]
    tokenizer = tokenizer_of(together.tokenizer_path)
    assert [tokenizer.decode(ids) for ids in samples(together).input_ids] == [
        "[CLS] alpha beta [SEP] gamma [SEP]",
        "[CLS] delta epsilon [SEP]",
    ]
    assert [found.tolist() for found in samples(together).rows] == [[0, 0, 1], [2, 2]]
    wanted = [label for found in samples(alone).labels for label in found if label != IGNORED]
    assert [label for found in samples(together).labels for label in found if label != IGNORED] == wanted
    assert samples(alone).token_type_ids is None


def test_long_texts_of_words_are_divided_and_counted(files: Files) -> None:
    path = files.jsonl("a.jsonl", [{"text": WORDS * 10, "label": ["A", "B"] * 25}, {"text": ["alpha"], "label": ["A"]}])
    prepared = files.prepare(WORDS_TASK, path, max_seq_length=8)
    assert prepared.info.sources["train"][0]["num_divided_documents"] == 1
    assert prepared.info.train.num_documents == 2 and prepared.info.train.num_blocks > 8
    found = samples(prepared)
    assert max(map(len, found.input_ids)) <= 8
    assert Counter(np.concatenate(found.rows).tolist()) == {0: 50, 1: 1}


# --- weights, labels as text, and the file ---------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    found = np.repeat(["a", "b", "c"], [70, 25, 5])
    info = LabelInfo(["a", "b", "c", "unseen"], 3, [70, 25, 5])
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=found)
    assert label_weights("balanced", info) == pytest.approx(expected)
    assert label_weights(None, info) is None
    assert label_weights({"c": 2.5}, info) == [1.0, 1.0, 2.5]
    with pytest.raises(InputError) as error:
        label_weights({"cc": 2.5, "unseen": 1.0}, info)
    assert [problem.key for problem in error.value.problems] == [
        "task.class_weights.cc",
        "task.class_weights.unseen",
    ]


@pytest.mark.parametrize(
    ("value", "separator", "expected"),
    [
        ("a;b ; c", ";", ["a", "b", "c"]),
        ("a;b", None, ["a;b"]),
        (";", ";", []),
        (None, None, []),
        (3.0, None, ["3"]),
        ([True, 2, 2.5, " x "], None, ["true", "2", "2.5", "x"]),
        (["a;b"], ";", ["a;b"]),
    ],
)
def test_labels_as_text(value: Any, separator: str | None, expected: list[str]) -> None:
    assert as_labels(value, separator) == expected
    assert as_label(False) == "false" and as_label(10**20) == "1" + "0" * 20


def test_samples_come_back_from_several_files_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SampleWriter, "_SAMPLES_PER_BATCH", 3)
    written = [(list(range(number)), [number], [number, -1], [0] * number) for number in range(10)]
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, part in zip(paths, (written[:7], [], written[7:]), strict=True):
        with open(path, "wb") as file:
            writer = SampleWriter(file, sample_schema(True, pa.int32()))
            for sample in part:
                writer.add(*sample)
            writer.close()
    dataset = SampleDataset(paths)
    assert dataset.sizes == [7, 0, 3] and dataset.lengths.tolist() == list(range(10))
    order = np.array([9, 0, 3, 3, 6, 7])
    found = dataset[order]
    assert [ids.tolist() for ids in found.input_ids] == [written[number][0] for number in order]
    assert [ids.tolist() for ids in found.labels] == [written[number][1] for number in order]
    assert [ids.tolist() for ids in found.rows] == [written[number][2] for number in order]
    assert found.token_type_ids is not None and len(found) == 6
    for bad in ([10], [-1]):
        with pytest.raises(IndexError):
            dataset[np.array(bad)]
    assert len(SampleDataset([paths[1]])) == 0
    assert pad(found.input_ids[2:4], -7).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert pad(found.input_ids[1:3], -7).tolist() == [[-7, -7, -7], [0, 1, 2]]
    assert pad(found.input_ids[1:3], -7, length=4).tolist() == [[-7] * 4, [0, 1, 2, -7]]


def test_batches_have_few_lengths_and_no_more_than_a_model_has_positions() -> None:
    lengths = np.arange(1, 1025)
    rounded = round_up(lengths)
    assert rounded[:16].tolist() == list(range(1, 17)), "a token is much of a short text"
    assert (rounded >= lengths).all() and (rounded / lengths).max() <= 1.125
    assert len(set(rounded[:128])) == 16 + 3 * 8
    assert {16, 32, 64, 128, 256, 512, 1024} <= set(rounded)
    samples = Samples([np.zeros(3, np.int32), np.zeros(33, np.int32)], None, [], [])
    assert [samples.padded_length(limit) for limit in (512, 36, 35, 33)] == [36, 36, 35, 33]
