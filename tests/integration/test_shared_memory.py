"""Sums and gathers through memory that workers of one host share: the numbers of gloo, on real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_on_ranks

from distlm.worker.shared_memory import SharedMemory

# Several chunks of 8 MiB and a rest; one that has fewer elements than there are ranks in its rest; bf16.
SHAPES = [((5_000_011,), torch.float32), ((2, 2**21 + 1), torch.float32), ((6_000_000,), torch.bfloat16)]


def numbers(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def sum_and_gather() -> list[bool]:
    """Whether it equals what gloo computes, again and again in the same memory."""
    shared = SharedMemory.join()
    assert shared is not None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    equal = []
    for round_number in range(3):
        for shape, dtype in SHAPES:
            mine = numbers(rank + world_size * round_number, shape, dtype)
            assert shared.takes(mine)
            ours, gloo = mine.clone(), mine.clone()
            shared.all_reduce(ours)
            dist.all_reduce(gloo)
            exact = world_size == 2  # with more, gloo adds up in another order
            equal.append(torch.equal(ours, gloo) if exact else torch.allclose(ours, gloo, rtol=2e-2, atol=1e-1))
            parts = [mine if other == rank else torch.zeros_like(mine) for other in range(world_size)]
            shared.all_gather(parts)
            seeds = [other + world_size * round_number for other in range(world_size)]
            equal.append(all(torch.equal(p, numbers(s, shape, dtype)) for p, s in zip(parts, seeds, strict=True)))
    return equal


@pytest.mark.parametrize("world_size", [2, 3])
def test_it_computes_what_gloo_does(world_size: int) -> None:
    for equal in run_on_ranks(sum_and_gather, world_size):
        assert len(equal) == 18
        assert all(equal)


def sum_on_every_rank() -> bytes:
    shared = SharedMemory.join()
    assert shared is not None
    tensor = numbers(dist.get_rank(), (1_000_003,), torch.float32)
    shared.all_reduce(tensor)
    return tensor.numpy().tobytes()


def test_every_rank_has_the_same_bits() -> None:
    first, *others = run_on_ranks(sum_on_every_rank, 3)
    assert others == [first, first]


def join_as_if_elsewhere() -> bool:
    if dist.get_rank() == 1:  # as in another container, where this is the number of another process, or of none
        pid = os.getppid()
        os.getpid = lambda: pid
    return SharedMemory.join() is None


def test_all_go_without_where_one_cannot_map() -> None:
    assert run_on_ranks(join_as_if_elsewhere, 2) == [True, True]


def join_alone() -> bool:
    return SharedMemory.join() is None


def test_one_worker_needs_none() -> None:
    assert run_on_ranks(join_alone, 1) == [True]


def die_in_the_sum() -> None:
    shared = SharedMemory.join()
    assert shared is not None
    shared.all_reduce(torch.ones(3_000_000))
    if dist.get_rank() == 1:
        os._exit(7)
    shared.all_reduce(torch.ones(3_000_000))


def test_the_death_of_a_rank_ends_the_others() -> None:
    with pytest.raises(RankError, match=r"rank 0[\s\S]*(Connection|closed|gloo)"):
        run_on_ranks(die_in_the_sum, 2, timeout_s=60)


def names_left() -> list[str]:
    before = set(Path("/dev/shm").iterdir())
    shared = SharedMemory.join()
    assert shared is not None
    return [str(path) for path in set(Path("/dev/shm").iterdir()) - before]


def test_it_leaves_no_file() -> None:
    assert run_on_ranks(names_left, 2) == [[], []]
