"""From rows of a text, or of a pair of texts, to samples: what text classification is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
from transformers import BatchEncoding, PreTrainedTokenizerFast

from distlm.config.schema import TextClassificationTask
from distlm.data.labels import LabelIds, LabelInfo, as_label, as_labels
from distlm.data.row_encoder import LabelledRow, RowCounts, Sample


class TextRows:
    """See `RowEncoder`. A text that is longer than a sample is cut at its end; of a pair the longer one first."""

    def __init__(
        self,
        task: TextClassificationTask,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_length: int,
        labels_of_model: Sequence[str],
    ) -> None:
        self._task, self._tokenizer, self._max_seq_length = task, tokenizer, max_seq_length
        self._labels_of_model = labels_of_model
        is_single = task.problem_type == "single_label_classification"
        self.label_type = pa.int32() if is_single else pa.float32()
        self.has_token_types = has_token_types(tokenizer)
        self._ids: LabelIds

    def learn(self, training_rows: Callable[[], Iterator[LabelledRow]]) -> LabelInfo:
        if self._task.problem_type == "regression":
            return LabelInfo([], 0, [])
        found = Counter(label for row in training_rows() for label in self._labels(row))
        self._ids = LabelIds(self._task, found, self._labels_of_model)
        return self._ids.info

    def words(self, row: LabelledRow) -> str:
        text = text_of(row, row.text, "text")
        return text if row.columns.pair is None else f"{text}\n{text_of(row, row.pair, 'text_pair')}"

    def encode(self, rows: list[LabelledRow], counts: RowCounts, is_training: bool) -> Iterator[list[Sample]]:
        pairs = [text_of(row, row.pair, "text_pair") for row in rows] if rows[0].columns.pair is not None else None
        texts = [text_of(row, row.text, "text") for row in rows]
        encoded = encode_texts(self._tokenizer, self._max_seq_length, texts, pairs)
        for number, row in enumerate(rows):
            counts.num_truncated_documents += bool(encoded.encodings[number].overflowing)
            input_ids = encoded["input_ids"][number]
            yield [
                Sample(
                    input_ids,
                    encoded["token_type_ids"][number] if self.has_token_types else (),
                    self._targets(row, counts),
                    [row.number],
                    input_ids.count(self._tokenizer.unk_token_id),
                )
            ]

    def _targets(self, row: LabelledRow, counts: RowCounts) -> list[Any]:
        if self._task.problem_type == "regression":
            return [_number(row)]
        ids = [self._ids.id_of(name) for name in self._labels(row)]
        counts.num_unknown_labels += sum(not self._ids.is_known(number) for number in ids)
        if self._task.problem_type == "single_label_classification":
            return ids
        return [float(number in ids) for number in range(len(self._ids.info.names))]

    def _labels(self, row: LabelledRow) -> list[str]:
        """One, unless a text may have several."""
        if self._task.problem_type == "multi_label_classification":
            return as_labels(row.label, self._task.label_separator)
        if isinstance(row.label, list | dict):
            message = "the row holds several labels; set task.problem_type: multi_label_classification"
            raise row.problem(message, "label")
        label = "" if row.label is None else as_label(row.label)
        if not label:
            raise row.problem(f"the row has no label in {row.columns.label!r}; give it one, or remove it", "label")
        return [label]


def has_token_types(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the model is told which text of a pair a token is of."""
    return "token_type_ids" in tokenizer.model_input_names


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, max_seq_length: int, texts: list[str], pairs: list[str] | None
) -> BatchEncoding:
    """input_ids, and token_type_ids where the model is given some, with special tokens and without padding."""
    return tokenizer(
        texts,
        pairs,
        truncation=True,
        max_length=max_seq_length,
        return_attention_mask=False,
        return_token_type_ids=has_token_types(tokenizer),
    )


def text_of(row: LabelledRow, value: Any, column: str) -> str:
    """No text at all is an empty one; a number is written out."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise row.problem("the row holds a list, not text; name a column of text", column)
    return str(value)


def _number(row: LabelledRow) -> float:
    try:
        number = float(row.label)
    except (TypeError, ValueError):
        number = float("nan")
    if number - number != 0:  # infinite or NaN
        message = f"{row.columns.label!r} must hold a number (task.problem_type: regression), not {row.label!r}"
        raise row.problem(message, "label")
    return number
