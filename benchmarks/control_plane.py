"""How long `distlm --help` and `distlm validate` take, against the start of the bare interpreter in the same run.

    python benchmarks/control_plane.py [--repeat 20]

Prints the median of each in seconds, and as a multiple of `python -c pass`. Goals: --help below 0.5 s, validate below
1 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "distlm --help": ["-m", "distlm.cli", "--help"],
    "distlm validate": ["-m", "distlm.cli", "validate", "configs/pretrain.yaml"],
    "distlm submit --dry-run": ["-m", "distlm.cli", "submit", "--dry-run", "configs/pretrain.yaml"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    repeat = parser.parse_args().repeat
    # Interleaved, so that a busy moment of the machine hits all of them.
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    baseline = statistics.median(times["python -c pass"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:24s} {median:6.3f} s   {median / baseline:5.1f} x the bare interpreter")


if __name__ == "__main__":
    main()
