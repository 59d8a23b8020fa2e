"""Batches made one step ahead: which, in what order, and what becomes of errors."""

from __future__ import annotations

import threading

import pytest

from distlm.worker.prefetch import Prefetcher


def test_the_next_step_is_made_while_this_one_is_computed() -> None:
    made = {step: threading.Event() for step in range(5, 9)}

    def make(step: int) -> str:
        made[step].set()
        return f"batch {step}"

    batches = Prefetcher(make, last_step=7)
    for step in (5, 6, 7):
        assert batches.get(step) == f"batch {step}"
        assert made[step + 1].wait(10) if step < 7 else not made[8].is_set(), "nothing is made beyond the last step"
    assert batches.get(5) == "batch 5", "any step can be asked for"


def test_an_error_comes_with_its_step() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("broken sample")
        return step

    batches = Prefetcher(make, last_step=3)
    assert batches.get(1) == 1
    with pytest.raises(ValueError, match="broken sample"):
        batches.get(2)
