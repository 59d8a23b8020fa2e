"""Seconds from a fault to the next new step, phase by phase, against raw Ray Train V2 with its own settings.

    python benchmarks/recovery.py [--repeat 3] [FAULT ...]

A small BERT trains on two workers; each repetition of a fault has a run of its own. A new step is one that comes after
the highest step before the fault. `grow` and `shrink` are of elastic runs on a cluster of Ray nodes on this machine: a
node comes, or is killed. The peer has no answer to a worker that hangs, to a dead controller or a dead head.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from common import machine, median_and_spread, table, write_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 128, "max_position_embeddings": 64,
        }
    },
    "tokenizer": {"train": {"vocab_size": 512}},
    "data": {"train": [{"source": "python-docs", "packages": ["json", "email"]}], "max_seq_length": 64,
             "validation_fraction": 0.0},
    "training": {
        "max_steps": 1_000_000, "global_train_batch_size": 32, "per_device_train_batch_size": 16,
        "mixed_precision": "no", "logging_steps": 1, "save_steps": 20,
    },
    "tracking": {"log_model": False},
}  # fmt: skip
TIMEOUT_S = 300.0
STEPS_BEFORE = 30
PHASES = ("detect", "ray", "preflight", "prepare", "place", "import", "build", "load", "first_step")


class Job:
    """A training that is under way in a process of its own, and the steps that it has done."""

    def __init__(self, command: list[str], folder: Path, environ: dict[str, str]) -> None:
        self.folder = folder
        with open(folder / "output.log", "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environ}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def steps(self) -> list[tuple[int, float, int]]:
        """(step, when, number of workers or 0) in the order in which they were done."""
        raise NotImplementedError

    def wait_for_step(self, step: int, since_s: float = 0.0, num_workers: int | None = None) -> float:
        """When such a step, or a later one, was done; by so many workers, where a number is given."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            for done, at_s, workers in self.steps():
                if done >= step and at_s > since_s and num_workers in (None, workers):
                    return at_s
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit((self.folder / "output.log").read_text()[-5000:])

    def highest_step(self) -> int:
        return max(step for step, *_ in self.steps())

    def processes(self, name: str) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return sorted((p for p in found if name in " ".join(p.cmdline()[:4])), key=lambda p: p.pid)

    def end(self) -> None:
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for process in [*processes, self.process]:
            process.kill()
        self.process.wait()


class Distlm(Job):
    """`distlm submit`."""

    def __init__(self, folder: Path, environ: dict[str, str], *overrides: str) -> None:
        config = write_config(folder / "run.yaml", CONFIG)
        self.runs_dir = folder / "runs"
        verb = ["submit", str(config), f"runs_dir={self.runs_dir}", *overrides]
        super().__init__([sys.executable, "-m", "distlm.cli", *verb], folder, environ)

    def messages(self) -> list[dict[str, Any]]:
        from distlm.metrics_file import read_lines
        from distlm.run_folder import RunFolder

        runs = [RunFolder(path.parent) for path in self.runs_dir.glob("*/run.yaml")]
        return [m for run in runs for attempt in run.attempts() for _, m in read_lines(attempt.metrics_jsonl)]

    def steps(self) -> list[tuple[int, float, int]]:
        steps, num_workers = [], 0
        for message in self.messages():
            if message["kind"] == "tags" and "distlm.world_size" in message["tags"]:
                num_workers = int(message["tags"]["distlm.world_size"])
            if message["kind"] == "metrics" and "train/loss" in message["values"]:
                steps.append((message["step"], message["timestamp_ms"] / 1000, num_workers))
        return steps

    def wait_for_restart(self, since_s: float) -> float:
        """When new workers have begun to train: until then the old ones may do another step."""
        deadline = time.monotonic() + TIMEOUT_S
        while "first_step" not in (phases := self.phases(since_s)):
            if time.monotonic() > deadline:
                raise SystemExit((self.folder / "output.log").read_text()[-5000:])
            time.sleep(0.1)
        return since_s + sum(phases.values()) - phases["first_step"]

    def phases(self, since_s: float) -> dict[str, float]:
        """Of the start that followed."""
        ended = [
            (message["phase"], message["timestamp_ms"] / 1000)
            for message in self.messages()
            if message.get("event") == "phase" and message["timestamp_ms"] / 1000 > since_s
        ]
        seconds, before_s = {}, since_s
        for phase, at_s in ended:
            seconds["detect" if phase == "begin" else phase] = at_s - before_s
            before_s = at_s
        return seconds


class RawRayTrain(Job):
    """The peer."""

    def __init__(self, folder: Path, environ: dict[str, str], least: int, most: int) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "raw_ray_train.py"), str(folder), str(least), str(most)]
        super().__init__(command, folder, {**environ, "OMP_NUM_THREADS": "1"})

    def steps(self) -> list[tuple[int, float, int]]:
        path = self.folder / "steps.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(one["step"], one["at_s"], one["num_workers"]) for one in map(json.loads, lines)]


def recover(job: Job, hurt: Callable[[Job], None]) -> tuple[float, dict[str, float]]:
    """Seconds to the next new step, and those of the phases where they are told."""
    job.wait_for_step(STEPS_BEFORE)
    began_s = time.time()
    hurt(job)
    highest = job.highest_step()
    since_s = job.wait_for_restart(began_s) if isinstance(job, Distlm) else began_s + 0.05
    next_s = job.wait_for_step(highest + 1, since_s)
    return next_s - began_s, job.phases(began_s) if isinstance(job, Distlm) else {}


def kill(name: str, number: signal.Signals = signal.SIGKILL) -> Callable[[Job], None]:
    return lambda job: job.processes(name)[-1].send_signal(number)


FAULTS = {
    "worker": kill("ray::RayTrainWorker"),
    "hang": kill("ray::RayTrainWorker", signal.SIGSTOP),
    "train-controller": kill("ray::TrainController"),
    "controller": kill("distlm.controller"),
    "head": kill("gcs_server"),
}
OF_PEER = ("worker",)
RESIZES = ("grow", "shrink")


def measure(fault: str, make: Callable[[Path, dict[str, str]], Job]) -> tuple[float, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        job = make(Path(name), {})
        try:
            return recover(job, FAULTS[fault])
        finally:
            job.end()


def measure_resize(make: Callable[[Path, dict[str, str]], Job]) -> tuple[float, float]:
    """(seconds from a new node to the first step on two workers, from its death to the next new step on one)."""
    sys.path.append(str(ROOT / "tests" / "integration"))
    from ray_cluster import RayCluster

    from distlm.processes import no_descendants_left
    from distlm.temporary import temporary_root

    with tempfile.TemporaryDirectory() as name, temporary_root() as root, no_descendants_left():
        cluster = RayCluster(root, num_cpus=1)
        job = make(Path(name), cluster.environ_of_driver)
        try:
            job.wait_for_step(STEPS_BEFORE)
            node, began_s = cluster.add_node(1), time.time()
            grown_s = job.wait_for_step(0, began_s, num_workers=2) - began_s
            time.sleep(5)
            began_s = time.time()
            node.kill()
            return grown_s, job.wait_for_step(job.highest_step() + 1, began_s, num_workers=1) - began_s
        finally:
            job.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join((*FAULTS, *RESIZES)))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    faults = options.faults or [*FAULTS, *RESIZES]
    rows = []
    for fault in (name for name in faults if name in FAULTS):
        totals, phases, peers = [], [], []
        for _ in range(options.repeat):
            total_s, of_phases = measure(fault, lambda f, e: Distlm(f, e, "resources.num_workers=2"))
            totals.append(total_s)
            phases.append(of_phases)
            if fault in OF_PEER:
                peers.append(measure(fault, lambda f, e: RawRayTrain(f, e, 2, 2))[0])
            print(f"{fault}: {totals[-1]:.1f} s, peer {peers[-1:]}, {of_phases}", file=sys.stderr)
        medians = [statistics.median([one.get(phase, 0.0) for one in phases]) for phase in PHASES]
        cells = [f"{seconds:.1f}" if seconds else "" for seconds in medians]
        rows.append([fault, median_and_spread(totals), *cells, median_and_spread(peers) if peers else "never"])
    if rows:
        print(table(["fault", "together", *PHASES, "raw Ray Train"], rows) + "\n")
    if set(faults) & set(RESIZES):
        ours = [measure_resize(lambda f, e: Distlm(f, e, "resources.num_workers=[1,2]")) for _ in range(options.repeat)]
        peer = [measure_resize(lambda f, e: RawRayTrain(f, e, 1, 2)) for _ in range(options.repeat)]
        sides = [[name, median_and_spread(a), median_and_spread(b)] for name, a, b in zip(
            RESIZES, zip(*ours, strict=True), zip(*peer, strict=True), strict=True
        )]  # fmt: skip
        print(table(["", "distlm", "raw Ray Train"], sides) + "\n")
    print(f"Seconds, medians of {options.repeat} (smallest-largest). {machine()}")


if __name__ == "__main__":
    main()
