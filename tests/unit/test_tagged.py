"""Words with a label each in samples: every word is labelled once, in its row's place, and seen with what it may be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distlm.config.schema import TokenClassificationTask
from distlm.data import letter_case
from distlm.data.row_encoder import Columns, LabelledRow, RowCounts, Sample
from distlm.data.rows import Row
from distlm.data.samples import IGNORED
from distlm.data.tagged import TaggedRows, Window, WordEncoder, group
from distlm.data.train_tokenizer import train_tokenizer
from distlm.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = ["the quick brown fox jumps over lazy dogs and cats in Oslo near the river", "a b c d e f g"] * 20
TEXT += [f"{letter} x{letter}" for letter in LETTERS]  # each is known alone and inside of words
DROPPED = "\u200b"  # no character is left of it in WordPiece
COLUMNS = Columns(text="text", pair=None, label="label", document="doc", key="data.train.0")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXT, 90, True, 512, "wordpiece")


@cache
def byte_level() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXT, 300, False, 512, "bpe")


TOKENIZERS = {"wordpiece": wordpiece, "byte-level": byte_level}


def random_words(draw: random.Random, count: int) -> list[str]:
    """Of 1 to 30 letters: many are longer than a short sample; some are dropped by a tokenizer."""
    return [
        DROPPED if draw.random() < 0.05 else "".join(draw.choices(LETTERS, k=int(draw.paretovariate(0.8)) % 30 + 1))
        for _ in range(count)
    ]


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [8, 9, 16, 31])
def test_each_word_is_labelled_once_and_no_sample_is_too_long(name: str, length: int) -> None:
    draw, encoder = random.Random(length), WordEncoder(TOKENIZERS[name](), length)
    texts = [random_words(draw, draw.choice([0, 1, 2, 5, 40])) for _ in range(200)]
    for number, (words, windows) in enumerate(zip(texts, encoder.windows(texts, first_text=7), strict=True), start=7):
        labelled: list[int] = []
        for window in windows:
            sample = encoder.sample([window])
            assert len(sample.input_ids) == len(sample.words) == len(sample.token_types) <= length
            places = dict.fromkeys(place for place in sample.words if place is not None)
            assert [place[0] for place in places] == [number] * len(places)
            labelled += [place[1] for place in places]
            assert list(window.words) == words[window.first_word : window.first_word + len(window.tokens)]
            assert len(windows) == 1 or window.labelled, "a sample without a label teaches nothing"
        assert labelled == list(range(len(words)))
        assert len(windows) >= 1


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_have_context_on_both_sides(name: str) -> None:
    """About an eighth of a window, but for the words at the ends of a text."""
    encoder, words = WordEncoder(TOKENIZERS[name](), 34), ["a"] * 100
    ((*windows,),) = encoder.windows([words])
    num_tokens = windows[0].num_tokens // len(windows[0].tokens)  # of a word
    at_least = 3 // num_tokens
    assert at_least >= 1 and len(windows) > 3
    for window in windows:
        first, last = window.first_word, window.first_word + len(window.tokens) - 1
        assert first == 0 or window.labelled.start - first >= at_least
        assert last == len(words) - 1 or last - (window.labelled.stop - 1) >= at_least


def test_a_long_word_is_cut_and_a_dropped_one_stays() -> None:
    encoder = WordEncoder(wordpiece(), 8)
    ((window,), (lost,), *_) = encoder.windows([["x" * 90], [DROPPED]])
    assert window.num_tokens == 6
    assert encoder.sample([lost]).input_ids == [
        wordpiece().cls_token_id,
        wordpiece().unk_token_id,
        wordpiece().sep_token_id,
    ]
    assert encoder.sample([lost]).words == [None, (1, 0), None]


def test_byte_level_words_are_those_of_running_text() -> None:
    words = ["the", "dogs", "near", "Oslo", "don't", ",", "Ünï"]
    ((window,),) = WordEncoder(byte_level(), 64).windows([words])
    assert (
        list(chain.from_iterable(window.tokens))
        == byte_level()(" " + " ".join(words), add_special_tokens=False)["input_ids"]
    )


def test_a_byte_level_tokenizer_that_splits_first_puts_one_blank_before_a_word() -> None:
    """As those of Llama 3 and Qwen 2 do: a blank before each part of a word would give other tokens than training."""
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    words = ["near", "don't", "a1b"]
    ((window,),) = WordEncoder(tokenizer, 64).windows([words])
    assert tokenizer.decode(list(chain.from_iterable(window.tokens))) == " near don't a1b"


# --- documents as context --------------------------------------------------------------------------------------------


def numbered(length: int) -> tuple[WordEncoder, list[list[str]], list[str]]:
    """Texts of one to nine words in documents of one to six texts, and some texts that are longer than a sample."""
    draw = random.Random(length)
    texts, documents = [], []
    for document in range(40):
        for _ in range(draw.randint(1, 6)):
            texts.append(["a"] * draw.choice([0, 1, 3, 9, 9, 3 * length]))
            documents.append(f"d{document}")
    return WordEncoder(wordpiece(), length), texts, documents


@pytest.mark.parametrize("length", [8, 20, 33])
def test_rows_of_a_document_share_samples(length: int) -> None:
    encoder, texts, documents = numbered(length)
    samples: list[list[Window]] = []
    found = list(group(documents, encoder.windows(texts), encoder, "document"))
    assert len(found) == len(texts)
    for complete, num_windows in found:
        samples += complete
        assert num_windows >= 1
    places = []
    for windows in samples:
        sample = encoder.sample(windows)
        assert len(sample.input_ids) <= length
        assert len({documents[window.text] for window in windows}) == 1, "never across documents"
        assert sample.input_ids.count(wordpiece().sep_token_id) == len(windows), "each text ends with a separator"
        places += list(dict.fromkeys(place for place in sample.words if place is not None))
    assert places == [(text, word) for text, words in enumerate(texts) for word in range(len(words))]
    assert any(len(windows) > 2 for windows in samples) or length == 8
    is_divided = [num_windows > 1 for _, num_windows in found]
    for before, after in pairwise(samples):  # as many as fit
        first, last = after[0].text, before[-1].text
        if documents[first] == documents[last] and not is_divided[first] and not is_divided[last]:
            assert not encoder.fits([*before, after[0]])


def test_rows_alone_make_samples_alone() -> None:
    encoder, texts, documents = numbered(20)
    for number, (complete, num_windows) in enumerate(group(documents, encoder.windows(texts), encoder, "row")):
        assert len(complete) == num_windows
        assert all([window.text for window in windows] == [number] for windows in complete)


# --- labels ----------------------------------------------------------------------------------------------------------


def rows_of(data: Sequence[tuple[Any, Any]], documents: Sequence[Any] | None = None) -> list[LabelledRow]:
    return [
        LabelledRow(
            Row({"text": words, "label": tags, "doc": documents[number] if documents else None}, f"f.conll:{number}"),
            COLUMNS,
            number,
        )
        for number, (words, tags) in enumerate(data)
    ]


def encoded(
    rows: list[LabelledRow], is_training: bool = True, length: int = 32, name: str = "wordpiece", **task: Any
) -> tuple[list[Sample], list[str], RowCounts]:
    """(samples, names of the labels, counts)."""
    encoder = TaggedRows(
        TokenClassificationTask(type="token-classification", **task), TOKENIZERS[name](), length, labels_of_model=[]
    )
    info, counts = encoder.learn(lambda: iter(rows)), RowCounts()
    samples = [sample for some in encoder.encode(rows, counts, is_training) for sample in some]
    return samples, info.names, counts


NER = [
    (["Oslo", "jumping", "Xx"], ["B-LOC", "I-LOC", "O"]),
    (["dogs"], ["O"]),
    (["cats", "Anna", "Bo"], ["O", "B-PER", "I-PER"]),
]


def by_word(samples: list[Sample], names: list[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for sample in samples:
        ids = [label for label in sample.labels if label != IGNORED]
        assert len(sample.labels) == len(sample.input_ids)
        for row, label in zip(sample.rows, ids, strict=True):
            found.setdefault(row, []).append(names[label])
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("context", ["row", "document"])
def test_the_first_token_of_a_word_has_its_label(name: str, context: str) -> None:
    samples, names, counts = encoded(rows_of(NER), name=name, context=context)
    assert names == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    assert by_word(samples, names) == {number: tags for number, (_, tags) in enumerate(NER)}
    assert len(samples) == (3 if context == "row" else 1)
    assert counts == RowCounts()


def test_documents_change_samples_and_not_labels() -> None:
    draw = random.Random(5)
    data = [(["a"] * size, draw.choices(["B-X", "I-X", "O"], k=size)) for size in draw.choices(range(30), k=80)]
    documents = [number // 7 for number in range(80)]
    alone, names, _ = encoded(rows_of(data, documents), length=16, tag_scheme="iob2")
    together, _, _ = encoded(rows_of(data, documents), length=16, tag_scheme="iob2", context="document")
    assert by_word(alone, names) == by_word(together, names)
    assert len(together) < len(alone)


def test_all_tokens_of_a_word_are_trained_and_only_trained() -> None:
    rows = rows_of([(["Oslofjordx", "Bergenxyzz"], ["B-LOC", "O"]), (["Oslo", "Oslo"], ["B-LOC", "I-LOC"])])
    samples, names, _ = encoded(rows, label_all_tokens=True, tag_scheme="iob2")
    labels = [names[label] if label != IGNORED else "" for label in samples[0].labels]
    first, second = (wordpiece()(word, add_special_tokens=False)["input_ids"] for word in ("Oslofjordx", "Bergenxyzz"))
    assert len(first) > 1 < len(second)
    assert labels == ["", "B-LOC", *["I-LOC"] * (len(first) - 1), *["O"] * len(second), ""]
    assert samples[0].rows == [0] * (len(first) + len(second))
    evaluated, names, _ = encoded(rows, is_training=False, label_all_tokens=True, tag_scheme="iob2")
    assert by_word(evaluated, names)[0] == ["B-LOC", "O"]


def test_a_label_without_an_inside_goes_on_as_it_is() -> None:
    """There is no I-LOC in the data, and a model cannot learn one; without a scheme B-LOC is a name like others."""
    rows = rows_of([(["Oslofjordx", "a"], ["B-LOC", "O"])])
    for scheme in ("iob2", "none"):
        samples, names, _ = encoded(rows, label_all_tokens=True, tag_scheme=scheme)
        assert names == ["B-LOC", "O"]
        assert len(set(samples[0].labels[1:-2])) == 1 and names[samples[0].labels[1]] == "B-LOC"


def test_schemes_are_converted_and_what_breaks_them_is_counted() -> None:
    rows = rows_of([(["Oslo", "Oslo", "a"], ["B-LOC", "E-LOC", "O"]), (["Bo"], ["S-PER"]), (["a"], ["I-PER"])])
    samples, names, counts = encoded(rows)
    assert by_word(samples, names) == {0: ["B-LOC", "I-LOC", "O"], 1: ["B-PER"], 2: ["B-PER"]}
    assert counts.num_illformed_tags > 0
    with pytest.raises(InputError, match=r"f\.conll:0") as error:
        encoded(rows, tag_scheme="iob2")
    assert error.value.problems[0].key == "data.train.0.label_column"


def test_labels_are_of_one_kind_by_blanks_or_in_lists() -> None:
    lists, names, _ = encoded(rows_of(NER))
    text, same_names, _ = encoded(rows_of([(" ".join(words), " ".join(tags)) for words, tags in NER]))
    assert (text, same_names) == (lists, names)


@pytest.mark.parametrize(
    ("words", "tags", "words_of_message", "key"),
    [
        (["a", "b"], ["O"], "2 words and 1 labels", "data.train.0.label_column"),
        (["a"], None, "1 words and 0 labels", "data.train.0.label_column"),
        (3, ["O"], "neither a list nor text", "data.train.0.text_column"),
        (["a"], 3, "neither a list nor text", "data.train.0.label_column"),
    ],
)
def test_rows_that_do_not_fit_are_named(words: Any, tags: Any, words_of_message: str, key: str) -> None:
    with pytest.raises(InputError) as error:
        encoded(rows_of([*NER, (words, tags)]))
    (problem,) = error.value.problems
    assert words_of_message in problem.message
    assert (problem.key, problem.location) == (key, "f.conll:3")


def test_labels_that_training_has_not_are_counted_and_have_other_ids() -> None:
    encoder = TaggedRows(TokenClassificationTask(type="token-classification"), wordpiece(), 32, [])
    info = encoder.learn(lambda: iter(rows_of(NER)))
    counts = RowCounts()
    held_out = rows_of([(["a", "b"], ["B-ORG", "O"]), (["a"], ["B-ORG"])])
    samples = [sample for some in encoder.encode(held_out, counts, False) for sample in some]
    assert counts.num_unknown_labels == 2
    assert info.num_known == 5 and info.names[5:] == ["B-ORG"]
    assert by_word(samples, info.names) == {0: ["B-ORG", "O"], 1: ["B-ORG"]}
    assert info.counts == [Counter(tag for _, tags in NER for tag in tags)[name] for name in info.names[:5]]


def test_texts_without_words_give_a_sample_without_labels() -> None:
    samples, names, _ = encoded(rows_of([*NER, ([], []), (None, None), ("", "")]))
    assert len(samples) == 6 and all(sample.rows == [] for sample in samples[3:])
    assert by_word(samples, names).keys() == {0, 1, 2}


# --- the case of words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "case"),
    [
        ("oslo", "lower"),
        ("don't", "lower"),
        ("Oslo", "Title"),
        ("O'neil", "Title"),
        ("NATO", "UPPER"),
        ("U.S.", "UPPER"),
        ("A", "one capital"),
        ("iPhone", "miXed"),
        ("McDonald", "miXed"),
        ("(Oslo", "miXed"),
        ("1990", "digits"),
        ("3.5%", "digits"),
        ("A4", "letters and digits"),
        ("...", "other"),
        ("", "other"),
        ("漢字", "other letters"),
    ],
)
def test_classes_of_words(word: str, case: str) -> None:
    if case == "other letters":  # without cases; they have one class, whichever
        assert len({letter_case.token_type(word, True), letter_case.token_type("ひらがな", True)}) == 1
    else:
        assert letter_case.CLASSES[letter_case.token_type(word, True) - 1] == case


def test_first_and_further_tokens_have_types_of_their_own() -> None:
    words = ["oslo", "Oslo", "NATO", "A", "iPhone", "12", "A4", "..."]
    types = [letter_case.token_type(word, is_first) for is_first in (True, False) for word in words]
    assert sorted(types) == list(range(1, letter_case.NUM_TOKEN_TYPES)), "0 is for tokens of no word"


def test_samples_have_the_case_as_token_types() -> None:
    samples, _, _ = encoded(rows_of([(["Oslofjordx", "NATO"], ["B-LOC", "O"])]), case_feature=True)
    sample = samples[0]
    first = np.flatnonzero(np.array(sample.labels) != IGNORED)
    assert [sample.token_type_ids[place] for place in first] == [
        letter_case.token_type("Oslo", True),
        letter_case.token_type("NATO", True),
    ]
    further = [place for place in range(1, len(sample.labels) - 1) if place not in first]
    assert {sample.token_type_ids[place] for place in further if place < first[1]} == {
        letter_case.token_type("Oslo", False)
    }
    assert sample.token_type_ids[0] == sample.token_type_ids[-1] == 0
    plain, _, _ = encoded(rows_of([(["Oslofjordx", "NATO"], ["B-LOC", "O"])]))
    assert plain[0].token_type_ids == () and plain[0].input_ids == sample.input_ids
