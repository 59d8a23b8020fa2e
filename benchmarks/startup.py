"""From `distlm submit` to the end of step 1, phase by phase, against torchrun of the same loop.

    python benchmarks/startup.py [configs/pretrain.yaml] [key=value ...] [--repeat 5]

The data is cached by a first run that is not counted; two steps are trained, nothing is evaluated or uploaded. The
phases are those that every run records (distlm/tracking/startup.py), and `cli` is what comes before them. torchrun
starts the workers alone, on a run that is prepared already. The ways are interleaved. Prints medians in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, median_and_spread, prepare, table, torchrun

OVERRIDES = (
    "training.max_steps=2", "training.warmup_steps=1", "training.eval_steps=null", "training.save_steps=null",
    "data.validation_fraction=0", "tracking.log_model=false",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/pretrain.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to train; default: a temporary folder")
    options = parser.parse_args()
    phases: list[dict[str, float]] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        workers = f"resources.num_workers={options.num_workers}"
        overrides = [*OVERRIDES, workers, f"runs_dir={folder / 'runs'}", *options.overrides]
        prepare(options.config, "cache", *overrides)
        for repeat in range(options.repeat):
            phases.append(submit(options.config, overrides, folder / "runs"))
            plain.append(under_torchrun(options, prepare(options.config, f"torchrun-{repeat}", *overrides)))
            print(f"submit {sum(phases[-1].values()):.2f} s, torchrun {plain[-1]:.2f} s", file=sys.stderr)
    print(f"{options.config}, medians of {options.repeat} (smallest-largest). {machine()}\n")
    totals = [sum(one.values()) for one in phases]
    rows = [[name, median_and_spread([one[name] for one in phases])] for name in phases[0]]
    ratio = statistics.median(totals) / statistics.median(plain)
    rows += [
        ["**submit to the end of step 1**", f"**{median_and_spread(totals)}**"],
        ["torchrun to the end of step 1", f"{median_and_spread(plain)} ({ratio:.2f} times that)"],
    ]
    print(table(["phase", "s"], rows))


def submit(config: Path, overrides: list[str], runs_dir: Path) -> dict[str, float]:
    """Seconds of each phase of a run under `distlm submit`."""
    from distlm.metrics_file import read_lines
    from distlm.run_folder import RunFolder
    from distlm.tracking.startup import startup_seconds

    before, started_s = set(runs_dir.glob("*/run.yaml")), time.time()
    command = [sys.executable, "-m", "distlm.cli", "submit", str(config), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (created,) = set(runs_dir.glob("*/run.yaml")) - before
    messages = [message for _, message in read_lines(RunFolder(created.parent).attempts()[0].metrics_jsonl)]
    began_ms = next(message["timestamp_ms"] for message in messages if message.get("event") == "phase")
    return {"cli": began_ms / 1000 - started_s} | startup_seconds(messages)


def under_torchrun(options: argparse.Namespace, run: Path) -> float:
    result = run.parent / "result.json"
    started_s = time.time()
    torchrun(options.num_workers, options.threads, Path(__file__).with_name("common.py"), run, result)
    first_step_at_s: float = json.loads(result.read_text())["first_step_at_s"]
    return first_step_at_s - started_s


if __name__ == "__main__":
    main()
