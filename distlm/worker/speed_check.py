"""How fast each worker computes, and all of them communicate, before the first step of a run on several hosts: a node
that is slow makes all others wait in every step."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_NUM_TRIES = 5
_NUM_BYTES = 2**20
_SLOW_SHARE = 0.4
"""Of what a middling worker reaches."""
_SLOW_ALL_REDUCE_S = 1.0


@dataclass(frozen=True)
class WorkerSpeed:
    """What one rank has measured."""

    rank: int
    host: str
    flops_per_s: float
    """Of a product of two matrices, at best: see `worker.metrics.measure_matmul_flops`."""
    all_reduce_s: float
    """Of 1 MiB over all workers, at best."""


def gather_speeds(device: torch.device, flops_per_s: float) -> list[WorkerSpeed]:
    """Every rank's, on every rank. Collective."""
    numbers = torch.ones(_NUM_BYTES // 4, device=device)
    all_reduce_s = float("inf")
    for _ in range(_NUM_TRIES):
        began_s = time.perf_counter()
        dist.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        all_reduce_s = min(all_reduce_s, time.perf_counter() - began_s)
    speed = WorkerSpeed(dist.get_rank(), socket.gethostname(), flops_per_s, all_reduce_s)
    gathered = [speed] * dist.get_world_size()
    dist.all_gather_object(gathered, speed)
    return gathered


def report(speeds: Sequence[WorkerSpeed]) -> tuple[str, list[str]]:
    """What was measured in one line, and what is wrong, one line each."""
    rates = [speed.flops_per_s for speed in speeds]
    middling = statistics.median_high(rates)
    all_reduce_s = max(speed.all_reduce_s for speed in speeds)
    hosts = list(dict.fromkeys(speed.host for speed in speeds))
    line = (
        f"{len(speeds)} workers on {len(hosts)} hosts: matrix product {_flops(min(rates))} to {_flops(max(rates))}, "
        f"all-reduce of 1 MiB in {all_reduce_s * 1000:.3g} ms"
    )
    problems = [
        f"rank {speed.rank} on {speed.host} is slow: it computes at {_flops(speed.flops_per_s)}, and others at "
        f"{_flops(middling)}; all wait for it in every step"
        for speed in speeds
        if speed.flops_per_s < _SLOW_SHARE * middling
    ]
    if all_reduce_s > _SLOW_ALL_REDUCE_S:
        problems.append(
            f"the network between {', '.join(hosts)} is slow: an all-reduce of 1 MiB takes {all_reduce_s:.1f} s; is "
            "resources.network_interface the right one?"
        )
    return line, problems


def _flops(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.3g} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.3g} GFLOP/s"
