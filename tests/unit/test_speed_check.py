"""A node that is slow is named before the first step."""

from __future__ import annotations

from distlm.worker.speed_check import WorkerSpeed, report


def speeds(*flops_per_s: float, all_reduce_s: float = 2e-3) -> list[WorkerSpeed]:
    return [WorkerSpeed(rank, f"node{rank // 2}", flops, all_reduce_s) for rank, flops in enumerate(flops_per_s)]


def test_what_is_alike_is_told_in_one_line() -> None:
    line, problems = report(speeds(31e9, 30e9, 29e9, 28e9))
    assert line == "4 workers on 2 hosts: matrix product 28 GFLOP/s to 31 GFLOP/s, all-reduce of 1 MiB in 2 ms"
    assert problems == []


def test_a_slow_rank_is_named() -> None:
    _, problems = report(speeds(400e12, 410e12, 90e12, 405e12))
    assert problems == [
        "rank 2 on node1 is slow: it computes at 90 TFLOP/s, and others at 405 TFLOP/s; all wait for it in every step"
    ]


def test_of_two_the_slower_one_is_named() -> None:
    _, problems = report(speeds(10e9, 90e9))
    assert len(problems) == 1 and problems[0].startswith("rank 0 on node0 is slow")


def test_a_slow_network_is_named() -> None:
    _, problems = report(speeds(1e9, 1e9, 1e9, 1e9, all_reduce_s=1.5))
    assert len(problems) == 1 and "the network between node0, node1 is slow" in problems[0]
