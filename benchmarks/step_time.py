"""What Ray adds to a step: distlm's loop under `distlm submit` against the same loop under plain torchrun.

    python benchmarks/step_time.py [--shape small] [--steps 40] [--repeat 3]

Both train the same config on CPU workers of this machine; under submit with everything that a user gets: the recorder,
MLflow and system metrics. The time of a step is what distlm itself measures (`time/step_s`, rank 0, without evaluation
and saving), taken over windows of --window steps of which the first is left out. The ways are interleaved. Prints the
median over all windows, and the ratio of the medians of each repetition. Goal: at most 1.02.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SHAPES, machine, median_and_spread, model_config, prepare, table, text_source, torchrun, write_config

Way = Callable[[Path, str], list[float]]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = write_config(folder / "run.yaml", tree(options, folder))
        prepare(config, "cache")  # so that no run has to

        def under_torchrun(config: Path, run_id: str) -> list[float]:
            script, result = Path(__file__).with_name("common.py"), folder / "result.json"
            torchrun(options.num_workers, options.threads, script, prepare(config, run_id), result)
            return windows(
                [(r["step"], r["values"]) for r in json.loads(result.read_text())["reports"]], options.window
            )

        def under_submit(config: Path, run_id: str) -> list[float]:
            return windows(submit(config), options.window)

        ways: dict[str, Way] = {"torchrun": under_torchrun, "distlm submit": under_submit}
        steps: dict[str, list[list[float]]] = {name: [] for name in ways}
        for repeat in range(options.repeat):
            for name, way in ways.items():
                steps[name].append(way(config, f"torchrun-{repeat}"))
                print(f"{name}: {statistics.median(steps[name][-1]):.4f} s", file=sys.stderr)
    report(options, steps)


def windows(reports: list[tuple[int, dict[str, float]]], window: int) -> list[float]:
    """Seconds per step of every window but the first, which warms up."""
    return [values["time/step_s"] for step, values in reports if "time/step_s" in values and step > window]


def submit(config: Path) -> list[tuple[int, dict[str, float]]]:
    """What rank 0 reported of a run under `distlm submit`."""
    from distlm.run_folder import RunFolder
    from distlm.tracking.records import read_metrics

    runs_dir = config.parent / "runs"
    before = set(runs_dir.glob("*/run.yaml"))
    command = [sys.executable, "-m", "distlm.cli", "submit", str(config), "tracking.log_model=false"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (created,) = set(runs_dir.glob("*/run.yaml")) - before
    return [(r.step, dict(r.values)) for r in read_metrics(RunFolder(created.parent)) if r.kind == "metrics"]


def report(options: argparse.Namespace, steps: dict[str, list[list[float]]]) -> None:
    shape = SHAPES[options.shape]
    ratios = [
        statistics.median(submit) / statistics.median(torchrun)
        for torchrun, submit in zip(steps["torchrun"], steps["distlm submit"], strict=True)
    ]
    print(
        f"BERT, {shape['num_hidden_layers']} layers x {shape['hidden_size']}, {options.precision}; "
        f"{options.num_workers} workers with {options.threads} thread(s) each, {options.batch} samples of 128 tokens "
        f"per worker and step; {options.steps} steps in windows of {options.window}, {options.repeat} repetitions; "
        f"median (smallest-largest). {machine()}\n"
    )
    rows = [[name, median_and_spread([s for one in times for s in one], 4)] for name, times in steps.items()]
    print(table(["", "step (s)"], [*rows, ["ratio of the medians", f"**{median_and_spread(ratios, 3)}**"]]))


def tree(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "runs_dir": str(folder / "runs"),
        "model": {"config": model_config("bert", SHAPES[options.shape], 0.1)},
        "tokenizer": {"train": {"vocab_size": 8192, "max_documents": 200}},
        "data": {"train": [{**text_source(), "max_documents": 400}], "validation_fraction": 0.0, "max_seq_length": 128},
        "training": {
            "max_steps": options.steps,
            "global_train_batch_size": options.batch * options.num_workers,
            "per_device_train_batch_size": options.batch,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "mixed_precision": options.precision,
            "logging_steps": options.window,
            "eval_steps": None,
            "save_steps": None,
        },
        "resources": {"num_workers": options.num_workers, "device": "cpu", "cpus_per_worker": options.threads},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--precision", choices=["bf16", "no"], default="no")
    parser.add_argument("--batch", type=int, default=4, help="samples per worker and step")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--window", type=int, default=5, help="steps that are timed together")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to train; default: a temporary folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
