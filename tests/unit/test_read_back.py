"""What a checkpoint of an adapter holds, against what the model holds: every kind of difference is found and named."""

from __future__ import annotations

import struct
from pathlib import Path

import fabricated
import pytest
import torch

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.errors import TrainingError
from distlm.worker.read_back import require_equal

SHAPES = {"lora_A": [4, 3], "lora_B": [5, 4], "bias": [7], "scalar": [], "empty": [0, 3]}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Checkpoint, Manifest, dict[str, torch.Tensor]]:
    """A checkpoint that two ranks wrote, and the weights that it holds."""
    store = CheckpointStore(tmp_path)
    store.clean()
    checkpoint = fabricated.write(store, 3, SHAPES)
    live = {}
    for (name, kind), content in fabricated.state(3, SHAPES).items():
        if kind == "weight":
            numbers = struct.unpack(f"<{len(content) // 4}f", content)
            live[name] = torch.tensor(numbers).view(SHAPES[name])
    assert all(torch.isfinite(tensor).all() for tensor in live.values()), "NaN is never equal"
    return checkpoint, store.manifest(checkpoint), live


Saved = tuple[Checkpoint, Manifest, dict[str, torch.Tensor]]


def test_what_was_saved_is_accepted(saved: Saved) -> None:
    require_equal(*saved)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "bias", "scalar"])
def test_one_other_bit_is_found(saved: Saved, name: str) -> None:
    checkpoint, manifest, live = saved
    flat = live[name].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    with pytest.raises(TrainingError, match=rf"\(1 of 5 weights: {name} has other values\); it is not kept"):
        require_equal(checkpoint, manifest, live)


def test_zeros_are_found(tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, live = saved
    monkeypatch.setattr(
        fabricated, "state", lambda step, shapes: {key: bytes(len(content)) for key, content in STATE.items()}
    )
    store = CheckpointStore(tmp_path / "zeros")
    store.clean()
    checkpoint = fabricated.write(store, 3, SHAPES)
    with pytest.raises(TrainingError, match=r"4 of 5 weights: .*lora_A is all zero"):
        require_equal(checkpoint, store.manifest(checkpoint), live)


STATE = fabricated.state(3, SHAPES)


def test_what_is_missing_too_much_or_of_another_shape_is_named(saved: Saved) -> None:
    checkpoint, manifest, live = saved
    with pytest.raises(TrainingError, match="extra is missing"):
        require_equal(checkpoint, manifest, live | {"extra": torch.ones(2)})
    others = {name: tensor for name, tensor in live.items() if name != "bias"}
    with pytest.raises(TrainingError, match="bias is not in the model"):
        require_equal(checkpoint, manifest, others)
    with pytest.raises(TrainingError, match=r"lora_A has the shape \[4, 3\] and is \[3, 4\] in the model"):
        require_equal(checkpoint, manifest, live | {"lora_A": live["lora_A"].T})
    changed = {name: tensor + 1 for name, tensor in live.items()}
    with pytest.raises(TrainingError) as error:
        require_equal(checkpoint, manifest, changed)
    assert str(error.value).count("has other values") == 3, "the first three are named"
