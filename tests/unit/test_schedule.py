"""Learning-rate schedules that need arguments, as a function of the step."""

from __future__ import annotations

from typing import Any

import pytest

from distlm.config.load import load_tree
from distlm.config.schema import RunConfig
from distlm.errors import InputError
from distlm.worker.schedule import learning_rate_schedule


def config(**training: Any) -> RunConfig:
    tree = {
        "model": {"config": {"model_type": "bert"}},
        "tokenizer": {"train": {}},
        "data": {"train": [{"source": "python-docs"}]},
        "training": {"max_steps": 100, "learning_rate": 1.0, **training},
    }
    return load_tree(tree).config


def test_warmup_stable_decay() -> None:
    stable = config(
        lr_scheduler_type="warmup_stable_decay", warmup_steps=10, lr_scheduler_kwargs={"num_decay_steps": 20}
    )
    rate = learning_rate_schedule(stable, 100)
    assert [rate(step) for step in (1, 6, 11, 50, 81)] == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert rate(91) == pytest.approx(0.5) and 0 <= rate(100) < 0.02
    assert all(rate(step) >= rate(step + 1) for step in range(80, 100))


def test_polynomial_ends_at_lr_end() -> None:
    kwargs = {"lr_end": 0.02, "power": 1.0}
    rate = learning_rate_schedule(
        config(lr_scheduler_type="polynomial", warmup_steps=0.1, lr_scheduler_kwargs=kwargs), 100
    )
    assert [rate(step) for step in (6, 11, 56)] == pytest.approx([0.5, 1.0, 0.51])
    assert rate(101) == pytest.approx(0.02)


def test_a_decay_that_does_not_fit_is_refused() -> None:
    short = config(
        lr_scheduler_type="warmup_stable_decay", warmup_steps=10, lr_scheduler_kwargs={"num_decay_steps": 91}
    )
    with pytest.raises(InputError, match="91 and the 10 steps of warm-up are more than the 100 steps"):
        learning_rate_schedule(short, 100)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(InputError, match="num_decay_steps"):
        learning_rate_schedule(config(lr_scheduler_type="warmup_stable_decay"), 100)
