"""What checkpoints a run has: `distlm checkpoints`. Reads folders of any content, also while they are being written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.store import MANIFEST_NAME, Checkpoint, CheckpointStore
from distlm.config.attempt import current_tree
from distlm.config.metrics import METRICS
from distlm.config.schema import TrainingConfig
from distlm.errors import CheckpointError, InputError, UnknownFormatError
from distlm.run_folder import RunFolder
from distlm.view.table import Column
from distlm.view.table import table as text_table

State = Literal["committed", "verified", "damaged", "unknown", "unfinished"]
"""committed: the manifest is good and the files have its sizes; verified: and every byte has its hash; unknown: of a
format version that is not read here; unfinished: being written or deleted, or left so by a killed process."""


class BestBy(NamedTuple):
    """What tells the best checkpoint of a run."""

    metric: str
    """Of the manifest, such as eval/loss."""
    greater_is_better: bool


@dataclass(frozen=True)
class Listed:
    """One checkpoint, or what was to become one. None: not known, because there is no manifest to trust."""

    path: Path
    state: State
    size_bytes: int
    """Of the shards by the manifest; without one, of all files that are there."""
    step: int | None = None
    reason: str = ""
    """What is damaged or unknown, in one line."""
    written_at: str | None = None
    """When the manifest was written, UTC, ISO 8601."""
    epoch: int | None = None
    world_size: int | None = None
    zero_stage: int | None = None
    mixed_precision: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    is_best: bool = False
    is_resumed: bool = False
    """A resume would continue it; without `verify`: unless its bytes turn out to be altered."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def best_by(run: RunFolder) -> BestBy:
    """The metric of the run's config, as its last resume left it. Raises InputError if run.yaml or an attempt.yaml is
    damaged."""
    key, default = "metric_for_best_model", TrainingConfig.model_fields["metric_for_best_model"].default
    try:
        tree = current_tree(run)
        name = tree["training"].get(key, default)
        task = tree.get("task", {})
        kind = task.get("problem_type") or task.get("type", "masked-lm")  # as `problem_kind` has it
        return BestBy(f"eval/{name}", METRICS[kind][name])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run.run_yaml} or an attempt.yaml is damaged: {type(error).__name__}: {error}") from error


def of_final_model(run: RunFolder) -> Literal["best", "last"]:
    """Which checkpoint the run's final model is made of."""
    return "best" if current_tree(run)["training"].get("load_best_model_at_end") else "last"


def list_checkpoints(store: CheckpointStore, best: BestBy | None, *, verify: bool = False) -> list[Listed]:
    """All checkpoints, newest first, then what is unfinished.

    Args:
        best: mark the best by this.
        verify: read every byte and compare it with its hash.

    Raises:
        CheckpointError: the storage does not answer.
    """
    unfinished = store.unfinished()  # first: one that is committed in the meantime is then found as a checkpoint
    found = [_listed(store, checkpoint, verify) for checkpoint in store.checkpoints()]
    listed = [one for one in found if one is not None]
    best_path = getattr(store.best(*best), "path", None) if best else None
    newest = next((one for one in listed if one.state != "damaged"), None)
    good = newest.path if newest and newest.state != "unknown" else None
    return [
        *(replace(one, is_best=one.path == best_path, is_resumed=one.path == good) for one in listed),
        *(Listed(path, "unfinished", _size_bytes(path), _step(path)) for path in unfinished if os.path.isdir(path)),
    ]


def _listed(store: CheckpointStore, checkpoint: Checkpoint, verify: bool) -> Listed | None:
    """None: it was deleted in the meantime."""
    path = checkpoint.path
    examine: Callable[[Checkpoint], Manifest] = store.verify if verify else store.check
    try:
        manifest = examine(checkpoint)
    except CheckpointError as error:
        if not os.path.lexists(path):
            return None
        state: State = "unknown" if isinstance(error, UnknownFormatError) else "damaged"
        reason = str(error).replace(f"{store.folder}/", "")
        return Listed(path, state, _size_bytes(path), checkpoint.step, reason, _written_at(path))
    return Listed(
        path,
        "verified" if verify else "committed",
        manifest.size_bytes,
        step=manifest.step,
        written_at=_written_at(path),
        epoch=manifest.progress.epoch,
        world_size=manifest.world_size,
        zero_stage=manifest.zero_stage,
        mixed_precision=manifest.mixed_precision,
        metrics=manifest.metrics,
    )


def _step(path: Path) -> int | None:
    match = re.match(r"\.step-([0-9]+)", path.name)
    return int(match[1]) if match else None


def _written_at(path: Path) -> str | None:
    try:
        modified = (path / MANIFEST_NAME).lstat().st_mtime
        return datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds")
    except (OSError, ValueError, OverflowError):  # not there, or a time that no calendar has
        return None


def _size_bytes(path: Path) -> int:
    """Of the files in a folder, as far as they can be seen and are there still."""
    total = 0
    try:
        for file in path.iterdir():
            total += file.lstat().st_size
    except OSError:
        pass
    return total


def human_size(size_bytes: int) -> str:
    """Such as 12.3 MiB."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def table(listed: Sequence[Listed], best: BestBy | None) -> list[str]:
    """Lines for a terminal: a header and one line for each."""
    metrics = list(dict.fromkeys(["eval/loss", *([best.metric] if best else [])]))
    header = ("step", "epoch", "size", "written (UTC)", "workers", "ZeRO", "precision", *metrics, "used for", "state")
    to_the_right = ("step", "epoch", "size", "workers", "ZeRO", *metrics)
    columns = [Column(name, "right" if name in to_the_right else "left") for name in header]
    return text_table(columns, [tuple(_cells(one, metrics)) for one in listed])


def _cells(one: Listed, metrics: Sequence[str]) -> Iterator[object]:
    yield one.step
    yield one.epoch
    yield human_size(one.size_bytes)
    yield one.written_at[:19].replace("T", " ") if one.written_at else None
    yield one.world_size
    yield one.zero_stage
    yield "fp32" if one.mixed_precision == "no" else one.mixed_precision
    for metric in metrics:
        yield f"{one.metrics[metric]:.5g}" if metric in one.metrics else None
    yield ", ".join(word for word, is_so in (("best", one.is_best), ("resume", one.is_resumed)) if is_so) or None
    yield f"{one.state}: {one.reason}" if one.reason else one.state
