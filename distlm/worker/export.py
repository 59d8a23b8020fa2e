"""From the last checkpoint to model/: a folder that `from_pretrained` loads, tokenizer included."""

from __future__ import annotations

import shutil

from distlm.errors import CheckpointError
from distlm.run_folder import RunFolder
from distlm.worker.checkpoint import read_parameters
from distlm.worker.checkpoint_format import latest_good
from distlm.worker.model import export_model


def export_run(run: RunFolder) -> None:
    """Write the fp32 weights of the newest checkpoint, in one process and with no process group."""
    checkpoint, _ = latest_good(run.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint to export")
    export_model(run.init / "model", dict(read_parameters(checkpoint.path)), run.model)
    for file in (run.init / "tokenizer").iterdir():
        shutil.copy2(file, run.model / file.name)
