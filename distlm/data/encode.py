"""From text to token ids, in bounded memory. Does not import transformers: each process that tokenizes loads this."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

# Bounds on what is in memory at once. An encoding takes some 100 bytes for each token.
_SLICE_CHARACTERS = 2**17
_BATCH_CHARACTERS = 2**18

# Rust threads share the work of a batch; the library switches them off in forked processes unless it is told so.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Encoder:
    """A tokenizer, given as the content of its tokenizer.json, that turns text into ids without special tokens.

    What looks like a special token in the text is text here: no document brings in a [MASK] of its own.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = Tokenizer.from_str(_without_special_pieces(tokenizer_json))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def ids(self, texts: Iterable[str]) -> Iterator[tuple[list[int], bool]]:
        """(ids of a slice, whether it ends its text), in order. A text is one slice unless it is very long."""
        for batch in _batches(piece for text in texts for piece in slices(text, _SLICE_CHARACTERS)):
            encodings = self._tokenizer.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
            for encoding, (_, is_last) in zip(encodings, batch, strict=True):
                yield encoding.ids, is_last


def _without_special_pieces(tokenizer_json: str) -> str:
    """A Unigram vocabulary holds the special tokens as pieces, too, and would find them in the text: they are given
    names that no text has. All ids stay what they are."""
    content = json.loads(tokenizer_json)
    if content["model"]["type"] != "Unigram":
        return tokenizer_json
    special = [token for token in content["added_tokens"] if token["special"]]
    names = {token["content"]: f"\ue000{number}\ue000" for number, token in enumerate(special)}
    for token in special:
        token["content"] = names[token["content"]]
    content["model"]["vocab"] = [(names.get(piece, piece), score) for piece, score in content["model"]["vocab"]]
    return json.dumps(content)


def _batches(slices: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    num_characters = 0
    for piece in slices:
        batch.append(piece)
        num_characters += len(piece[0]) + 100  # very short documents cost memory too
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def slices(text: str, num_characters: int) -> Iterator[tuple[str, bool]]:
    """Slices of at most `num_characters`, and whether each is the last. Cuts are made before a blank, which tokenizers
    that mark the beginning of a word take with the word; text without blanks is cut at the limit."""
    start = 0
    while len(text) - start > num_characters:
        limit = start + num_characters
        end = next((i for i in range(limit, max(start, limit - 1000), -1) if text[i].isspace()), limit)
        yield text[start:end], False
        start = end
    yield text[start:], True
