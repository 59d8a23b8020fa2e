"""The best evaluation so far, and when a training ends since it gets no better."""

from __future__ import annotations

import pytest

from distlm.checkpoint.manifest import Progress
from distlm.config.schema import TrainingConfig
from distlm.worker.patience import Patience


def patience(allowed: int | None = 2, threshold: float = 0.0, greater_is_better: bool = False) -> Patience:
    config = TrainingConfig(max_steps=10, early_stopping_patience=allowed, early_stopping_threshold=threshold)
    return Patience(config, greater_is_better)


@pytest.mark.parametrize(
    ("values", "best", "is_exhausted"),
    [
        ([], [], False),
        ([3.0], [True], False),
        ([3.0, 2.0, 1.0], [True] * 3, False),
        ([3.0, 3.0], [True, False], False),
        ([3.0, 4.0, 5.0], [True, False, False], True),
        ([3.0, 4.0, 2.0, 2.5], [True, False, True, False], False),
        ([3.0, 4.0, 2.0, 2.5, 2.0], [True, False, True, False, False], True),
        ([None], [False], False),
        ([None, None], [False, False], True),
        ([None, 5.0, None, 4.0], [False, True, False, True], False),
        ([5.0, None, None], [True, False, False], True),
    ],
)
@pytest.mark.parametrize("greater_is_better", [False, True])
def test_evaluations_in_a_row_without_a_better_one(
    values: list[float | None], best: list[bool], is_exhausted: bool, greater_is_better: bool
) -> None:
    watched, found = patience(2, greater_is_better=greater_is_better), []
    sign = -1.0 if greater_is_better else 1.0
    for value in values:
        watched.look_at(None if value is None else sign * value)
        found.append(watched.best_is_new)
    assert (found, watched.is_exhausted) == (best, is_exhausted)
    known = [value for value in values if value is not None]
    assert watched.best == (sign * min(known) if known else None)


def test_a_little_better_is_the_best_and_not_better_enough() -> None:
    watched = patience(2, threshold=0.1)
    for value in (1.0, 0.95, 0.9):
        watched.look_at(value)
        assert watched.best_is_new
    assert watched.best == 0.9 and watched.is_exhausted
    watched.look_at(0.7)
    assert not watched.is_exhausted


def test_without_patience_a_training_never_ends_early() -> None:
    watched = patience(None)
    for value in (1.0, *[2.0] * 50):
        watched.look_at(value)
    assert watched.num_without_improvement == 50 and not watched.is_exhausted


def test_it_goes_on_from_a_checkpoint() -> None:
    values = [3.0, 4.0, 2.0, 2.5, 2.0, 1.0]
    straight = patience(3)
    for at, value in enumerate(values):
        straight.look_at(value)
        resumed = patience(3)
        resumed.restore(
            Progress(
                sample_position=at,
                epoch=0,
                best_metric=straight.best,
                num_evaluations_without_improvement=straight.num_without_improvement,
            )
        )
        assert resumed.is_exhausted == straight.is_exhausted
        for later in values[at + 1 :]:
            resumed.look_at(later)
        expected = patience(3)
        for every in values:
            expected.look_at(every)
        assert (resumed.best, resumed.num_without_improvement) == (expected.best, expected.num_without_improvement)
    fresh = patience(3)
    fresh.restore(Progress(sample_position=0, epoch=0))
    fresh.look_at(7.0)
    assert fresh.best_is_new and fresh.best == 7.0
