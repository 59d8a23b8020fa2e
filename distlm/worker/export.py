"""From the last checkpoint to model/: a folder that `from_pretrained` loads, tokenizer included."""

from __future__ import annotations

import shutil

import torch

from distlm.checkpoint.reader import CheckpointReader
from distlm.checkpoint.store import CheckpointStore
from distlm.errors import CheckpointError
from distlm.run_folder import RunFolder
from distlm.worker.model import export_model


def export_run(run: RunFolder) -> None:
    """Write the fp32 weights of the newest checkpoint, in one process and with no process group."""
    store = CheckpointStore(run.checkpoints)
    checkpoint, _ = store.latest_good()
    if checkpoint is None:
        raise CheckpointError(f"{run.checkpoints} holds no checkpoint to export")
    manifest = store.manifest(checkpoint)
    reader = CheckpointReader(checkpoint, manifest)
    parameters = {}
    for name, shape in manifest.shapes.items():
        parameters[name] = torch.empty(shape)
        reader.read_into(memoryview(parameters[name].numpy()), name, "weight")  # type: ignore[arg-type]
    export_model(run.init / "model", parameters, run.model)
    for file in (run.init / "tokenizer").iterdir():
        shutil.copy2(file, run.model / file.name)
