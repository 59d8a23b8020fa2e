"""The batch script for a run under Slurm. Pure: a config in, text out."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from distlm.config.schema import RunConfig


def cpus_per_node(config: RunConfig) -> int | None:
    """None: all that the nodes have."""
    if config.slurm.cpus_per_node is None and config.slurm.exclusive:
        return None
    workers = config.resources.workers_per_host(config.slurm.nodes)
    return config.slurm.cpus_per_node or workers * (config.resources.cpus_per_worker or 1)


def batch_script(config: RunConfig, what: Sequence[str], header: Sequence[str], output: str | None) -> str:
    """The script.

    Args:
        what: the arguments of `python -m distlm.slurm`: a run's folder, or a config file and overrides.
        header: lines that say where the script comes from.
        output: the file for what the job prints; None: slurm-JOBID.out where it was submitted.
    """
    slurm = config.slurm
    prologue = (slurm.prologue or "").strip()
    python = "python" if prologue else shlex.quote(sys.executable)
    comment = [line for text in header for line in text.splitlines() or [""]]
    lines = ["#!/bin/bash", *(f"# {line}".rstrip() for line in comment)]
    lines += [f"#SBATCH {directive}" for directive in _directives(config, output)]
    if prologue:
        lines += ["", *prologue.splitlines()]
    lines += [
        "",
        "# Starts Ray on every node of the job, then the controller on this one; ends them all when it ends, and puts",
        "# the job back into the queue if its time is over before the training is. Its exit code is the job's.",
        f"exec {python} -m distlm.slurm {shlex.join(what)}",
    ]
    return "\n".join(lines) + "\n"


def _directives(config: RunConfig, output: str | None) -> Iterator[str]:
    slurm = config.slurm
    yield f"--job-name={re.sub(r'[^A-Za-z0-9._-]+', '-', config.name)}"
    for option in ("partition", "account", "qos"):
        if (value := getattr(slurm, option)) is not None:
            yield f"--{option}={value}"
    yield f"--nodes={slurm.nodes}"
    yield "--ntasks-per-node=1"
    if (cpus := cpus_per_node(config)) is not None:
        yield f"--cpus-per-task={cpus}"
    if slurm.gpus_per_node:
        yield f"--gpus-per-node={slurm.gpus_per_node}"
    if slurm.memory_gib_per_node is not None:
        yield f"--mem={round(slurm.memory_gib_per_node * 1024)}M"
    if slurm.time is not None:
        yield f"--time={slurm.time}"
    if slurm.constraint is not None:
        yield f"--constraint={shlex.quote(slurm.constraint)}"
    if slurm.exclusive:
        yield "--exclusive"
    yield f"--signal=B:USR2@{math.ceil(config.resources.time_to_save_s)}"
    yield "--requeue" if slurm.max_requeues else "--no-requeue"
    yield "--open-mode=append"
    if output is not None:
        yield f"--output={shlex.quote(output)}"
    yield from slurm.directives
