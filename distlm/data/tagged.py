"""From words with a label each to samples: what token classification is trained on.

A text that does not fit into a sample is covered by windows of whole words, each of which shares about a quarter of its
tokens with the next. Every word is labelled in exactly one window: of the words that two share, the first half in the
first one, so that it has context on both sides.

With `context: document`, consecutive texts of a document stand in one sample, as many as fit, each ended by a
separator: they are context for each other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from distlm.config.schema import TokenClassificationTask
from distlm.data import letter_case
from distlm.data.labels import LabelIds, LabelInfo, as_label
from distlm.data.pack import BlockLayout
from distlm.data.row_encoder import LabelledRow, RowCounts, Sample
from distlm.data.samples import IGNORED
from distlm.errors import InputError, Problem
from distlm.tasks import tags

_SHARED_FRACTION = 4  # one fourth of a window


@dataclass(frozen=True)
class Window:
    """Consecutive words of a text, all or some of which are labelled where the window stands."""

    text: int
    """Number of the text, as its owner counts."""
    words: Sequence[str]
    tokens: list[list[int]]
    """Of each word."""
    first_word: int
    """Number of the first one in the text."""
    labelled: range
    """Numbers of the words to label."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))


@dataclass
class WordSample:
    """A sample made of words; the lists have an element for each token."""

    input_ids: list[int] = field(default_factory=list)
    token_types: list[int] = field(default_factory=list)
    """As `distlm.data.letter_case` has them."""
    words: list[tuple[int, int] | None] = field(default_factory=list)
    """(number of the text, number of the word in it) of a token whose word is labelled here; else None."""

    def add_special(self, token: int | None) -> None:
        if token is not None:
            self._add(token, 0, None)

    def add(self, window: Window) -> None:
        numbers = range(window.first_word, window.first_word + len(window.tokens))
        for number, word, tokens in zip(numbers, window.words, window.tokens, strict=True):
            place = (window.text, number) if number in window.labelled else None
            for position, token in enumerate(tokens):
                self._add(token, letter_case.token_type(word, position == 0), place)

    def _add(self, token: int, token_type: int, word: tuple[int, int] | None) -> None:
        self.input_ids.append(token)
        self.token_types.append(token_type)
        self.words.append(word)


class WordEncoder:
    """Tokens of words, in samples of at most `max_seq_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> None:
        self._backend = _plain_backend(tokenizer)
        # To a tokenizer of bytes the blank before a word is a part of it.
        self._before_word = " " if _is_byte_level(json.loads(self._backend.to_str())["pre_tokenizer"]) else ""
        self._layout = BlockLayout.of(tokenizer, max_seq_length)
        # A word of characters that the tokenizer drops is a word still, and has a label.
        self._nothing = self._layout.pad if self._layout.unknown is None else self._layout.unknown

    def windows(self, texts: Sequence[Sequence[str]], first_text: int = 0) -> Iterator[list[Window]]:
        """The windows of each text, at least one, also of a text without words; texts count from `first_text`."""
        encodings = self._backend.encode_batch(
            [[f"{self._before_word}{word}" for word in words] for words in texts],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        length = self._layout.body_length
        for number, (words, encoding) in enumerate(zip(texts, encodings, strict=True), start=first_text):
            tokens: list[list[int]] = [[] for _ in words]
            for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
                assert word is not None, "without special tokens every token is of a word"
                tokens[word].append(token)
            cuts = _cut([found[:length] or [self._nothing] for found in tokens], length)
            yield [Window(number, words[first : first + len(found)], found, first, told) for found, first, told in cuts]

    def sample(self, windows: Sequence[Window]) -> WordSample:
        """Windows one after the other, which must fit."""
        sample = WordSample()
        sample.add_special(self._layout.first)
        for window in windows:
            sample.add(window)
            sample.add_special(self._layout.separator)
        return sample

    def fits(self, windows: Sequence[Window]) -> bool:
        """Whether these windows have room in one sample."""
        separators = 0 if self._layout.separator is None else len(windows) - 1
        return sum(window.num_tokens for window in windows) + separators <= self._layout.body_length


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
        shared = min(length // _SHARED_FRACTION, length - len(tokens[end]))  # so that the next word has room
        while following > start + 1 and size + len(tokens[following - 1]) <= shared:
            following -= 1
            size += len(tokens[following])
        middle = (following + end + 1) // 2
        yield tokens[start:end], start, range(labelled, middle)
        start, labelled = following, middle


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer without cutting and padding."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _is_byte_level(step: object) -> bool:
    """Whether a pre-tokenizer, as the library writes it, is or has one of bytes."""
    if isinstance(step, dict):
        return step.get("type") == "ByteLevel" or any(map(_is_byte_level, step.values()))
    return isinstance(step, list) and any(map(_is_byte_level, step))


def group(
    documents: Sequence[Any], all_windows: Iterable[list[Window]], encoder: WordEncoder, context: str
) -> Iterator[tuple[list[list[Window]], int]]:
    """For each text (windows of each sample that is complete with it, number of the text's own windows).

    `documents` tell which texts belong together; `context` is that of the task's config.
    """
    pending: list[Window] = []
    document: Any = None
    for number, windows in enumerate(all_windows):
        complete: list[list[Window]] = []
        if context != "document" or len(windows) > 1:
            complete = [*([pending] if pending else []), *([window] for window in windows)]
            pending = []
        elif pending and documents[number] == document and encoder.fits([*pending, *windows]):
            pending += windows
        else:
            complete = [pending] if pending else []
            pending = list(windows)
        document = documents[number]
        if number == len(documents) - 1 and pending:
            complete.append(pending)
        yield complete, len(windows)


class TaggedRows:
    """See `RowEncoder`: words with a label each."""

    label_type = pa.int32()

    def __init__(
        self,
        task: TokenClassificationTask,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_length: int,
        labels_of_model: Sequence[str],
    ) -> None:
        self._task, self._labels_of_model = task, labels_of_model
        self.has_token_types = task.case_feature
        self._encoder = WordEncoder(tokenizer, max_seq_length)
        self._unknown = tokenizer.unk_token_id
        self._scheme = tags.TagScheme.NONE
        self._ids: LabelIds

    def learn(self, training_rows: Callable[[], Iterator[LabelledRow]]) -> LabelInfo:
        asked = self._task.tag_scheme
        self._scheme = tags.detect_scheme(map(_tags, training_rows())) if asked == "auto" else tags.TagScheme(asked)
        if asked == "auto" and self._scheme is tags.TagScheme.NONE:
            _refuse_slips({tag for row in training_rows() for tag in _tags(row)})
        found = Counter(tag for row in training_rows() for tag in self._converted(row))
        self._ids = LabelIds(self._task, found, self._labels_of_model, str(self._scheme))
        return self._ids.info

    def words(self, row: LabelledRow) -> str:
        return " ".join(words_of(row, row.text, "text"))

    def encode(self, rows: list[LabelledRow], counts: RowCounts, is_training: bool) -> Iterator[list[Sample]]:
        spreads = is_training and self._task.label_all_tokens
        names = {row.number: self._converted(row) for row in rows}
        for row in rows:
            if self._scheme is not tags.TagScheme.NONE:
                counts.num_illformed_tags += tags.count_illformed(_tags(row), self._scheme)
            counts.num_unknown_labels += sum(
                not self._ids.is_known(self._ids.id_of(name)) for name in names[row.number]
            )
        all_windows = self._encoder.windows([words_of(row, row.text, "text") for row in rows], rows[0].number)
        documents = [row.document for row in rows]
        for complete, num_windows in group(documents, all_windows, self._encoder, self._task.context):
            counts.num_divided_documents += num_windows > 1
            yield [self._sample(self._encoder.sample(windows), names, spreads) for windows in complete]

    def _converted(self, row: LabelledRow) -> list[str]:
        found = _tags(row)
        if self._scheme is tags.TagScheme.NONE:
            return found
        try:
            return tags.to_iob2(found, self._scheme)
        except ValueError as error:
            raise row.problem(f"{error} (task.tag_scheme: {self._scheme})", "label") from error

    def _sample(self, sample: WordSample, names: dict[int, list[str]], spreads: bool) -> Sample:
        """With `spreads`, tokens that go on with a word are labelled, too."""
        labels, rows = [], []
        previous: tuple[int, int] | None = None
        for place in sample.words:
            if place is None or (place == previous and not spreads):
                labels.append(IGNORED)
            else:
                name = names[place[0]][place[1]]
                labels.append(self._ids.id_of(self._inside(name) if place == previous else name))
                rows.append(place[0])
            previous = place
        token_types = sample.token_types if self.has_token_types else ()
        return Sample(sample.input_ids, token_types, labels, rows, sample.input_ids.count(self._unknown))

    def _inside(self, name: str) -> str:
        """The label of a token that goes on with a word: of B-PER it is I-PER, if there is such a label."""
        inside = f"I{name[1:]}" if name.startswith("B-") and self._scheme is not tags.TagScheme.NONE else name
        return inside if inside in self._ids.info.names else name


def _refuse_slips(labels: set[str]) -> None:
    """Raises InputError where a few labels are no tags and the others are: no entity would be scored."""
    strange = tags.not_tags(labels)
    num_typed = sum(label not in strange and "-" in label for label in labels)
    if strange and num_typed > len(strange):
        shown = ", ".join(map(repr, sorted(strange)[:5]))
        message = f"the labels are tags such as B-PER but for {shown}; mend these, or set it to none (no entities)"
        raise InputError(Problem(message, "task.tag_scheme", "auto"))


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
