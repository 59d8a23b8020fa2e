"""One call of Ray Train: start the workers of an incarnation, wait, and say how it ended."""

from __future__ import annotations

import threading
from typing import Any

from distlm.config.schema import RunConfig
from distlm.controller.cluster import Cluster
from distlm.controller.policy import Outcome
from distlm.errors import ExitCode
from distlm.run_folder import AttemptFolder
from distlm.worker.entry import WorkerArguments, run_worker


class Incarnation:
    """A worker group in training. Ray Train's `fit` blocks, and on the main thread it would take over SIGINT, so it
    runs in a thread of its own; `is_alive` and `outcome` tell how it goes."""

    def __init__(self, config: RunConfig, cluster: Cluster, attempt: AttemptFolder, arguments: WorkerArguments) -> None:
        self._number = arguments.incarnation
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._fit, args=(config, cluster, attempt, arguments), name="ray-train-fit", daemon=True
        )
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _fit(self, config: RunConfig, cluster: Cluster, attempt: AttemptFolder, arguments: WorkerArguments) -> None:
        try:
            import ray.train
            from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

            DataParallelTrainer(
                run_worker,
                train_loop_config=arguments.to_dict(),
                backend_config=_backend_config(cluster.device),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=config.resources.num_workers,
                    use_gpu=cluster.device == "cuda",
                    resources_per_worker={"CPU": cluster.cpus_per_worker},
                ),
                # Retries are decided by our own loop; Ray's storage holds nothing but its bookkeeping.
                run_config=ray.train.RunConfig(
                    name=f"incarnation-{arguments.incarnation}",
                    storage_path=str(attempt.path / "ray_train"),
                    failure_config=ray.train.FailureConfig(max_failures=0),
                ),
            ).fit()
        except BaseException as error:  # noqa: BLE001 - carried over to the controller's thread
            self._error = error

    def outcome(self, failures: list[dict[str, Any]]) -> Outcome:
        """How it ended. `failures` are the messages of workers that could still tell what happened to them."""
        if self._error is None:
            return Outcome(ExitCode.SUCCEEDED)
        return first_failure([f for f in failures if f["incarnation"] == self._number], self._error)


def _backend_config(device: str) -> Any:
    """What Ray Train does with the workers before they train."""
    if device == "cuda":
        from ray.train.torch import TorchConfig

        return TorchConfig(backend="nccl")
    from distlm.controller.rendezvous import RendezvousConfig

    return RendezvousConfig()


# What a rank says when another one is gone: the consequence of a failure, not its cause.
_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection refused",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "Timed out waiting",
    "ProcessGroupGloo",
    "ProcessGroupNCCL",
)


def first_failure(failures: list[dict[str, Any]], error: BaseException) -> Outcome:
    """The cause of a failed incarnation: the earliest failure that is not the consequence of another one."""
    causes = [f for f in failures if f["expected"] or not any(sign in f["message"] for sign in _CONSEQUENCES)]
    if causes:
        first = min(causes, key=lambda failure: (failure.get("follows", False), failure["timestamp_ms"]))
        message = first["message"].strip() or first["type"]
        text = message if first["expected"] else f"{first['type']}: {message.splitlines()[0]}"
        return Outcome(ExitCode(first["exit_code"]), text, first["rank"], first["host"], first["details"])
    worker_failures = getattr(error, "worker_failures", {})
    told = {failure["rank"] for failure in failures}
    silent = sorted(rank for rank in worker_failures if rank not in told)
    if silent:
        rank = silent[0]
        reason = str(worker_failures[rank]).strip().splitlines()
        text = f"the worker process died without an error of its own (killed, out of memory or crashed): {reason[0]}"
        return Outcome(ExitCode.INFRASTRUCTURE, text, rank, "", str(worker_failures[rank]))
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return Outcome(ExitCode.INFRASTRUCTURE, f"{type(error).__name__}: {lines[0] if lines else ''}", details=str(error))
