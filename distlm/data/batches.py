"""Which samples a step trains on, and how they are cut into micro batches; numpy only.

Samples of different lengths are padded to one length in their micro batch, and padding costs as much as text. Two
things mend that: steps of samples of like length (`group_by_length`), and micro batches that hold no more than so many
tokens (`max_tokens`). A step is a function of (seed, epoch, index) alone, as the order of the samples is: the same for
every number of workers and for every length of the run, and found from any step without going through those before.

G samples in a step over all workers, W workers; micro batch m of a step is worker m % W's. A position counts the
samples of a whole training from 0, and step s (from 1) trains the positions (s - 1) * G ... s * G - 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distlm.data.order import Int64s, SampleOrder, uniform
from distlm.data.samples import round_up

if TYPE_CHECKING:
    from distlm.config.resolve import BatchPlan

BATCHES_PER_WINDOW = 50
"""Global batches among which samples of like length are brought together. More leave less padding and less chance."""

_WINDOW_STREAM = 4  # of `uniform`; the tasks have 1 to 3

T = TypeVar("T")
Lengths = NDArray[np.integer[Any]]
"""Tokens of each sample, [num_samples]."""


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step over all workers, in the order in which its micro batches take them."""

    passes: Int64s
    """[G]. How often the source of each sample was gone through before."""
    indices: Int64s
    """[G]. Number of each sample in the prepared data."""
    micro_batches: list[slice]
    """Which of the G samples each micro batch holds. The first is the longest where samples are sorted."""


class StepOrder:
    """The steps of a training.

    Args:
        order: the order of the samples, which steps of samples of any length follow as it is.
        plan: how many samples a step has, and a micro batch at most.
        lengths: tokens of each sample as it is trained, special tokens included; None: all are equally long.
        group_by_length: bring samples of like length together. Within an epoch the samples of `BATCHES_PER_WINDOW`
            steps are sorted by length, cut into steps, and the steps shuffled. Each epoch still takes the samples that
            it would have taken; a step in which an epoch ends keeps its own.
        max_tokens: of a micro batch, padding included, unless it is one sample. Where the longest samples of a step
            would exceed it, all micro batches of that step are made smaller by the same factor, so that they are a
            multiple of as many as without it, and every number of workers that divides those divides them, too.

    Raises:
        ValueError: lengths are missing for what depends on them, or are not of the samples of the order.
    """

    def __init__(
        self,
        order: SampleOrder,
        plan: BatchPlan,
        lengths: Lengths | None,
        group_by_length: bool,
        max_tokens: int | None,
        seed: int,
    ) -> None:
        if lengths is None and (group_by_length or max_tokens is not None):
            raise ValueError("grouping by length and a budget of tokens need the lengths of the samples")
        if lengths is not None and len(lengths) != order.num_samples:
            raise ValueError(f"{len(lengths)} lengths were given for {order.num_samples} samples")
        self._order = order
        self._global_batch = plan.global_batch
        self._micro_batch = plan.micro_batch
        self._lengths = lengths
        self._group_by_length = group_by_length
        self._max_tokens = max_tokens
        self._seed = seed
        # One assignment of one tuple, so that threads may ask for different steps at once.
        self._last_window: tuple[range, Int64s, Int64s] = range(0), np.empty(0, np.int64), np.empty(0, np.int64)

        # A step is asked for once for each of its micro batches, and the next ones are prepared meanwhile.
        self.step: Callable[[int], StepSamples] = lru_cache(maxsize=8)(self._step)
        """The samples of a step, counted from 1."""

    def _step(self, step: int) -> StepSamples:
        size = self._global_batch
        if self._group_by_length:
            passes, indices = self._grouped(step - 1)
        else:
            passes, indices = self._order.samples((step - 1) * size, size)
        if self._lengths is None:
            return StepSamples(passes, indices, self._cut(None))
        if self._group_by_length or self._max_tokens is not None:
            longest_first = np.argsort(-self._lengths[indices].astype(np.int64), kind="stable")
            passes, indices = passes[longest_first], indices[longest_first]
        return StepSamples(passes, indices, self._cut(self._lengths[indices]))

    def _grouped(self, batch: int) -> tuple[Int64s, Int64s]:
        """(passes, indices) of a global batch, counted from 0, out of the samples of its window."""
        assert self._lengths is not None
        size = self._global_batch
        window, passes, indices = self._last_window
        if batch not in window:
            window, epoch, number = self._window(batch)
            passes, indices = self._order.samples(window.start * size, len(window) * size)
            longest_first = np.argsort(-self._lengths[indices].astype(np.int64), kind="stable")
            by_chance = np.argsort(uniform(self._seed, epoch, number, np.arange(len(window)), _WINDOW_STREAM))
            rows = longest_first.reshape(len(window), size)[by_chance].flatten()
            passes, indices = passes[rows], indices[rows]
            self._last_window = window, passes, indices
        rows_of_batch = slice((batch - window.start) * size, (batch - window.start + 1) * size)
        return passes[rows_of_batch], indices[rows_of_batch]

    def _window(self, batch: int) -> tuple[range, int, int]:
        """The batches that share a window with this one, their epoch, and the number of the window in the epoch."""
        size, per_epoch = self._global_batch, self._order.num_samples
        epoch = batch * size // per_epoch
        if epoch != ((batch + 1) * size - 1) // per_epoch:
            return range(batch, batch + 1), epoch, 0  # alone, so that no sample changes its epoch
        first, end = -(-epoch * per_epoch // size), (epoch + 1) * per_epoch // size
        number = (batch - first) // BATCHES_PER_WINDOW
        start = first + number * BATCHES_PER_WINDOW
        return range(start, min(start + BATCHES_PER_WINDOW, end)), epoch, number

    def _cut(self, lengths: Lengths | None) -> list[slice]:
        """Micro batches of the samples of a step, of which lengths [G] are given."""
        size, count = self._global_batch, self._global_batch // self._micro_batch
        bounds = _even_bounds(size, count)
        if lengths is not None and self._max_tokens is not None:
            factor = 1
            while not _fits(lengths, bounds, self._max_tokens):  # ends where each holds one sample, at the latest
                factor += 1
                bounds = _even_bounds(size, count * factor)
        return [slice(start, end) for start, end in itertools.pairwise(bounds.tolist())]


def _even_bounds(total: int, count: int) -> Int64s:
    """Where `count` consecutive pieces of `total` samples begin and end, [count + 1]. They differ in size by one at
    most, the larger ones last: there the shorter samples are."""
    small, num_large = divmod(total, count)
    sizes = np.full(count, small, np.int64)
    sizes[count - num_large :] += 1
    return np.concatenate([[0], np.cumsum(sizes)])


def _fits(lengths: Lengths, bounds: Int64s, max_tokens: int) -> bool:
    """Whether pieces of samples that are sorted, longest first, hold `max_tokens` at most, or one sample."""
    rows, longest = np.diff(bounds), round_up(lengths[bounds[:-1]])
    return bool(((rows == 1) | (rows * longest <= max_tokens)).all())


@dataclass(frozen=True)
class EvaluationBatch:
    """Samples of one forward pass of an evaluation."""

    indices: Int64s
    is_counted: bool
    """False: there to give every worker as many forward passes as the others; its sample counts for nothing."""


def evaluation_batches(
    indices: Int64s, lengths: Lengths, batch_size: int, max_tokens: int | None, world_size: int
) -> list[EvaluationBatch]:
    """All batches of an evaluation, a multiple of the workers in number; batch m is worker m % W's.

    Samples come by length, the longest first, so that the batches that workers compute at the same time take them
    equally long. The batches are the same for every number of workers, but for those that count for nothing.

    Args:
        indices: the samples to evaluate, [n], at least one.
        lengths: tokens of each of them, [n].
        batch_size: samples of a batch at most.
        max_tokens: of a batch, padding included, unless it is one sample.
    """
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    indices, lengths = indices[longest_first], lengths[longest_first]
    batches = []
    start = 0
    while start < len(indices):
        longest = max(1, int(round_up(lengths[start])))
        rows = batch_size if max_tokens is None else max(1, min(batch_size, max_tokens // longest))
        batches.append(EvaluationBatch(indices[start : start + rows], is_counted=True))
        start += rows
    filler = EvaluationBatch(indices[-1:], is_counted=False)  # the shortest sample costs least
    return batches + [filler] * (-len(batches) % world_size)


def in_order_of_batches(of_workers: Sequence[Sequence[T]]) -> list[T]:
    """What each worker has of its counted batches of an evaluation, as one list in the order of the batches."""
    rounds = max(map(len, of_workers), default=0)
    return [results[number] for number in range(rounds) for results in of_workers if number < len(results)]
