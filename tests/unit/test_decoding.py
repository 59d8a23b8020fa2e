"""Labels of words that go together, against all sequences that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distlm.tasks.decoding import WordDecoder
from distlm.tasks.tags import TagScheme, count_illformed

LABELS = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]


def well_formed(length: int, labels: list[str]) -> list[tuple[int, ...]]:
    sequences = itertools.product(range(len(labels)), repeat=length)
    return [ids for ids in sequences if count_illformed([labels[i] for i in ids], TagScheme.IOB2) == 0]


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS[::-1], ["O", "B", "I"], ["B-A", "I-A", "I-B-C", "B-B-C", "O", "B-D"]]
)
def test_the_most_probable_of_all_well_formed_sequences(labels: list[str]) -> None:
    random = np.random.default_rng(3)
    decoder = WordDecoder(labels, TagScheme.IOB2)
    num_mended = 0
    for length in (1, 2, 3, 5):
        sequences = np.array(well_formed(length, labels))
        for _ in range(40):
            logits = random.normal(0, 2, (length, len(labels))).astype(np.float32)
            log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            totals = log_probabilities[np.arange(length), sequences].sum(1)
            found = decoder.decode(decoder.reduce(logits))
            assert found.tolist() == sequences[totals.argmax()].tolist()
            num_mended += found.tolist() != logits.argmax(-1).tolist()
    assert num_mended > 20, "or nothing was tried"


def test_words_with_labels_of_their_own_stand_for_themselves() -> None:
    logits = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    for labels, scheme in ((["IN", "B", "NN"], TagScheme.NONE), (["I-X", "B-Y", "O"], TagScheme.IOB2)):
        decoder = WordDecoder(labels, scheme)
        reduced = decoder.reduce(logits)
        assert reduced.shape == (7,), "a number for each word is kept, not one for each label"
        assert decoder.decode(reduced).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("labels", [LABELS, ["O"]])
def test_a_text_without_words_has_no_labels(labels: list[str]) -> None:
    assert WordDecoder(labels, TagScheme.IOB2).decode(np.array([])).tolist() == []


def test_logits_of_any_size_are_decoded() -> None:
    decoder = WordDecoder(LABELS, TagScheme.IOB2)
    logits = np.array([[-1e4, 1e4, 0, 0, 0], [0, -1e4, 3e4, 2e4, 0]], np.float32)
    found = [LABELS[i] for i in decoder.decode(decoder.reduce(logits))]
    assert found == ["B-PER", "I-PER"], "I-LOC is 10,000 better than I-PER, and B-LOC before it 20,000 worse"
