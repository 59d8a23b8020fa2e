"""`run:RUN` and `run:RUN@STEP` in a config: what another run has trained, in place of a folder or a Hub name.

A run keeps what it began with: when it is submitted, the reference is written out as `run:RUN_ID@STEP`, or with the
folder of a run that is elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distlm.checkpoint.listing import best_by, of_final_model
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.commands.find import find_run
from distlm.config.load import LoadedConfig, load_tree
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, InputError, Problem
from distlm.run_folder import RunFolder

PREFIX = "run:"
_KEYS = ("model.name_or_path", "peft.adapter_name_or_path")


@dataclass(frozen=True)
class RunReference:
    """A checkpoint of a run."""

    run: RunFolder
    step: int

    def text(self, runs_dir: Path) -> str:
        """The reference written out: by the run's id, or by its folder where that is not in `runs_dir`."""
        name = self.run.run_id if self.run.runs_dir == runs_dir.absolute() else self.run.path
        return f"{PREFIX}{name}@{self.step}"


def resolve_reference(text: str, runs_dir: Path) -> RunReference | None:
    """What a value refers to; None: it is no reference. Raises InputError where there is no such run or step."""
    if not text.startswith(PREFIX):
        return None
    name, at, wanted = text.removeprefix(PREFIX).rpartition("@")
    if not at:
        name, wanted = wanted, ""
    run = find_run(runs_dir, name)
    return RunReference(run, _checkpoint(run, wanted).step)


def _checkpoint(run: RunFolder, wanted: str) -> Checkpoint:
    """A checkpoint by its step, `best` or `last`; "": the one that the run's final model is made of."""
    store = CheckpointStore(run.checkpoints)
    known = store.checkpoints()
    if not known:
        raise InputError(f"run {run.run_id} has no checkpoint")
    wanted = wanted or of_final_model(run)
    if wanted == "last":
        return known[0]
    if wanted == "best":
        if (best := store.best(*best_by(run))) is None:
            raise InputError(f"no checkpoint of run {run.run_id} was evaluated; use @last or the number of a step")
        return best
    if re.fullmatch(r"[0-9]{1,18}", wanted):
        for checkpoint in known:
            if checkpoint.step == int(wanted):
                return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in reversed(known))
    raise InputError(f"run {run.run_id} has no checkpoint {wanted}; it has the steps {steps}, last and best")


def export_in_cache(text: str, cache: Path, kind: str) -> Path | None:
    """Where what a reference that is written out means is exported to; None: it is none. `kind`: model or adapter. A
    run that began with it goes on with the export, whatever becomes of the other run."""
    match = re.fullmatch(rf"{PREFIX}(.+)@([0-9]{{1,18}})", text)
    return cache / f"{kind}-{Path(match[1]).name}-{int(match[2])}" / "exported" if match else None


def check_references(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the references of a config."""
    for key, text in _texts(config):
        kind = "model" if key == "model.name_or_path" else "adapter"
        exported = export_in_cache(text, Path(config.runs_dir) / "cache", kind)
        if exported is not None and exported.is_dir():
            continue
        try:
            resolve_reference(text, Path(config.runs_dir))
        except DistlmError as error:
            yield Problem(str(error), key, text)


def pin_references(loaded: LoadedConfig) -> LoadedConfig:
    """The config with each reference written out in full. Raises InputError where there is no such run."""
    overrides, runs_dir = [], Path(loaded.config.runs_dir)
    for key, text in _texts(loaded.config):
        if (reference := resolve_reference(text, runs_dir)) is not None:
            overrides.append(f"{key}={reference.text(runs_dir)}")
    return replace(load_tree(loaded.raw, overrides), origins=loaded.origins) if overrides else loaded


def _texts(config: RunConfig) -> Iterator[tuple[str, str]]:
    for key in _KEYS:
        section, name = key.split(".")
        values: Any = getattr(config, section)
        value = values.get(name) if isinstance(values, dict) else getattr(values, name, None)
        if isinstance(value, str):
            yield key, value
