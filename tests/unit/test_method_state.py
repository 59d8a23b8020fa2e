"""What a training method keeps in a checkpoint besides weights and moments: it is verified as all the rest is."""

from __future__ import annotations

from pathlib import Path

import fabricated
import pytest
import torch

from distlm.checkpoint.manifest import METHOD_STATE_NAME, Manifest
from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.errors import CheckpointError
from distlm.worker.checkpoint import _write_method_state, load_method_state

STATE = {"exp_avg_ipt/a": torch.arange(6.0).view(2, 3), "rank_pattern/a": torch.tensor([True, False])}


def with_state(store: CheckpointStore, step: int) -> Checkpoint:
    checkpoint = fabricated.write(store, step)
    state = _write_method_state(checkpoint.path, STATE)
    manifest = store.manifest(checkpoint).model_copy(update={"method_state": state})
    (checkpoint.path / MANIFEST_NAME).write_text(manifest.to_json())
    return checkpoint


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    store.clean()
    return store


def test_it_comes_back_and_counts_as_a_part_of_the_checkpoint(store: CheckpointStore) -> None:
    checkpoint = with_state(store, 3)
    manifest = CheckpointStore(store.folder).verify(checkpoint)
    found = load_method_state(checkpoint, manifest)
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)
    files = [path for path in checkpoint.path.iterdir() if path.name != MANIFEST_NAME]
    assert manifest.size_bytes == sum(path.stat().st_size for path in files)
    assert Manifest.from_json(manifest.to_json()) == manifest
    plain = fabricated.write(store, 4)
    assert load_method_state(plain, store.manifest(plain)) == {}


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (altered, "was altered: its SHA-256 is not the manifest's"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
        (lambda path: path.unlink(), "No such file"),
        (
            lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))),
            METHOD_STATE_NAME,
        ),
    ],
)
def test_a_damaged_one_is_passed_over(store: CheckpointStore, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    good, bad = with_state(store, 3), with_state(store, 5)
    damage(bad.path / METHOD_STATE_NAME)
    fresh = CheckpointStore(store.folder)
    with pytest.raises(CheckpointError, match=words):
        fresh.verify(bad)
    checkpoint, skipped = fresh.latest_good()
    assert checkpoint == good and len(skipped) == 1


def test_one_that_is_no_tensors_is_named(store: CheckpointStore) -> None:
    checkpoint = with_state(store, 3)
    (checkpoint.path / METHOD_STATE_NAME).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"{METHOD_STATE_NAME} cannot be read"):
        load_method_state(checkpoint, store.manifest(checkpoint))
