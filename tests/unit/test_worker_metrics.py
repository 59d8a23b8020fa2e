"""What a worker measures: speed without pauses, FLOPs against the formula, a node's load in steps that never repeat."""

from __future__ import annotations

import queue
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import BertConfig

from distlm.worker.metrics import (
    StepTimer,
    SystemMonitor,
    forward_flops_per_sample,
    measure_matmul_flops,
    peak_memory_gib,
    training_flops_per_sample,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_speed_leaves_evaluation_and_checkpoints_out() -> None:
    clock = Clock()
    timer = StepTimer(clock)
    for _ in range(2):
        clock.now_s += 3.0
        timer.count(num_samples=6)
    with timer.paused():
        clock.now_s += 50.0
    assert timer.collect(num_tokens=1200) == {
        "time/step_s": 3.0,
        "throughput/tokens_per_s": 200.0,
        "throughput/samples_per_s": 2.0,
    }
    assert timer.collect(num_tokens=0) == {}
    clock.now_s += 2.0
    timer.count(num_samples=6)
    assert timer.collect(num_tokens=0)["time/step_s"] == 2.0


def bert_forward_flops(config: BertConfig, length: int) -> int:
    """Matrix products of BERT's forward pass, 2 FLOPs for each multiplication and addition."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    projections = 2 * length * (4 * hidden**2 + 2 * hidden * intermediate)
    attention = 2 * (2 * length**2 * hidden)  # scores, and their product with the values
    head = 2 * length * hidden * (hidden + config.vocab_size)
    return config.num_hidden_layers * (projections + attention) + head


@pytest.mark.parametrize("length", [16, 64])
def test_flops_are_those_of_the_formula(length: int) -> None:
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    full = bert_forward_flops(config, length)
    assert forward_flops_per_sample(config, length) == full
    assert training_flops_per_sample(full) == 3 * full
    assert training_flops_per_sample(full, has_adapter=True) == 2 * full, "frozen weights have no gradients"
    assert forward_flops_per_sample(config, length, num_predicted=4) == full - 2 * (length - 4) * 32 * (32 + 100)
    assert config._attn_implementation is None, "the model that is trained must not become eager"


def test_matmul_speed_and_memory_have_the_right_magnitude() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < measure_matmul_flops(cpu, torch.float32, seconds=0.01) < 1e14
    now_gib = psutil.Process().memory_info().rss / 2**30
    assert 0.9 * now_gib < peak_memory_gib(cpu) < 20 * now_gib


def test_node_samples_have_mlflow_names_and_steps_that_only_grow() -> None:
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    created_s = time.time() - 1000
    with SystemMonitor(messages.put, node_rank=3, incarnation=2, run_created_s=created_s, interval_s=0.05) as monitor:
        received = [messages.get(timeout=30) for _ in range(3)]
    steps = [message["step"] for message in received]
    assert steps == sorted(set(steps))
    assert steps[0] >= 20_000, "steps count from the run's creation, not from this attempt's beginning"
    assert received[0]["kind"] == "system"
    assert received[0]["incarnation"] == 2
    values = received[0]["values"]
    assert 0 < values["system/3/system_memory_usage_percentage"] < 100
    assert values["system/3/disk_available_megabytes"] > 0
    assert {"cpu_utilization_percentage", "network_receive_megabytes"} <= {key.split("/")[2] for key in values}
    assert not monitor._thread.is_alive()


def test_a_gpu_that_tells_only_its_memory_is_sampled_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def unsupported(gpu: int) -> None:
        raise NVMLError

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=(gpu + 1) * 10**9, total=4 * 10**9),
        nvmlDeviceGetUtilizationRates=unsupported,
        nvmlDeviceGetPowerUsage=lambda gpu: 350_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    values = SystemMonitor(print, node_rank=0, incarnation=0, run_created_s=0).sample()
    assert {key: value for key, value in values.items() if "/gpu_1" in key} == {
        "system/0/gpu_1_memory_usage_percentage": 50.0,
        "system/0/gpu_1_memory_usage_megabytes": 2000.0,
        "system/0/gpu_1_power_usage_watts": 350.0,
        "system/0/gpu_1_power_usage_percentage": 50.0,
    }
