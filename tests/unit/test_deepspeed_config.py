"""The buffers of DeepSpeed: no larger than a model needs, and of a size that DeepSpeed takes."""

from __future__ import annotations

import pytest

from distlm.worker.engine import REDUCE_BUCKET_NUMEL, EngineSettings, deepspeed_config


@pytest.mark.parametrize("num_parameters", [1, 2, 3, 1023, 1025, 12_345_677, 49_999_999, 50_000_001, 10**9 + 1])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_buckets_are_even_whatever_the_number_of_parameters(num_parameters: int, zero_stage: int) -> None:
    zero = deepspeed_config(EngineSettings(zero_stage, num_parameters=num_parameters))["zero_optimization"]
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        size = zero[name]
        assert size % 64 == 0, "DeepSpeed 0.19.8 asserts a multiple of 2"
        assert min(num_parameters, REDUCE_BUCKET_NUMEL) <= size <= min(num_parameters + 1023, REDUCE_BUCKET_NUMEL)
