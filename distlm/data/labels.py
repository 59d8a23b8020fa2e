"""The labels of a data set: what a column of labels holds, as text, and the ids that labels have.

Labels that the training data has not are given ids behind those that it has: a model knows nothing of them, and what it
predicts where they stand is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distlm.config.resolve import nearest_name
from distlm.data.lines import nearest
from distlm.errors import InputError, Problem


@dataclass
class LabelInfo:
    """What info.json tells of labels. All empty where the labels are numbers (regression)."""

    names: list[str]
    """Those that the model knows, then the others, each at its id."""
    num_known: int
    counts: list[int]
    """How often each known one is in the training data."""
    tag_scheme: str = "none"
    """Of the data as it was read; what is learned is iob2, or the labels themselves."""


class Labelled(Protocol):
    """The part of a task's config that is about labels."""

    @property
    def labels(self) -> list[str] | None: ...


def as_label(value: Any) -> str:
    """A label as text: numbers and truth values, too, are names of something."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def as_labels(value: Any, separator: str | None) -> list[str]:
    """The labels of one row: a list, or text that a separator divides."""
    if isinstance(value, str):
        parts: Sequence[Any] = value.split(separator) if separator is not None else [value]
    elif isinstance(value, Sequence):
        parts = value
    else:
        parts = [] if value is None else [value]
    return [label for label in map(as_label, parts) if label]


def known_labels(config: Labelled, found: Iterable[str], of_model: Sequence[str] = ()) -> list[str]:
    """Those that a model is to know, in the order of their ids. That of a pretrained model with the same labels is
    `of_model`: its head then goes on with what it has learned.

    Raises InputError if the training data has one that `task.labels` lacks, or fewer than two.
    """
    present = set(found)
    if config.labels is not None:
        problems = [
            Problem(f"the training data has the label {name!r} too{nearest(name, config.labels)}", "task.labels")
            for name in sorted(present.difference(config.labels))
        ]
        if problems:
            raise InputError(*problems[:10])
        return list(config.labels)
    if len(present) < 2:
        what = f"only the label {next(iter(present))!r}" if present else "no label"
        raise InputError(Problem(f"the training data has {what}; there is nothing to tell apart", "data.train"))
    return list(of_model) if present == set(of_model) else sorted(present, key=_number_or_name)


def _number_or_name(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name


class LabelIds:
    """The ids of labels, which new labels are given as they come."""

    def __init__(
        self, config: Labelled, found: Counter[str], of_model: Sequence[str] = (), tag_scheme: str = "none"
    ) -> None:
        """`found`: how often each label is in the training data. Raises InputError as `known_labels` does."""
        names = known_labels(config, found, of_model)
        self.info = LabelInfo(names, len(names), [found[name] for name in names], tag_scheme)
        self._ids = {name: number for number, name in enumerate(names)}

    def id_of(self, name: str) -> int:
        if name not in self._ids:
            self._ids[name] = len(self._ids)
            self.info.names.append(name)
        return self._ids[name]

    def is_known(self, number: int) -> bool:
        return number < self.info.num_known


def label_weights(class_weights: Any, info: LabelInfo) -> list[float] | None:
    """The weight of each known label; None: all the same. Raises InputError for a name that is no label."""
    names = info.names[: info.num_known]
    if class_weights is None:
        return None
    if class_weights == "balanced":  # as in scikit-learn: n / (labels x count)
        total = sum(info.counts)
        return [total / (len(names) * count) if count else 1.0 for count in info.counts]
    problems = [
        Problem(f"the data has no such label; {nearest_name(name, names)}", f"task.class_weights.{name}")
        for name in class_weights
        if name not in names
    ]
    if problems:
        raise InputError(*problems)
    return [float(class_weights.get(name, 1.0)) for name in names]
