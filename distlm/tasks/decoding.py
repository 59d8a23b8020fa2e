"""From a model's scores to labels of words that go together.

Each word's own best label may leave an entity without a beginning (O, I-PER). Where labels are tags, the words of a
text are given the most probable sequence in which every I-PER goes on with a B-PER or I-PER: the Viterbi algorithm
(Viterbi 1967, doi:10.1109/TIT.1967.1054010) over the model's own probabilities. No transition is learned.

T words of a text, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distlm.tasks.tags import TagScheme

_NEVER = -np.inf


class WordDecoder:
    """`labels` are those that the model knows, by their ids."""

    def __init__(self, labels: Sequence[str], scheme: TagScheme) -> None:
        self._follows = np.ones((len(labels), len(labels)), bool)
        self._begins = np.ones(len(labels), bool)
        for number, label in enumerate(labels):
            inside = label if label.startswith("I") and scheme is not TagScheme.NONE else ""
            if (beginning := f"B{inside[1:]}") in labels and inside:  # else nothing is there that it could go on with
                self._begins[number] = False
                self._follows[:, number] = [other in (inside, beginning) for other in labels]
        self._is_free = bool(self._begins.all())

    def reduce(self, logits: NDArray[np.float32]) -> NDArray[np.float32] | NDArray[np.int64]:
        """What `decode` needs of some words of a text, [T, L]: ids [T] where each word stands for itself."""
        return logits.argmax(-1) if self._is_free else logits

    def decode(self, reduced: NDArray[np.float32] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Ids [T] of the labels of all words of a text."""
        if self._is_free or not len(reduced):
            return reduced.reshape(len(reduced)).astype(np.int64)
        ids = reduced.argmax(-1)
        if self._begins[ids[0]] and self._follows[ids[:-1], ids[1:]].all():
            return ids  # and so it is the most probable one
        return self._most_probable(reduced)

    def _most_probable(self, logits: NDArray[Any]) -> NDArray[np.int64]:
        """The Viterbi algorithm. A word's logits differ from its log probabilities by a number that all sequences have
        in common, so they find the same one."""
        transitions = np.where(self._follows, 0.0, _NEVER)  # [from, to]
        best = np.where(self._begins, logits[0], _NEVER)  # of all sequences that end in each label
        came_from = []
        for of_word in logits[1:]:
            by_way_of = best[:, None] + transitions
            came_from.append(by_way_of.argmax(0))
            best = by_way_of.max(0) + of_word
        ids = [int(best.argmax())]
        for previous in reversed(came_from):
            ids.append(int(previous[ids[-1]]))
        return np.array(ids[::-1], np.int64)
