"""The map of a step from the spans that were measured, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distlm.worker.profile import PHASES, StepProfiler, describe, step_map

SPANS = {
    "step": [(0.0, 1.0), (2.0, 3.0)],
    "data": [(0.0, 0.1), (2.0, 2.1)],
    "forward": [(0.1, 0.5), (2.1, 2.5)],
    "head": [(0.4, 0.5), (2.4, 2.5)],
    "backward": [(0.5, 0.8), (2.5, 2.8)],
    "optimizer": [(0.8, 0.95), (2.8, 2.95)],
    # Two overlap, one begins before the backward pass, and one is the sum of the number of targets, in no phase.
    "communication": [(0.45, 0.55), (0.6, 0.7), (0.65, 0.75), (0.9, 0.95), (2.09, 2.095)],
}


def test_phases_add_up_to_the_step() -> None:
    result = step_map(3, SPANS, num_steps=2)
    assert result.rank == 3 and result.step_s == pytest.approx(1.0)
    assert result.phases_s == pytest.approx(
        {
            "data": 0.1,
            "forward": 0.3,
            "head": 0.1,
            "backward": (0.6 - 0.05 - 0.15) / 2,
            "reduction": (0.05 + 0.15 + 0.05) / 2,
            "optimizer": (0.3 - 0.05) / 2,
            "other": 0.05,
        }
    )
    assert sum(result.phases_s.values()) == pytest.approx(result.step_s)
    assert list(result.phases_s) == list(PHASES)


def test_the_text_names_the_slowest_worker_and_its_share_of_the_peak() -> None:
    quick = step_map(0, SPANS, num_steps=2)
    slow = step_map(1, SPANS | {"step": [(0.0, 1.5), (2.0, 3.5)]}, num_steps=2)
    text = describe([quick, slow], range(10, 13), flops_per_step=3e12, peak_flops=4e12)
    assert "Steps 10 to 12" in text
    assert "1.5000 s per step on the slowest worker, rank 1" in text
    assert "50.0% of 4 TFLOP/s" in text
    assert "| other | 300.0 | 24.0% | 50.0 | 550.0 |" in text


class Engine(torch.nn.Module):
    """Stands in for DeepSpeed's: what the profiler measures of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(256, 256), torch.nn.Linear(256, 4096)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.body(inputs))
        return result

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.zero_grad()


def test_evaluation_between_two_profiled_steps_is_in_no_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    engine: Any = Engine()
    profiler = StepProfiler(range(2, 4), engine, engine.head, torch.device("cpu"))
    inputs = torch.randn(512, 256)
    for step in range(1, 6):
        with profiler.step(step):
            with profiler.phase("data"):
                pass
            with profiler.phase("forward"):
                loss = engine(inputs).sum()
            engine.backward(loss)
            engine.step()
        if profiler.is_done:
            result = profiler.result(tmp_path / "trace.json")
            assert step == 3 and (tmp_path / "trace.json").stat().st_size > 1000
        for _ in range(20):
            engine(inputs)  # an evaluation, ten times as long as a step
    assert min(result.phases_s[phase] for phase in ("data", "forward", "head", "backward", "optimizer")) > 0
    assert result.phases_s["head"] > result.phases_s["forward"], "it multiplies by a matrix 16 times as large"
    assert sum(result.phases_s.values()) == pytest.approx(result.step_s)
    assert "backward" not in vars(engine) and not profiler.is_done
