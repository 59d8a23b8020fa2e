"""What the preparation of the data tells: how far it is, and what it has found that its owner should know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distlm.data.readers import MAX_PIECE_CHARACTERS

_MAX_UNKNOWN_SHARE = 0.01


@dataclass(frozen=True)
class PreparationProgress:
    """How far the preparation of the data is."""

    stage: str
    """What is being done, for people."""
    bytes_done: int = 0
    bytes_total: int = 0
    """0: not known."""
    num_documents: int = 0
    num_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_LABELLED = {
    "num_truncated_documents": "longer than data.max_seq_length (cut there)",
    "num_divided_documents": "longer than data.max_seq_length (divided; every word is labelled)",
    "num_illformed_tags": "tags that cannot stand where they do (read as the beginning of an entity)",
    "num_unknown_labels": "labels that the training data does not have (they count as wrong)",
    "num_documents_in_training": "held-out texts that stand in the training data, too",
}
"""What the preparation of labelled data counts, in words."""

Report = Callable[[PreparationProgress], None]


def notes(sources: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """A line for each source of `DataInfo.sources` with something to tell, and a warning for each whose text the
    tokenizer does not know well."""
    for split, source in ((split, source) for split, found in sources.items() for source in found):
        if found := list(_findings(source, is_trained=split == "train")):
            yield f"data: {source['name']}: {', '.join(found)}"
        unknown, tokens = source["num_unknown_tokens"], source["num_tokens"]
        if unknown > _MAX_UNKNOWN_SHARE * tokens:
            yield (
                f"warning: data: {source['name']}: {unknown / tokens:.1%} of the tokens are unknown to the tokenizer; "
                "use one with a larger vocabulary, or of type bpe, which knows all text"
            )


def _findings(source: Mapping[str, Any], is_trained: bool) -> Iterator[str]:
    if is_trained and source["num_tokens"] and not source["num_train_blocks"]:
        yield "all of its text was held out for validation, none is trained"
    if number := source["num_empty_documents"]:
        yield f"{number:,} empty document{'s' * (number > 1)}"
    if number := source["num_huge_documents"]:
        yield f"{number:,} longer than {MAX_PIECE_CHARACTERS:,} characters (cut into slices, all trained)"
    if number := source["num_undecodable_documents"]:
        encoding = source.get("encoding", "utf-8")
        yield f"{number:,} with bytes that are not {encoding} (first: {source['first_undecodable']})"
    for key, text in _LABELLED.items():
        if number := source.get(key):
            yield f"{number:,} {text}"
    if limit := source.get("reached_limit"):
        yield f"read up to {limit}; there is more"
