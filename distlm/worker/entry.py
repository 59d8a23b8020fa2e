"""Where Ray Train starts a worker: its log file, its threads, its channel to the recorder, then the training loop."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.devices import prepare_process_for_torch
from distlm.redact import redact_uri
from distlm.run_folder import AttemptFolder, RunFolder, run_created_s
from distlm.tracking.startup import Phase, phase_ended
from distlm.worker.failure import failure_message
from distlm.worker.store import serve

_DELIVERY_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class WorkerArguments:
    """What the controller tells every worker; travels as a plain dictionary."""

    run_path: str
    attempt_path: str
    incarnation: int
    device: str
    cpus_per_worker: int
    checkpoint: str | None
    """Folder of the state to continue from."""
    checkpoint_step: int
    mailbox: Any
    """Handle of the recorder's actor."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def run_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`. A failure is reported with its rank and host, and raised again."""
    import ray.train

    told = WorkerArguments(**arguments)
    place = ray.train.get_context()
    rank = place.get_world_rank()

    def tell_phase_ended(phase: Phase, step: int) -> None:
        if rank == 0:
            told.mailbox.push.remote(phase_ended(phase, told.incarnation, step=step))

    try:
        redirect_output(AttemptFolder(Path(told.attempt_path)).worker_log(rank))
        tell_phase_ended("place", told.checkpoint_step)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(place.get_world_size()),
            LOCAL_RANK=str(place.get_local_rank()),
            LOCAL_WORLD_SIZE=str(place.get_local_world_size()),
        )
        prepare_process_for_torch(told.cpus_per_worker)  # Ray has set the threads from the resources asked for
        _train(told, rank, tell_phase_ended, place.get_node_rank() if place.get_local_rank() == 0 else None)
    except Exception as error:
        traceback.print_exc()
        failure = failure_message(error, rank, told.incarnation)
        ray.wait([told.mailbox.push.remote(failure)], timeout=_DELIVERY_TIMEOUT_S)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _train(
    told: WorkerArguments, rank: int, tell_phase_ended: Callable[[Phase, int], None], monitored_node: int | None
) -> None:
    import torch

    torch.set_num_threads(told.cpus_per_worker)
    serve()
    from distlm.checkpoint.store import Checkpoint
    from distlm.config.attempt import load_attempt
    from distlm.run_folder import read_json
    from distlm.tracking.records import Record, now_ms
    from distlm.worker.metrics import SystemMonitor
    from distlm.worker.prepare import Prepared
    from distlm.worker.rehearsal import make_sample_log
    from distlm.worker.stop import StopFlag
    from distlm.worker.train import WorkerContext, train

    tell_phase_ended("import", told.checkpoint_step)
    run, attempt = RunFolder(Path(told.run_path)), AttemptFolder(Path(told.attempt_path))
    config = load_attempt(run, attempt).config

    def push(message: dict[str, Any]) -> None:
        told.mailbox.push.remote(message)

    def report(step: int, values: dict[str, float]) -> None:
        push(Record(step, told.incarnation, now_ms(), values).to_message())

    stop_flag = StopFlag(told.mailbox) if rank == 0 else None
    context = WorkerContext(
        config=config,
        prepared=Prepared(**read_json(run.init / "prepared.json")),
        run=run,
        device=told.device,
        checkpoint=Checkpoint(told.checkpoint_step, Path(told.checkpoint)) if told.checkpoint else None,
        report=report,
        warn=lambda message: push({"kind": "event", "event": "warning", "message": message}),
        show=lambda text: push({"kind": "event", "event": "step_map", "message": text}),
        phase_ended=tell_phase_ended,
        on_samples=make_sample_log(run, attempt, config, rank),
        profile_folder=attempt.profile,
        is_stop_wanted=stop_flag.is_set if stop_flag else lambda: False,
        stopped=lambda step: push({"kind": "event", "event": "stopped", "step": step}),
        ended_early=lambda step: push({"kind": "event", "event": "ended_early", "step": step}),
        tables_folder=attempt.evaluations,
    )
    with ExitStack() as scope:
        if stop_flag:
            scope.callback(stop_flag.close)
        if monitored_node is not None:
            scope.enter_context(
                SystemMonitor(
                    push,
                    node_rank=monitored_node,
                    incarnation=told.incarnation,
                    run_created_s=run_created_s(run.run_id),
                    interval_s=config.tracking.system_metrics_interval_s,
                )
            )
        train(context)


class _Output(io.FileIO):
    """Standard output or error in a log, without secrets: libraries print addresses. What a full disk does not take is
    lost, and ends nobody who prints."""

    def write(self, content: Any) -> int:
        text = bytes(content).decode(errors="surrogateescape")
        with suppress(OSError):
            super().write(redact_uri(text).encode(errors="surrogateescape"))
        return len(content)


def redirect_output(log: Path) -> None:
    """Send this process's output, that of C++ libraries included, to a file that outlives Ray's temporary folder."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(_Output(number, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
        )
        for number in (1, 2)
    )
