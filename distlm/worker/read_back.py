"""What a checkpoint holds, against what the model holds: the trained weights of an adapter are few, so that each save
can be read back. They are gathered in another way than they are saved, by DeepSpeed's own functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.reader import CheckpointReader
from distlm.checkpoint.store import Checkpoint
from distlm.errors import TrainingError
from distlm.worker.zero_state import actual_zero_stage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SHOWN = 3


def live_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Every trainable weight, whole, in fp32, in host memory, by name. Collective; empty but on rank 0."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = parameter if actual_zero_stage(engine) == 0 else safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                weights[name] = whole.detach().float().cpu().clone()
    return weights


def require_equal(checkpoint: Checkpoint, manifest: Manifest, live: dict[str, Tensor]) -> None:
    """Raise TrainingError unless the checkpoint holds exactly these weights, naming the first that differ."""
    reader = CheckpointReader(checkpoint, manifest)
    problems = [f"{name} is missing" for name in live.keys() - manifest.shapes.keys()]
    problems += [f"{name} is not in the model" for name in manifest.shapes.keys() - live.keys()]
    for name in manifest.shapes.keys() & live.keys():
        shape = manifest.shapes[name]
        if shape != list(live[name].shape):
            problems.append(f"{name} has the shape {shape} and is {list(live[name].shape)} in the model")
            continue
        saved = torch.empty(shape)
        if saved.numel():
            reader.read_into(saved.view(-1).numpy().data, name, "weight")
        if not torch.equal(saved, live[name]):
            problems.append(f"{name} {'has other values' if saved.any() else 'is all zero'}")
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN])
        raise TrainingError(
            f"the adapter that was saved is not that of the model ({len(problems)} of {len(live)} weights: {shown}); "
            "it is not kept, and earlier checkpoints are as they were"
        )
