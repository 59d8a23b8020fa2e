"""What a checkpoint holds, read with the safetensors library and the manifest's JSON, without distlm's reader."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def saved_state(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) -> its fp32 elements in full shape; fails unless each is there exactly once."""
    manifest = json.loads((path / "manifest.json").read_text())
    shapes = {parameter["name"]: parameter["shape"] for parameter in manifest["parameters"]}
    parts: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for file in manifest["shards"]:
        for tensor_name, tensor in load_file(path / file).items():
            parameter, kind, start = tensor_name.rsplit(":", 2)
            parts.setdefault((parameter, kind), []).append((int(start), tensor))
    whole = {
        (name, kind): torch.empty(shape)  # without elements there is nothing of it in any file
        for name, shape in shapes.items()
        if math.prod(shape) == 0
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    for (parameter, kind), found in parts.items():
        flat = torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])])
        assert flat.dtype == torch.float32 and flat.numel() == math.prod(shapes[parameter])
        whole[parameter, kind] = flat.view(shapes[parameter])
    assert len(whole) == 3 * len(shapes)
    return whole


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    return {parameter: tensor for (parameter, kind), tensor in saved_state(path).items() if kind == "weight"}
