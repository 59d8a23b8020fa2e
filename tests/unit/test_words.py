"""Which tokens belong to one word, for each kind of tokenizer and for scripts with and without blanks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from distlm.tasks.words import word_parts

TEXT = "Unhappily, naïve Москва don't 漢字です x2 (word) हिन्दी"
SPECIAL = ["[UNK]", "[MASK]"]


def word_piece() -> Tokenizer:
    letters = sorted(set(TEXT.lower().replace(" ", "")))
    pieces = [*SPECIAL, "un", "##happi", "##ly", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_level() -> Tokenizer:
    """One token for each byte but in "happ": every character outside ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *alphabet, "ha", "pp", "happ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "a"), ("p", "p"), ("ha", "pp")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    pieces = [*SPECIAL, "▁", "▁U", "nhapp", *sorted(set(TEXT.replace(" ", "")))]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 * len(pieces)) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def words_of(tokenizer: Tokenizer, folder: Path, text: str) -> list[str]:
    """The text of each group of tokens that `word_parts` takes for one word."""
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert 0 not in encoding.ids, "no unknown token in this test"
    continues = word_parts(folder).continues(np.array([encoding.ids]))[0]
    spans: list[tuple[int, int]] = []
    for (start, end), goes_on in zip(encoding.offsets, continues.tolist(), strict=True):
        spans = [*spans[:-1], (spans[-1][0], end)] if goes_on else [*spans, (start, end)]
    return [text[start:end].strip() for start, end in spans if text[start:end].strip()]


EXPECTED = [
    "Unhappily",
    ",",
    "naïve",
    "Москва",
    "don",
    "'",
    "t",
    "漢",
    "字",
    "で",
    "す",
    "x2",
    "(",
    "word",
    ")",
    "हिन्दी",
]


@pytest.mark.parametrize("kind", [word_piece, byte_level, metaspace])
def test_tokens_are_grouped_into_words(tmp_path: Path, kind: object) -> None:
    assert callable(kind)
    tokenizer: Tokenizer = kind()
    words = words_of(tokenizer, tmp_path, TEXT)
    # BERT's pre-tokenizer cuts at combining marks, too; byte-level offsets repeat a character for each of its bytes.
    assert words[:-1] == EXPECTED[:-1] if kind is not word_piece else words[:15] == EXPECTED[:15]
    assert "".join(words).replace(" ", "") == TEXT.replace(" ", "")
    assert len(tokenizer.encode(TEXT).ids) > len(words) + 10


def suffixed() -> Tokenizer:
    letters = sorted({*"unhaply x2("})
    pieces = [*SPECIAL, *letters, *(f"{letter}</w>" for letter in letters)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def test_tokens_with_a_suffix_at_the_end_of_a_word(tmp_path: Path) -> None:
    assert words_of(suffixed(), tmp_path, "unhappy (x2 a") == ["unhappy", "(", "x2", "a"]


def test_tokens_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="BPE tokenizer do not tell where words begin"):
        word_parts(tmp_path)


def test_special_tokens_and_tokens_of_whole_words_are_words(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "[MASK]": 1, "one": 2, "two": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not word_parts(tmp_path).continues(np.array([[0, 1, 2, 3, 3]])).any()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["model"]["type"] == "WordLevel"
