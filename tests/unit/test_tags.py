"""Tags of every scheme give the entities that seqeval reads in them, and IOB2 keeps them."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOB2, IOBES, Entities

from distlm.tasks.tags import TagScheme, count_illformed, detect_scheme, entities, not_tags, to_iob2

REAL_DATA = Path(os.environ.get("DISTLM_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; set DISTLM_TEST_DATA"
)

# Two places next to each other, then a person: one sentence in every spelling.
SPELLINGS = {
    "iob1": ["I-LOC", "I-LOC", "B-LOC", "O", "I-PER"],
    "iob2": ["B-LOC", "I-LOC", "B-LOC", "O", "B-PER"],
    "bioes": ["B-LOC", "E-LOC", "S-LOC", "O", "S-PER"],
    "BILOU": ["B-LOC", "L-LOC", "U-LOC", "O", "U-PER"],
    "BMES": ["B-LOC", "E-LOC", "S-LOC", "O", "S-PER"],
}


def random_tags(places: str, length: int, types: tuple[str, ...] = ("PER", "LOC", "a-b")) -> list[str]:
    """Any tags at all: most such sentences are ill-formed."""
    drawn = random.choices(places, k=length)
    return [place if place == "O" else f"{place}-{random.choice(types)}" for place in drawn]


def conll(file: str) -> list[list[str]]:
    blocks = (REAL_DATA / "conll2003" / file).read_text(encoding="utf-8").split("\n\n")
    return [[line.split()[3] for line in block.splitlines()] for block in blocks if block.strip()]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found_out_and_becomes_iob2(name: str) -> None:
    tags = SPELLINGS[name]
    scheme = detect_scheme([[], ["O", "O"], tags])
    assert scheme is TagScheme(name)
    assert to_iob2(tags, scheme) == SPELLINGS["iob2"]
    assert entities(to_iob2(tags, scheme)) == [("LOC", 0, 1), ("LOC", 2, 2), ("PER", 4, 4)]
    assert count_illformed(tags, scheme) == 0


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        ([], "iob2"),
        ([[], ["O"], ["O", "O"]], "iob2"),
        ([["B-PER", "O", "B-PER"]], "iob2"),  # single B- could be BIOES without its E- and S- as well
        ([["B-PER", "B-PER", "O"]], "iob2"),
        ([["O", "I-PER", "I-LOC", "O"]], "iob1"),
        ([["I-PER"], ["B-PER", "I-PER"], ["B-LOC"]], "iob2"),  # one slip among three entities
        ([["I-PER"], ["I-PER", "B-PER"], ["B-LOC"]], "iob1"),
        ([["B-PER", "I-PER"], ["O", "S-LOC"]], "bioes"),
        ([["B-NAME", "M-NAME", "O"]], "bioes"),
        ([["S-PER"]], "bioes"),
        ([["B", "I", "O", "B"]], "iob2"),
        ([["B", "M", "E", "S"]], "bioes"),
        ([["E", "S", "S", "O"]], "none"),  # English and Spanish
        ([["NNP", "VBZ", "O"]], "none"),
        ([["ORG-B", "ORG-I", "O"]], "none"),
        ([["B-PER", "I-PER", "b-PER"]], "none"),
        ([["", "O"]], "none"),
    ],
)
def test_the_scheme_of_all_sentences_together(sentences: list[list[str]], scheme: str) -> None:
    assert detect_scheme(iter(sentences)) == scheme


def test_labels_that_keep_a_scheme_from_being_found() -> None:
    assert not_tags(["O", "B-PER", "I-PER", "b-PER", "0"]) == ["0", "b-PER"]
    assert not_tags(["O", "E", "S"]) == ["E", "S"]
    assert not_tags(["O", "B-PER", "E", "S"]) == []


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("IOB2", "iob2"), ("bio", "iob2"), ("IOBES", "bioes"), ("bilou", "bioes"), ("IO", "iob1"), ("none", "none")],
)
def test_names_of_schemes(name: str, scheme: str) -> None:
    assert TagScheme(name).value == scheme


def test_an_unknown_name_is_no_scheme() -> None:
    with pytest.raises(ValueError, match="iob9"):
        TagScheme("iob9")


def test_any_sequence_has_the_entities_of_seqeval() -> None:
    random.seed(0)
    for _ in range(5000):
        tags = random_tags(random.choice(["BIO", "BIIIO", "BIOES"]), random.randrange(12))
        expected = get_entities(tags)
        assert entities(tags) == expected, tags
        in_iob2 = to_iob2(tags, TagScheme.BIOES)
        assert entities(in_iob2) == expected, tags
        assert count_illformed(in_iob2, TagScheme.IOB2) == 0
        assert to_iob2(in_iob2, TagScheme.IOB2) == in_iob2


def test_well_formed_sequences_have_the_entities_of_seqevals_strict_mode() -> None:
    random.seed(1)
    num_wellformed: Counter[TagScheme] = Counter()
    for _ in range(5_000):
        for scheme, strict, places in [
            (TagScheme.IOB1, IOB1, "BIIIO"),
            (TagScheme.IOB2, IOB2, "BIO"),
            (TagScheme.BIOES, IOBES, "BIOES"),
        ]:
            tags = random_tags(places, random.randrange(1, 6), types=("X", "Y"))
            if count_illformed(tags, scheme) == 0:
                num_wellformed[scheme] += 1
                expected = [entity.to_tuple()[1:] for entity in Entities([tags], scheme=strict).entities[0]]
                assert [(type_, start, end + 1) for type_, start, end in entities(tags)] == expected, tags
    assert min(num_wellformed.values()) > 500


@pytest.mark.parametrize(
    ("tags", "scheme", "count"),
    [
        (["O", "I-X", "I-X", "I-Y", "B-X"], "iob2", 2),
        (["B-X", "I-X", "B-X", "O", "B-Y"], "iob1", 2),
        (["B-X", "O", "E-X", "S-X", "I-X", "E-X", "B-X"], "bioes", 4),
        (["B-X", "E-Y"], "bioes", 1),
        (["NN", "B-X"], "none", 0),
        ([], "bioes", 0),
    ],
)
def test_breaks_of_a_scheme_are_counted(tags: list[str], scheme: str, count: int) -> None:
    assert count_illformed(tags, TagScheme(scheme)) == count


def test_tags_without_a_type_stay_without_one() -> None:
    assert to_iob2(["I", "I", "B", "O", "I-X", "I"], TagScheme.IOB1) == ["B", "I", "B", "O", "B-X", "B"]
    assert entities(["B", "I", "O", "B"]) == [("_", 0, 1), ("_", 3, 3)]


def test_plain_labels_stay_as_they_are() -> None:
    assert to_iob2(["NN", "I-X", "O"], TagScheme.NONE) == ["NN", "I-X", "O"]


@pytest.mark.parametrize("label", ["NN", "E-PER", "S", "O-PER", "", "ORG-B"])
def test_a_label_that_is_no_tag_of_the_scheme_is_named(label: str) -> None:
    for read in (to_iob2, count_illformed):
        with pytest.raises(ValueError, match=f"'{label}' is no tag of the scheme iob2"):
            read(["O", label], TagScheme.IOB2)


@needs_real_data
def test_conll2003_keeps_all_entities() -> None:
    expected = [
        ("train.conll", {"LOC": 7140, "MISC": 3438, "ORG": 6321, "PER": 6600}, 2),  # two times B-MISC after O
        ("test.conll", {"LOC": 1668, "MISC": 702, "ORG": 1661, "PER": 1617}, 0),
    ]
    for file, num_entities, num_illformed in expected:
        sentences = conll(file)
        assert detect_scheme(sentences) is TagScheme.IOB1
        assert sum(count_illformed(tags, TagScheme.IOB1) for tags in sentences) == num_illformed
        in_iob2 = [to_iob2(tags, TagScheme.IOB1) for tags in sentences]
        assert detect_scheme(in_iob2) is TagScheme.IOB2
        assert sum(count_illformed(tags, TagScheme.IOB2) for tags in in_iob2) == 0
        assert Counter(type_ for tags in in_iob2 for type_, _, _ in entities(tags)) == num_entities
        assert [entities(tags) for tags in in_iob2] == [get_entities(tags) for tags in sentences]


@needs_real_data
def test_schemes_of_real_data() -> None:
    rows = (REAL_DATA / "atis" / "train" / "seq.out").read_text(encoding="utf-8").splitlines()
    assert detect_scheme(row.split() for row in rows) is TagScheme.IOB2
    blocks = (REAL_DATA / "conll2003" / "train.conll").read_text(encoding="utf-8").split("\n\n")
    columns = [[line.split() for line in block.splitlines()] for block in blocks]
    assert detect_scheme([row[1] for row in rows] for rows in columns) is TagScheme.NONE  # parts of speech
    chunks = [[row[2] for row in rows if row[0] != "-DOCSTART-"] for rows in columns]
    assert detect_scheme(chunks) is TagScheme.IOB1
