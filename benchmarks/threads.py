"""How to divide the cores of a machine: workers, threads of each, and whether each keeps to its own cores.

    python benchmarks/threads.py [--shape small|base] [--precision bf16 no] [--batch 16] [--repeat 3]

Every way trains the same config with the same global batch, by distlm's worker loop under torchrun, on all cores that
this process may use: one worker with all cores, one worker per core, and one worker per core with twice the threads,
each with the kernel placing the threads and with each worker bound to its own cores. The ways are interleaved. Prints
the median seconds of a step with the smallest and the largest, and its ratio to what distlm does: the cores are
divided evenly, and the kernel places the threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import throughput
from common import SHAPES, machine, median_and_spread, prepare, table, write_config


def main() -> None:
    options = parse()
    num_cores = len(os.sched_getaffinity(0))
    ways = [
        (num_workers, threads, bound)
        for num_workers, threads in ((num_cores, 1), (1, num_cores), (num_cores, 2))
        for bound in (False, True)
        if num_workers > 1 or not bound  # one worker has all cores in any case
    ]
    for precision in options.precision:
        seconds: dict[tuple[int, int, bool], list[float]] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(options.repeat):
                for way in ways:
                    seconds[way].append(step_seconds(options, Path(folder), precision, way, repeat))
                    print(f"{precision} {way}: {seconds[way][-1]:.3f} s", file=sys.stderr)
        print(
            f"BERT {options.shape}, {precision}; {options.batch} samples of 128 tokens per step in all; "
            f"{options.steps} steps after {options.warmup_steps}, medians of {options.repeat} (smallest-largest). "
            f"{machine()}\n"
        )
        default_s = statistics.median(seconds[ways[0]])
        rows = [
            [
                f"{num_workers} x {threads}{', each bound to its cores' if bound else ''}",
                median_and_spread(times, 3),
                f"{statistics.median(times) / default_s:.2f}",
            ]
            for (num_workers, threads, bound), times in seconds.items()
        ]
        print(table(["workers x threads", "step (s)", "x the default"], rows) + "\n")


def step_seconds(
    options: argparse.Namespace, folder: Path, precision: str, way: tuple[int, int, bool], repeat: int
) -> float:
    num_workers, threads, bound = way
    told = throughput.parse(
        "--num-workers", str(num_workers), "--threads", str(threads), "--batch", str(options.batch // num_workers),
        "--warmup-steps", str(options.warmup_steps), "--steps", str(options.steps), *["--bound"] * bound,
    )  # fmt: skip
    tree = throughput.tree(told, folder, SHAPES[options.shape], precision, dropout=0.1)
    run = prepare(write_config(folder / "run.yaml", tree), f"{num_workers}-{threads}-{bound}-{repeat}")
    return throughput.train_with_distlm(told, run, folder / "result.json").seconds / options.steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--precision", choices=["bf16", "no"], nargs="+", default=["bf16", "no"])
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, over all workers")
    parser.add_argument("--warmup-steps", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
