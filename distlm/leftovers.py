"""What killed and stopped processes leave in a run's folder, and nobody needs."""

from __future__ import annotations

import shutil
from contextlib import suppress

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import CheckpointError
from distlm.run_folder import AttemptFolder


def clear_leftovers(attempt: AttemptFolder) -> None:
    """Remove half-written files, folders and checkpoints, what was held in reserve, and Ray's bookkeeping. Nobody may
    be writing to the run any more."""
    run = attempt.run
    shutil.rmtree(attempt.ray_train, ignore_errors=True)
    for folder in (attempt.path, run.path, run.init):
        for path in (*folder.glob(".*.reserve"), *folder.glob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
    if run.checkpoints.is_dir():
        with suppress(CheckpointError):
            CheckpointStore(run.checkpoints).clean()
