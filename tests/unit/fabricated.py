"""Checkpoints of made-up content, written through CheckpointStore without an engine; and a process that writes them.

The content is a function of the step, so whoever reads a checkpoint can tell whether it is the right one.
"""

from __future__ import annotations

import math
import random
from multiprocessing.connection import Connection
from pathlib import Path

from distlm.checkpoint.manifest import KINDS, Fragment, Manifest, Optimizer, Parameter, Progress
from distlm.checkpoint.reader import ITEM_BYTES, CheckpointReader
from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore

WORLD_SIZE = 2
SMALL = {"bert.a": [50], "bert.b.weight": [7, 11], "bert.c": [], "bert.d": [3, 1, 5]}


def state(step: int, shapes: dict[str, list[int]]) -> dict[tuple[str, str], bytes]:
    """(parameter, kind) -> the elements of a step."""
    draw = random.Random(step)
    return {
        (name, kind): draw.randbytes(ITEM_BYTES * math.prod(shape)) for kind in KINDS for name, shape in shapes.items()
    }


def write(
    store: CheckpointStore, step: int, shapes: dict[str, list[int]] = SMALL, metrics: dict[str, float] | None = None
) -> Checkpoint:
    """Save the state of a step as two ranks would: each has one half of every parameter."""
    parameters = [Parameter(name=name, shape=shape) for name, shape in shapes.items()]
    content, temporary, shards = state(step, shapes), store.temporary(step, "token"), {}
    for rank in range(WORLD_SIZE):
        fragments = []
        for number, parameter in enumerate(parameters):
            start, end = (parameter.numel * r // WORLD_SIZE for r in (rank, rank + 1))
            if start < end:
                fragments.append(Fragment(number, start, end - start))
        pieces = [
            memoryview(content[parameters[number].name, kind])[ITEM_BYTES * start : ITEM_BYTES * (start + numel)]
            for kind in KINDS
            for number, start, numel in fragments
        ]
        name, shard = store.write_shard(temporary, rank, WORLD_SIZE, parameters, fragments, pieces)
        shards[name] = shard
    manifest = Manifest(
        step=step,
        progress=Progress(sample_position=16 * step, epoch=0),
        seed=17,
        world_size=WORLD_SIZE,
        zero_stage=2,
        mixed_precision="no",
        versions={"torch": "2"},
        metrics=metrics or {},
        parameters=parameters,
        optimizer=Optimizer(adam_step=step, groups=[{"lr": 0.1, "betas": [0.9, 0.99]}], loss_scaler=None),
        shards=shards,
    )
    return store.commit(temporary, manifest)


def give_format_version(checkpoint: Checkpoint, version: int) -> None:
    """As another distlm would have written it, with its own hash right."""
    path = checkpoint.path / MANIFEST_NAME
    manifest = Manifest.from_json(path.read_text())
    path.write_text(manifest.model_copy(update={"format_version": version}).to_json())


def read(checkpoint: Checkpoint, manifest: Manifest) -> dict[tuple[str, str], bytes]:
    """All elements of a checkpoint, as `state` gives them."""
    reader, found = CheckpointReader(checkpoint, manifest), {}
    for kind in KINDS:
        for parameter in manifest.parameters:
            elements = bytearray(ITEM_BYTES * parameter.numel)
            reader.read_into(memoryview(elements), parameter.name, kind)
            found[parameter.name, kind] = bytes(elements)
    return found


def save_for_ever(folder: Path, shapes: dict[str, list[int]], committed: Connection) -> None:
    """Continue after the newest good checkpoint, save step after step, each third one twice, and keep two. Says None
    when it begins, then each step when it is committed, until somebody kills us."""
    committed.send(None)
    store = CheckpointStore(folder)
    store.clean()
    newest, _ = store.latest_good()
    step = newest.step if newest else 0
    while True:
        step += 1
        for _ in range(2 if step % 3 == 0 else 1):
            write(store, step, shapes)
            committed.send(step)
            store.prune(2)
