"""What `distlm verify-resume` asks of the workers: to write down what they train on, and one of them to be killed."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt
from distlm.config.schema import RunConfig
from distlm.errors import InfrastructureError
from distlm.metrics_file import read_lines
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.verify_resume.samples import KILLED, MicroBatch, samples_path, write_samples

_TIMEOUT_S = 60.0
_POLL_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Kill:
    """When a worker dies by SIGKILL: in this step, once what came before it has reached the disk, so that a resume has
    something to continue and something to train again."""

    step: int
    save_steps: int
    run: RunFolder
    attempt: AttemptFolder

    def wait_and_kill(self, mark: Path) -> None:
        """Raises InfrastructureError if that does not reach the disk."""
        deadline = time.monotonic() + _TIMEOUT_S
        store = CheckpointStore(self.run.checkpoints)
        while not (self._is_saved(store) and self._is_recorded()):
            if store.unfinished():  # a large checkpoint takes its time
                deadline = time.monotonic() + _TIMEOUT_S
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"waited {_TIMEOUT_S:.0f} s in step {self.step} for the checkpoint of step {self._saved_step} "
                    f"and the metrics of step {self.step - 1}"
                )
            time.sleep(_POLL_INTERVAL_S)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    @property
    def _saved_step(self) -> int:
        return (self.step - 1) // self.save_steps * self.save_steps

    def _is_saved(self, store: CheckpointStore) -> bool:
        return any(checkpoint.step == self._saved_step for checkpoint in store.checkpoints())

    def _is_recorded(self) -> bool:
        lines = (message for _, message in read_lines(self.attempt.metrics_jsonl))
        return any(m["kind"] == "metrics" and m["step"] == self.step - 1 and "train/loss" in m["values"] for m in lines)


def make_sample_log(run: RunFolder, attempt: AttemptFolder, config: RunConfig, rank: int) -> SampleLog | None:
    """What this attempt asks of this worker; None: nothing."""
    asked = Attempt.read(attempt)
    if not asked.record_samples:
        return None
    if asked.kill_in_step is None or rank != config.resources.world_size - 1:
        return SampleLog(attempt, rank)
    return SampleLog(attempt, rank, Kill(asked.kill_in_step, config.training.save_steps or 1, run, attempt))


class SampleLog:
    """Writes what one worker trains on, before it does."""

    def __init__(self, attempt: AttemptFolder, rank: int, kill: Kill | None = None) -> None:
        self._path, self._kill = samples_path(attempt.samples, rank), kill

    def __call__(self, micro_batches: list[MicroBatch]) -> None:
        """Raises InfrastructureError if the storage failed."""
        try:
            write_samples(self._path, micro_batches)
        except OSError as error:
            raise InfrastructureError(f"cannot write {self._path}: {error.strerror}") from error
        if self._kill and micro_batches[0].step == self._kill.step:
            self._kill.wait_and_kill(self._path.with_suffix(f".{KILLED}"))
