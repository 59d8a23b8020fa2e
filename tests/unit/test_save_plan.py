"""When checkpoints are written beside the training, for which a copy of the state is kept in host memory."""

from __future__ import annotations

from typing import Any

import pytest

from distlm.config.schema import TrainingConfig
from distlm.worker.train import saves_beside_training


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"save_steps": 9}, True),
        ({"save_steps": 9, "async_save": False}, False),
        ({"save_steps": 10}, False),
        ({"save_steps": 500}, False),
        ({"save_steps": None}, False),
    ],
)
def test_only_saves_before_the_end_are_beside_training(settings: dict[str, Any], expected: bool) -> None:
    config = TrainingConfig(max_steps=10, **settings)
    assert saves_beside_training(config, last_step=10) is expected
