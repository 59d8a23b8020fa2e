"""Which samples each of 4,096 workers trains on, out of 10^12, wherever in the training it begins.

    python benchmarks/data_order.py [--samples 1000000000000] [--workers 4096] [--micro-batch 32] [--repeat 50]

For data sets of 10^6 samples and more, and for a mixture of two weighted sources: microseconds that a worker needs to
find the samples of a micro batch, at the start and after ten epochs, and the bytes that it holds for that. Then the
same for a step of 32 micro batches whose samples are grouped by length: for the first step of a window, which sorts it,
and for those after it. Then checks on a whole epoch of a smaller data set that the workers' samples are disjoint and
complete. Goals: time and memory do not grow with the samples; every sample exactly once per epoch.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc

import numpy as np

from distlm.config.resolve import BatchPlan
from distlm.data.batches import BATCHES_PER_WINDOW, StepOrder
from distlm.data.order import SampleOrder

_EPOCH_OF_CHECK = 1_000_003


def microseconds(order: SampleOrder, first: int, count: int, repeat: int) -> float:
    """Median over places a micro batch apart, as the steps of a worker have them."""
    times = []
    for number in range(repeat):
        started = time.perf_counter()
        order.samples(first + number * count, count)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def peak_bytes(order: SampleOrder, first: int, count: int) -> int:
    tracemalloc.start()
    order.samples(first, count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def microseconds_by_length(size: int, plan: BatchPlan, repeat: int) -> tuple[float, float]:
    """Medians for the first step of a window and for the others, in the eleventh epoch. The lengths, which a worker
    holds in 4 bytes a sample, are all the same here, so that they take no memory."""
    lengths = np.broadcast_to(np.int32(20), size)
    steps = StepOrder(SampleOrder([size], None, seed=42), plan, lengths, True, 20 * plan.micro_batch, seed=42)
    first_of_epoch = -(-10 * size // plan.global_batch) + 1
    times = []
    for step in range(first_of_epoch, first_of_epoch + max(2, repeat // 10) * BATCHES_PER_WINDOW):
        started = time.perf_counter()
        steps.step(step)
        times.append(time.perf_counter() - started)
    firsts = times[::BATCHES_PER_WINDOW]
    others = [seconds for number, seconds in enumerate(times) if number % BATCHES_PER_WINDOW]
    return statistics.median(firsts) * 1e6, statistics.median(others) * 1e6


def check_epoch(num_workers: int, micro_batch: int) -> None:
    """Every sample of the second epoch is one worker's, once. Raises AssertionError."""
    order = SampleOrder([_EPOCH_OF_CHECK], None, seed=42)
    seen = np.zeros(_EPOCH_OF_CHECK, np.int64)
    num_micro_batches = -(-2 * _EPOCH_OF_CHECK // micro_batch)
    for worker in range(num_workers):
        for micro in range(worker, num_micro_batches, num_workers):
            first = micro * micro_batch
            if first + micro_batch > _EPOCH_OF_CHECK:
                passes, indices = order.samples(first, micro_batch)
                np.add.at(seen, indices[passes == 1], 1)
    assert (seen == 1).all(), "a sample was left out or came twice"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**12)
    parser.add_argument("--workers", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()
    sizes = [size for size in (10**6, 10**9) if size < options.samples] + [options.samples]
    orders = {f"{size:,} samples": SampleOrder([size], None, seed=42) for size in sizes}
    third = options.samples // 3
    orders[f"{options.samples:,} samples, 2 weighted sources"] = SampleOrder(
        [third, options.samples - third], [3.0, 1.0], seed=42
    )
    for name, order in orders.items():
        later = 10 * order.num_samples + order.num_samples // 2
        at_start, at_end = (microseconds(order, first, options.micro_batch, options.repeat) for first in (0, later))
        held = peak_bytes(order, later, options.micro_batch)
        print(f"{name:48s} {at_start:7.0f} us at the start {at_end:7.0f} us after 10.5 epochs {held:9,d} bytes")
    plan = BatchPlan(32 * options.micro_batch, options.micro_batch, 1)
    for size in sizes:
        first, other = microseconds_by_length(size, plan, options.repeat)
        print(f"{f'{size:,} samples, by length':48s} {first:7.0f} us for the first step of a window {other:5.0f} us")
    check_epoch(options.workers, options.micro_batch)
    print(
        f"{options.workers:,} workers x {options.micro_batch} samples: each of {_EPOCH_OF_CHECK:,} samples exactly "
        "once in an epoch"
    )


if __name__ == "__main__":
    main()
