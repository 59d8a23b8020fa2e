"""From the words of a text to samples: tokens of each word, and texts that are longer than a sample divided.

A text that does not fit is covered by windows of whole words, each of which shares about a quarter of its tokens with
the next. Every word is labelled in exactly one window: of the words that two share, the first half in the first one,
so that it has context on both sides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distlm.config.schema import TokenClassificationTask
from distlm.data.labels import LabelIds, LabelInfo, as_label
from distlm.data.pack import BlockLayout
from distlm.data.row_encoder import LabelledRow, RowCounts, Sample
from distlm.data.samples import IGNORED
from distlm.tasks import tags

_SHARED_FRACTION = 4  # one fourth of a window


@dataclass(frozen=True)
class Window:
    """A sample made of consecutive words."""

    input_ids: list[int]
    words: list[int | None]
    """For each token the number of its word in the text, where the word is labelled in this window; else None."""


class WordEncoder:
    """Tokens of words, special tokens around them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> None:
        self._backend = _with_blanks(tokenizer)
        self._layout = BlockLayout.of(tokenizer, max_seq_length)
        # A word of characters that the tokenizer drops is a word still, and has a label.
        self._nothing = self._layout.pad if self._layout.unknown is None else self._layout.unknown

    def encode(self, texts: Sequence[Sequence[str]]) -> Iterator[list[Window]]:
        """The windows of each text, at least one, also of a text without words."""
        encodings = self._backend.encode_batch(
            [list(words) for words in texts], is_pretokenized=True, add_special_tokens=False
        )
        for words, encoding in zip(texts, encodings, strict=True):
            tokens: list[list[int]] = [[] for _ in words]
            for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
                tokens[word].append(token)
            length = self._layout.body_length
            yield [self._window(*cut) for cut in _cut([found[:length] or [self._nothing] for found in tokens], length)]

    def _window(self, tokens: list[list[int]], first_word: int, labelled: range) -> Window:
        input_ids: list[int] = []
        words: list[int | None] = []

        def add(ids: list[int], word: int | None) -> None:
            input_ids.extend(ids)
            words.extend([word] * len(ids))

        if self._layout.first is not None:
            add([self._layout.first], None)
        for word, ids in enumerate(tokens, start=first_word):
            add(ids, word if word in labelled else None)
        if self._layout.separator is not None:
            add([self._layout.separator], None)
        return Window(input_ids, words)


class TaggedRows:
    """See `RowEncoder`: words with a label each. A text that is longer than a sample becomes several."""

    label_type = pa.int32()
    has_token_types = False

    def __init__(self, task: TokenClassificationTask, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> None:
        self._task = task
        self._encoder = WordEncoder(tokenizer, max_seq_length)
        self._unknown = tokenizer.unk_token_id
        self._scheme = tags.TagScheme.NONE
        self._ids: LabelIds

    def learn(self, training_rows: Callable[[], Iterator[LabelledRow]]) -> LabelInfo:
        asked = self._task.tag_scheme
        self._scheme = tags.detect_scheme(map(_tags, training_rows())) if asked == "auto" else tags.TagScheme(asked)
        found = Counter(tag for row in training_rows() for tag in self._converted(_tags(row)))
        self._ids = LabelIds(self._task, found, str(self._scheme))
        return self._ids.info

    def words(self, row: LabelledRow) -> str:
        return " ".join(words_of(row, row.text, "text"))

    def encode(self, rows: list[LabelledRow], counts: RowCounts, is_training: bool) -> Iterator[list[Sample]]:
        spreads = is_training and self._task.label_all_tokens
        all_windows = self._encoder.encode([words_of(row, row.text, "text") for row in rows])
        for row, windows in zip(rows, all_windows, strict=True):
            found = _tags(row)
            if self._scheme is not tags.TagScheme.NONE:
                counts.num_illformed_tags += tags.count_illformed(found, self._scheme)
            names = self._converted(found)
            counts.num_unknown_labels += sum(not self._ids.is_known(self._ids.id_of(name)) for name in names)
            counts.num_divided_documents += len(windows) > 1
            yield [
                Sample(
                    window.input_ids,
                    (),
                    self._labels(window, names, spreads),
                    window.input_ids.count(self._unknown),
                )
                for window in windows
            ]

    def _converted(self, found: list[str]) -> list[str]:
        return found if self._scheme is tags.TagScheme.NONE else tags.to_iob2(found, self._scheme)

    def _labels(self, window: Window, names: list[str], spreads: bool) -> list[int]:
        """One for each token; with `spreads` also for those that go on with a word."""
        labels = []
        previous: int | None = None
        for word in window.words:
            if word is None or (word == previous and not spreads):
                labels.append(IGNORED)
            elif word == previous:
                labels.append(self._ids.id_of(self._inside(names[word])))
            else:
                labels.append(self._ids.id_of(names[word]))
            previous = word
        return labels

    def _inside(self, name: str) -> str:
        """The label of a token that goes on with a word: of B-PER it is I-PER, if there is such a label."""
        inside = f"I{name[1:]}" if name.startswith("B-") and self._scheme is not tags.TagScheme.NONE else name
        return inside if inside in self._ids.info.names else name


def _tags(row: LabelledRow) -> list[str]:
    """The labels of the words of a row. Raises InputError where they are not as many as the words."""
    words, found = words_of(row, row.text, "text"), words_of(row, row.label, "label")
    if len(words) != len(found):
        raise row.problem(f"the row has {len(words)} words and {len(found)} labels; each word needs one", "label")
    return found


def words_of(row: LabelledRow, value: Any, column: str) -> list[str]:
    """Words or labels: a list, or text that blanks divide."""
    if isinstance(value, str):
        return value.split()
    if value is None:
        return []
    if not isinstance(value, Sequence):
        raise row.problem("the row holds neither a list nor text that blanks divide; name a column of words", column)
    return [as_label(item) for item in value]


def _cut(tokens: list[list[int]], length: int) -> Iterator[tuple[list[list[int]], int, range]]:
    """(tokens of its words, number of the first one, words to label) of each window of at most `length` tokens. No word
    has more tokens than that."""
    start = labelled = 0
    while True:
        end, size = start, 0
        while end < len(tokens) and size + len(tokens[end]) <= length:
            size += len(tokens[end])
            end += 1
        if end == len(tokens):
            yield tokens[start:end], start, range(labelled, end)
            return
        following, size = end, 0
        while following > start + 1 and size + len(tokens[following - 1]) <= length // _SHARED_FRACTION:
            following -= 1
            size += len(tokens[following])
        middle = (following + end + 1) // 2
        yield tokens[start:end], start, range(labelled, middle)
        start, labelled = following, middle


def _with_blanks(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer for single words, as if each stood behind a blank: a byte-level one takes the blank for a part of
    the word. Without cutting and padding."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    _add_prefix_space(content["pre_tokenizer"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _add_prefix_space(step: object) -> None:
    if isinstance(step, dict):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = True
        for value in step.values():
            _add_prefix_space(value)
    elif isinstance(step, list):
        for value in step:
            _add_prefix_space(value)
