"""What the benchmarks of training share: the run that is trained, processes under torchrun, and tables.

As a script, `torchrun benchmarks/common.py RUN_FOLDER RESULT`, it is distlm's own worker loop without Ray: it trains
the run and writes to RESULT what rank 0 reported and when.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

PEPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "peps"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "ray")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


# --- the run ----------------------------------------------------------------------------------------------------------


def text_source() -> dict[str, Any]:
    """Real text: the Python Enhancement Proposals where they are, else the documentation of the installed packages."""
    if PEPS.is_dir():
        return {"source": "files", "paths": [str(PEPS / "*.jsonl")]}
    return {"source": "python-docs", "max_documents": 3000}


def model_config(model_type: str, shape: Mapping[str, Any], dropout: float, **others: Any) -> dict[str, Any]:
    """The keys of `model.config`, with every kind of dropout that the architecture has at the same rate."""
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(model_type).to_dict()
    rates = {key: dropout for key, value in defaults.items() if "dropout" in key and isinstance(value, int | float)}
    return {"model_type": model_type, **shape, **rates, **others}


def write_config(path: Path, tree: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    return path


def prepare(config: Path, run_id: str, *overrides: str) -> Path:
    """Make a run's folder, its data and its initial weights, as `distlm submit` does before the workers start."""
    from distlm.config.attempt import begin_attempt, create_run
    from distlm.config.load import load_config
    from distlm.config.resolve import contradictions
    from distlm.run_folder import RunFolder
    from distlm.worker.prepare import prepare_run

    loaded = load_config(config, list(overrides), contradictions)
    run = RunFolder(Path(loaded.config.runs_dir).absolute() / run_id)
    create_run(loaded, run)
    begin_attempt(loaded, run, list(overrides))
    prepare_run(loaded.config, run)
    return run.path


# --- processes --------------------------------------------------------------------------------------------------------


def torchrun(num_workers: int, threads: int, *command: str | Path) -> None:
    """Run a script on the workers of this machine, its output shown only if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout)


def train_with_distlm(run_folder: Path, result: Path, bound: bool = False) -> None:
    """One worker of distlm, told by torchrun what rank it is. What rank 0 reports goes to a file.

    `bound`: it keeps to its share of the cores.
    """
    from distlm.devices import prepare_process_for_torch

    if bound:
        rank, num_workers = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[rank::num_workers])
    num_threads = int(os.environ["OMP_NUM_THREADS"])
    prepare_process_for_torch(num_threads)
    import torch

    torch.set_num_threads(num_threads)
    from distlm.config.attempt import load_attempt
    from distlm.run_folder import RunFolder, read_json
    from distlm.worker.prepare import Prepared
    from distlm.worker.train import WorkerContext, train

    run = RunFolder(run_folder)
    prepared = Prepared(**read_json(run.init / "prepared.json"))
    reports: list[dict[str, Any]] = []
    first_step_s: list[float] = []

    def report(step: int, values: dict[str, float]) -> None:
        reports.append({"step": step, "at_s": time.perf_counter(), "peak_gib": peak_memory_gib(), "values": values})

    def phase_ended(phase: str, step: int) -> None:
        if phase == "first_step":
            first_step_s.append(time.time())

    config = load_attempt(run, run.attempts()[-1]).config
    train(WorkerContext(config, prepared, run, "cpu", None, report, print, phase_ended=phase_ended))
    if os.environ["RANK"] == "0":
        result.write_text(json.dumps({"reports": reports, "first_step_at_s": first_step_s[0]}))
    torch.distributed.destroy_process_group()


def peak_memory_gib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


# --- tables -----------------------------------------------------------------------------------------------------------


def machine() -> str:
    """One paragraph: what the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.+)", info)
    flags = re.search(r"flags\s*: (.+)", info)
    has = set(flags[1].split()) if flags else set()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flag_text = ", ".join(f"{'' if flag in has else 'no '}{flag}" for flag in CPU_FLAGS)
    return (
        f"{len(os.sched_getaffinity(0))} cores of {name[1] if name else platform.processor()} ({flag_text}), "
        f"{memory_gib:.0f} GiB, load {os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        + "."
    )


def median_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Such as "1.23 (1.20-1.31)": the median, the smallest and the largest."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    train_with_distlm(Path(sys.argv[1]), Path(sys.argv[2]), bound="--bound" in sys.argv)
