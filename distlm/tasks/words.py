"""Which tokens are parts of one word, told by the tokens alone; for whole-word masking.

A word is a run of letters, digits and combining marks. Blanks and punctuation end it, and each character of a script
that writes no blanks between words, such as Chinese, is a word of its own.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x4DBF),  # ideographs, from here on
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_METASPACE = "▁"


@dataclass(frozen=True)
class WordParts:
    """Two properties of each token, [V]: a token belongs to the word of the token before it where it `begins_inside` a
    word and that one `ends_inside` a word."""

    begins_inside: NDArray[np.bool_]
    ends_inside: NDArray[np.bool_]

    def continues(self, input_ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether each token of [B, S] goes on with the word of the token before it; the first of a sample does not."""
        result = np.zeros(input_ids.shape, np.bool_)
        result[:, 1:] = self.begins_inside[input_ids[:, 1:]] & self.ends_inside[input_ids[:, :-1]]
        return result


def word_parts(tokenizer: Path) -> WordParts:
    """The parts of words in the vocabulary of the fast tokenizer saved in a folder.

    Raises ValueError for a kind of tokenizer whose tokens do not tell where words begin.
    """
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = _vocabulary(content["model"])
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in content["added_tokens"])])
    parts = WordParts(np.zeros(size, np.bool_), np.zeros(size, np.bool_))
    added = {token["id"] for token in content["added_tokens"]}
    inside = _reader(content)
    for token, number in vocabulary.items():
        if number not in added:
            parts.begins_inside[number], parts.ends_inside[number] = inside(token)
    return parts


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        return {token: number for number, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _reader(content: dict[str, Any]) -> Any:
    """The function from a token to (begins inside a word, ends inside a word) for this kind of tokenizer."""
    model = content["model"]
    if prefix := model.get("continuing_subword_prefix"):
        return lambda token: _word_piece(token, prefix)
    if suffix := model.get("end_of_word_suffix"):
        return lambda token: _suffixed_piece(token, suffix)
    rules = json.dumps([content[part] for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if "ByteLevel" in rules:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return lambda token: _bytes_piece(bytes(byte_of.get(character, 0) for character in token))
    if _METASPACE in rules:
        return _metaspace_piece
    if model["type"] == "WordLevel":
        return lambda token: (False, False)
    raise ValueError(f"the tokens of this {model['type']} tokenizer do not tell where words begin")


def _word_piece(token: str, prefix: str) -> tuple[bool, bool]:
    """What follows a continuation's prefix goes on with the word, whatever the token before; no other token does."""
    text = token.removeprefix(prefix)
    return token.startswith(prefix) and bool(text) and not _stands_alone(text[0]), True


def _suffixed_piece(token: str, suffix: str) -> tuple[bool, bool]:
    """What has the suffix ends its word; a token after one that has not goes on with it."""
    text = token.removesuffix(suffix)
    return text != "" and not _stands_alone(text[0]), text == token


def _metaspace_piece(token: str) -> tuple[bool, bool]:
    text = token.removeprefix(_METASPACE)
    if text.startswith("<0x") and text.endswith(">"):  # one byte of a character outside the vocabulary
        return True, True
    begins_inside = text == token and text != "" and _is_inside(text[0])
    return begins_inside, text == "" or _is_inside(text[-1])


def _bytes_piece(token: bytes) -> tuple[bool, bool]:
    """A token may begin or end in the middle of a character; its first byte then tells enough."""
    text = token.decode("utf-8", "replace")
    if not text:
        return False, False
    is_rest_of_character, begins_letter = token[0] < 0xC0, 0xC3 <= token[0] <= 0xE2  # of a script with blanks
    begins_inside = is_rest_of_character or begins_letter if text[0] == "\ufffd" else _is_inside(text[0])
    ends_inside = text[-1] == "\ufffd" or text.isspace() or _is_inside(text[-1])
    return begins_inside, ends_inside


def _is_inside(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN" and not _stands_alone(character)


def _stands_alone(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _WITHOUT_BLANKS)
