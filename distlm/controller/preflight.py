"""What only the cluster can tell before a worker starts: capacity, and nodes that are fit for workers."""

from __future__ import annotations

import importlib.util
import os
import shutil

import distlm
from distlm.checkpoint.store import CheckpointStore
from distlm.config.resolve import possible_world_sizes
from distlm.config.schema import RunConfig
from distlm.controller.capacity import choose_world_size, living_nodes, places
from distlm.controller.cluster import Cluster
from distlm.errors import InfrastructureError, InputError, Problem
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
        raise InputError(
            Problem(
                f"the {len(nodes)} nodes of the Ray cluster have room for {room} workers of {cluster.needs_of_worker} "
                "each; lower resources.num_workers or resources.cpus_per_worker",
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


def check_nodes(cluster: Cluster, sent_by: str) -> None:
    """Raise InputError if not every node is fit for workers, InfrastructureError where one does not answer or is not
    reached by others. `sent_by`: the version of distlm that the user has used."""
    if sent_by != distlm.__version__:
        raise InputError(
            f"the run was sent by distlm {sent_by}, and {os.uname().nodename} has distlm {distlm.__version__}; install "
            "the same on both (on a Ray cluster, ray.code=carried sends it along)"
        )
    if cluster.watch is None:  # the only node is this one
        return
    cluster.fitness.ask(living_nodes())
    cluster.fitness.collect(_NODE_TIMEOUT_S)
    if problems := cluster.fitness.problems():
        raise InputError(*problems)
    deaf = [f"{node.host} did not answer in {_NODE_TIMEOUT_S:.0f} s" for node in cluster.fitness.silent()]
    if deaf := deaf or cluster.fitness.check_network(_NODE_TIMEOUT_S):
        raise InfrastructureError(
            f"{'; '.join(deaf)}: workers connect to each other on any port; look at that node's network and firewall, "
            "or leave it out"
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
