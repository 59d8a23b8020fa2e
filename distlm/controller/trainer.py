"""One call of Ray Train: start the workers of an incarnation, wait, and say how it ended."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Sequence, Set
from contextlib import suppress
from typing import Any

from distlm.config.schema import RunConfig
from distlm.controller.cluster import Cluster
from distlm.controller.first_failure import first_failure
from distlm.errors import ExitCode
from distlm.outcome import Outcome
from distlm.processes import OomKills
from distlm.run_folder import AttemptFolder
from distlm.worker.entry import WorkerArguments, run_worker


class Incarnation:
    """A worker group in training. Ray Train's `fit` blocks, and on the main thread it would take over SIGINT, so it
    runs in a thread of its own; `is_alive` and `outcome` tell how it goes."""

    def __init__(self, config: RunConfig, cluster: Cluster, attempt: AttemptFolder, arguments: WorkerArguments) -> None:
        self._number, self._num_workers = arguments.incarnation, config.resources.world_size
        self._error: BaseException | None = None
        self._oom_kills = OomKills()
        self._thread = threading.Thread(
            target=self._fit, args=(config, cluster, attempt, arguments), name="ray-train-fit", daemon=True
        )
        self._thread.start()

    def is_alive(self) -> bool:
        self._oom_kills.sample()
        return self._thread.is_alive()

    def abort(self) -> bool:
        """End it from outside, also where no worker has begun: by the death of Ray Train's own controller, which is a
        process of this node. `fit` has no other way to be ended. False: there is no such process yet."""
        import ray

        ours = ray.get_runtime_context().job_id
        actors = ray._private.state.actors(job_id=ours, actor_state_name="ALIVE").values()
        pids = [actor["Pid"] for actor in actors if actor["ActorClassName"] == "TrainController"]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def _fit(self, config: RunConfig, cluster: Cluster, attempt: AttemptFolder, arguments: WorkerArguments) -> None:
        try:
            import ray.train

            from distlm.controller.ray_train import Trainer

            Trainer(
                run_worker,
                train_loop_config=arguments.to_dict(),
                backend_config=_backend_config(cluster.device),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.resources.world_size,
                    use_gpu=cluster.device == "cuda",
                    resources_per_worker={"CPU": cluster.cpus_per_worker},
                    placement_strategy="SPREAD" if cluster.spreads_workers else "PACK",
                    label_selector=_not_on(cluster.unfit_nodes()),
                ),
                # Retries are decided by our own loop.
                run_config=ray.train.RunConfig(
                    name=f"incarnation-{arguments.incarnation}",
                    storage_path=str(attempt.ray_train),
                    failure_config=ray.train.FailureConfig(max_failures=0),
                ),
                has_autoscaler=cluster.watch is not None,
            ).fit()
        except BaseException as error:  # noqa: BLE001 - carried over to the controller's thread
            self._error = error
        finally:
            shutil.rmtree(attempt.ray_train, ignore_errors=True)

    def outcome(self, failures: list[dict[str, Any]]) -> Outcome:
        """How it ended. `failures` are the messages of workers that could still tell what happened to them."""
        if self._error is None:
            return Outcome(ExitCode.SUCCEEDED)
        failures = [failure for failure in failures if failure["incarnation"] == self._number]
        return first_failure(failures, self._error, self._num_workers, self._oom_kills.happened_lately())


def remove_placement_groups(cluster: Cluster, ids: Set[str]) -> None:
    """Give back what a worker group held, where Ray Train's own controller has died and cannot do it. `ids`: of the
    groups that workers have told of; in a Ray of our own there are no others'."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    if cluster.watch is None:
        ids = {*placement_group_table()}
    for group in filter(None, ids):
        with suppress(ray.exceptions.RayError):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def _not_on(nodes: Sequence[str]) -> dict[str, str] | None:
    """What keeps workers off some nodes."""
    import ray

    return {ray._raylet.RAY_NODE_ID_KEY: f"!in({','.join(nodes)})"} if nodes else None


def _backend_config(device: str) -> Any:
    """What Ray Train does with the workers before they train."""
    if device == "cuda":
        from ray.train.torch import TorchConfig

        return TorchConfig(backend="nccl")
    from distlm.controller.rendezvous import RendezvousConfig

    return RendezvousConfig()
