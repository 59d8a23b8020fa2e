"""Where Ray Train starts a worker: its log file, its threads, its channel to the recorder, then the training loop."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.devices import garbage_collector_at_rest, prepare_process_for_torch
from distlm.errors import InfrastructureError
from distlm.processes import ignore_signal
from distlm.redact import redact_uri
from distlm.run_folder import AttemptFolder, RunFolder, run_created_s
from distlm.tracking.startup import Phase, phase_ended
from distlm.worker.failure import failure_message
from distlm.worker.pulse import Pulse
from distlm.worker.store import listen_at, serve

_DELIVERY_TIMEOUT_S = 10.0
_CONFIRMATION_TIMEOUT_S = 60.0
_CONFIRMATION_INTERVAL_S = 0.1
STACK_SIGNAL = signal.SIGUSR1
"""On which a worker writes the stacks of its threads to its log, even while it holds the interpreter's lock."""


@dataclass(frozen=True)
class WorkerArguments:
    """What the controller tells every worker; travels as a plain dictionary."""

    run_path: str
    attempt_path: str
    incarnation: int
    device: str
    num_workers: int
    """World size of this incarnation."""
    cpus_per_worker: int
    checkpoint: str | None
    """Folder of the state to continue from."""
    checkpoint_step: int
    mailbox: Any
    """Handle of the recorder's actor."""
    communication: dict[str, str]
    """Environment variables."""

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def run_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`. A failure is reported with its rank and host, and raised again."""
    import ray.train

    ignore_signal(signal.SIGUSR2)  # it would kill the worker; in a Ray that the controller has started, it cannot come
    told = WorkerArguments(**arguments)
    place = ray.train.get_context()
    rank = place.get_world_rank()

    def push(message: dict[str, Any]) -> None:
        told.mailbox.push.remote(message)

    def tell_phase_ended(phase: Phase, step: int) -> None:
        if rank == 0:
            push(phase_ended(phase, told.incarnation, step=step))

    pulse = Pulse(told.incarnation, push if rank == 0 else lambda message: None)
    try:
        attempt = AttemptFolder(Path(told.attempt_path))
        redirect_output(attempt.worker_log(rank))
        push(_placed(rank, told.incarnation))
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        tell_phase_ended("place", told.checkpoint_step)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(place.get_world_size()),
            LOCAL_RANK=str(place.get_local_rank()),
            LOCAL_WORLD_SIZE=str(place.get_local_world_size()),
        )
        os.environ.update(told.communication)
        listen_at(ray.util.get_node_ip_address())
        prepare_process_for_torch(told.cpus_per_worker)  # Ray has set the threads from the resources asked for
        _train(told, rank, tell_phase_ended, pulse, place.get_node_rank() if place.get_local_rank() == 0 else None)
    except Exception as error:
        traceback.print_exc()
        failure = failure_message(error, rank, told.incarnation, pulse.step)
        ray.wait([told.mailbox.push.remote(failure)], timeout=_DELIVERY_TIMEOUT_S)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _placed(rank: int, incarnation: int) -> dict[str, Any]:
    """Where this worker is, and what it takes to end it from outside."""
    import ray

    group = ray.util.get_current_placement_group()
    return {
        "kind": "placed",
        "incarnation": incarnation,
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "node_id": ray.get_runtime_context().get_node_id(),
        "placement_group_id": group.id.hex() if group else "",
    }


def _wait_until_recorded(mailbox: Any, step: int) -> None:
    """Wait for the controller to have written down all that this worker has told of the steps up to this one.

    A checkpoint is committed after that only, so that a run which continues from it has every point before it, and so
    that workers whose controller is gone commit nothing beside those of the next one.

    Raises:
        InfrastructureError: the controller does not answer.
    """
    import ray

    deadline = time.monotonic() + _CONFIRMATION_TIMEOUT_S
    try:
        mailbox.push.remote({"kind": "saving", "step": step})
        while not ray.get(mailbox.is_recorded.remote(step), timeout=_CONFIRMATION_TIMEOUT_S):
            if time.monotonic() > deadline:
                raise InfrastructureError(f"the controller has not confirmed step {step}; it is not committed")
            time.sleep(_CONFIRMATION_INTERVAL_S)
    except ray.exceptions.RayError as error:
        raise InfrastructureError(f"the controller is gone; step {step} is not committed") from error


def _train(
    told: WorkerArguments,
    rank: int,
    tell_phase_ended: Callable[[Phase, int], None],
    pulse: Pulse,
    monitored_node: int | None,
) -> None:
    with garbage_collector_at_rest():
        import torch

        torch.set_num_threads(told.cpus_per_worker)
        serve()
        from distlm.checkpoint.store import Checkpoint
        from distlm.config.attempt import load_attempt
        from distlm.config.resolve import at_world_size
        from distlm.run_folder import read_json
        from distlm.tracking.records import Record, now_ms
        from distlm.worker.metrics import SystemMonitor
        from distlm.worker.prepare import Prepared
        from distlm.worker.rehearsal import make_sample_log
        from distlm.worker.stop import StopFlag
        from distlm.worker.train import WorkerContext, train

    tell_phase_ended("import", told.checkpoint_step)
    run, attempt = RunFolder(Path(told.run_path)), AttemptFolder(Path(told.attempt_path))
    config = at_world_size(load_attempt(run, attempt).config, told.num_workers)

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
        show=lambda text: push({"kind": "event", "event": "note", "message": text}),
        phase_ended=tell_phase_ended,
        on_samples=make_sample_log(run, attempt, config, rank),
        profile_folder=attempt.profile,
        beat=pulse.beat,
        before_commit=lambda step: _wait_until_recorded(told.mailbox, step),
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
