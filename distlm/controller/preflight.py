"""What only the cluster can tell before a worker starts: capacity, and storage that every node shares and can write."""

from __future__ import annotations

import importlib.util
import shutil

from distlm.checkpoint.store import CheckpointStore
from distlm.config.resolve import possible_world_sizes
from distlm.config.schema import RunConfig
from distlm.controller.capacity import choose_world_size, living_nodes, places
from distlm.controller.cluster import Cluster
from distlm.errors import InputError, Problem
from distlm.run_folder import RunFolder

_NODE_TIMEOUT_S = 60.0
_BYTES_PER_PARAMETER = 12  # an fp32 weight and its two Adam moments


def check_capacity(config: RunConfig, cluster: Cluster) -> int:
    """The number of workers to begin with: of those that the config allows, the largest that there is room for.

    Raises InputError if there is room for none of them; Ray Train would wait for ever.
    """
    nodes = living_nodes()
    room = places(nodes, cluster.device, cluster.cpus_per_worker)
    num_workers = choose_world_size(possible_world_sizes(config), room)
    if num_workers is None:
        needs = f"{cluster.cpus_per_worker} CPU{' and 1 GPU' if cluster.device == 'cuda' else ''}"
        raise InputError(
            Problem(
                f"the {len(nodes)} nodes of the Ray cluster have room for {room} workers of {needs} each; lower "
                "resources.num_workers or resources.cpus_per_worker",
                "resources.num_workers",
                str(config.resources.num_workers),
            )
        )
    return num_workers


def check_quantization(config: RunConfig, device: str) -> None:
    """Raise InputError if the base of an adapter cannot be loaded in few bits here."""
    key = "model.quantization"
    if config.model.quantization is None:
        return
    if device != "cuda":
        raise InputError(Problem("needs GPUs, and the workers run on CPUs; leave it out", key))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(Problem("needs the package bitsandbytes: pip install bitsandbytes", key))


def check_storage(run: RunFolder, cluster: Cluster) -> None:
    """Raise InputError if not every node shares the run's folder."""
    cluster.storage.ask(living_nodes())
    cluster.storage.collect(_NODE_TIMEOUT_S)
    problems = cluster.storage.problems() + [
        f"{node.host} did not answer in {_NODE_TIMEOUT_S:.0f} s" for node in cluster.storage.silent()
    ]
    if problems:
        raise InputError(
            *(
                Problem(f"every node must share this folder, but {text}", "runs_dir", str(run.runs_dir))
                for text in problems
            )
        )


def check_free_space(config: RunConfig, run: RunFolder, num_parameters: int) -> None:
    """Raise InputError if the checkpoints that are kept (the best one beside the newest), and the one being written, do
    not fit beside those that are there."""
    kept = (config.training.save_total_limit or 1) + bool(config.training.eval_steps) + 1
    to_come = max(1, kept - len(CheckpointStore(run.checkpoints).checkpoints()))
    needed = num_parameters * (_BYTES_PER_PARAMETER * to_come + 4)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise InputError(
            Problem(
                f"{free / 2**30:.1f} GiB are free, and {to_come} checkpoints and the model of {num_parameters:,} "
                f"parameters need {needed / 2**30:.1f} GiB; make room or lower training.save_total_limit",
                "runs_dir",
                str(run.runs_dir),
            )
        )
