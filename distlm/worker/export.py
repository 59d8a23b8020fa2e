"""From a checkpoint to a folder that `from_pretrained` loads, in one process and in bounded memory.

    python -m distlm.worker.export [--step N|best|last] RUN_FOLDER DIR

The files of init/model give the architecture, the names and the places of all tensors; they are written anew with the
checkpoint's weights, in pieces of `CHUNK_BYTES`. What is no trainable parameter (buffers, frozen weights) is copied.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distlm.checkpoint.listing import best_by, of_final_model
from distlm.checkpoint.manifest import Manifest
from distlm.checkpoint.reader import CheckpointReader
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.checkpoint.tensor_file import CHUNK_BYTES, ITEM_BYTES, TensorFile, write_tensor_file
from distlm.config.attempt import read_run_yaml
from distlm.console import exit_code_of, say
from distlm.errors import (
    CheckpointError,
    ExitCode,
    InfrastructureError,
    InputError,
)
from distlm.run_folder import RunFolder, follow_umask, read_json, whole_folder

_INDEX_NAME = "model.safetensors.index.json"
_WEIGHTS_NAME = "model.safetensors"

logger = logging.getLogger(__name__)


def export_run(run: RunFolder, wanted: str) -> None:
    """Write model/ from the checkpoint that is `wanted`, and from no other, in place of an earlier one."""
    checkpoint, manifest = choose_checkpoint(run, wanted)
    export_checkpoint(run, checkpoint, manifest, run.model, replace=True)


def choose_checkpoint(run: RunFolder, wanted: str | None) -> tuple[Checkpoint, Manifest]:
    """A checkpoint whose every byte is verified. Damaged ones that are passed over are named in the log.

    Args:
        wanted: "last": the newest good one; "best": by the metric of the run's config; or a step; None: what the
            run's final model is made of.

    Raises:
        InputError: there is none that is meant.
        CheckpointError: the one that is meant is damaged, or all are.
    """
    store = CheckpointStore(run.checkpoints)
    known = {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}
    if not known:
        raise InputError(f"run {run.run_id} has no checkpoint to export")
    wanted = of_final_model(run) if wanted is None else wanted
    if wanted == "last":
        checkpoint, skipped = store.latest_good()
        if checkpoint is None:
            raise CheckpointError(f"no checkpoint can be used: {'; '.join(map(str, skipped))}")
        return checkpoint, store.manifest(checkpoint)
    if wanted == "best":
        checkpoint = _best(run, store)
        return checkpoint, store.verify(checkpoint)
    if not re.fullmatch(r"[0-9]{1,18}", wanted):
        raise InputError(f"--step {wanted}: must be best, last or the number of a step")
    if int(wanted) not in known:
        steps = ", ".join(map(str, sorted(known)))
        raise InputError(f"run {run.run_id} has no checkpoint of step {wanted}; it has {steps}")
    return known[int(wanted)], store.verify(known[int(wanted)])


def _best(run: RunFolder, store: CheckpointStore) -> Checkpoint:
    metric, greater_is_better = best_by(run)
    for other in store.checkpoints():
        try:
            store.check(other)
        except CheckpointError as error:
            logger.warning("checkpoint %s is not compared: %s", other.path.name, error)
    checkpoint = store.best(metric, greater_is_better)
    if checkpoint is None:
        raise InputError(
            f"no checkpoint of run {run.run_id} has {metric}: evaluate at the steps that are saved "
            "(training.eval_steps), or use --step last"
        )
    return checkpoint


def export_checkpoint(
    run: RunFolder,
    checkpoint: Checkpoint,
    manifest: Manifest,
    folder: Path,
    *,
    replace: bool = False,
    merge: bool = False,
) -> None:
    """Write a verified checkpoint of a run as a folder that `from_pretrained` loads: of transformers, or for an adapter
    of PEFT. It appears whole or not at all.

    Args:
        folder: does not exist or is empty; with `replace` it may be anything.
        merge: of an adapter, write the model with the adapter merged into it instead.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not of the model in init/.
        InputError: init/ lacks something, or the adapter is of a method that cannot be merged.
        InfrastructureError: the folder cannot be written.
    """
    from distlm.worker.model_card import model_card

    _require(run.init / "model" / "config.json", run.init / "tokenizer", run.init / "prepared.json")
    write = _write_adapter if (run.init / "adapter").is_dir() else _write_model
    card = model_card(run, manifest, merged=merge)
    try:
        with whole_folder(folder, replace=replace) as temporary:
            write(run, checkpoint, manifest, temporary, merge)
            for other in _other_files(run.init / "tokenizer"):
                shutil.copyfile(other, temporary / other.name)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise InfrastructureError(f"cannot write {folder}: {error.strerror}") from error


def _write_model(run: RunFolder, checkpoint: Checkpoint, manifest: Manifest, folder: Path, _: bool) -> None:
    initial = run.init / "model"
    files = _weight_files(initial)
    parameters = _parameter_of_tensor(initial, files, manifest, task_of(run))
    reader = CheckpointReader(checkpoint, manifest)
    for file in files:
        _write_weights(folder / file.path.name, file, parameters, reader)
    for other in _other_files(initial):
        shutil.copyfile(other, folder / other.name)


def _write_adapter(run: RunFolder, checkpoint: Checkpoint, manifest: Manifest, folder: Path, merges: bool) -> None:
    """The adapter alone, or the model that it is merged into; in memory, unlike `_write_model`."""
    from distlm.worker.adapter import InitialTensors
    from distlm.worker.adapter_export import export_adapter, merge, verify_adapter
    from distlm.worker.trained_model import load_model_of

    model: Any = load_model_of(run, checkpoint, manifest)
    if merges:
        merge(model).save_pretrained(folder)
        follow_umask(*folder.glob("*.safetensors"))
        return
    names = {parameter.name for parameter in manifest.parameters}
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in names}
    base = read_json(run.init / "prepared.json")["base_name_or_path"]
    export_adapter(model, folder, base, InitialTensors(run.init / "adapter"))
    verify_adapter(folder, trained)


def _require(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} is missing: the run was never prepared, or it was deleted")


def _weight_files(initial: Path) -> list[TensorFile]:
    """The files with the initial weights. Raises InputError if there are none, CheckpointError if one is damaged."""
    if (index := read_json(initial / _INDEX_NAME)) is not None:
        try:
            names = sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{initial / _INDEX_NAME} is damaged: {error}") from error
        return [TensorFile(initial / name) for name in names]
    _require(initial / _WEIGHTS_NAME)
    return [TensorFile(initial / _WEIGHTS_NAME)]


def _other_files(folder: Path) -> list[Path]:
    """What is no weight: the config, the index of several weight files, the tokenizer. Raises InputError."""
    try:
        return [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors" and path.is_file()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def _parameter_of_tensor(initial: Path, files: Iterable[TensorFile], manifest: Manifest, task: str) -> dict[str, str]:
    """Name in the files -> name in the checkpoint, of every parameter of the checkpoint.

    The two differ where one weight has two names, and the file has kept the other one: tied embeddings.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    shapes = {name: info.shape for file in files for name, info in file.tensors.items()}
    aliases: dict[str, list[str]] = {}
    if any(parameter.name not in shapes for parameter in manifest.parameters):
        from distlm.worker.model import parameter_aliases

        aliases = parameter_aliases(initial, task)
    found: dict[str, str] = {}
    for parameter in manifest.parameters:
        where = f"the checkpoint's parameter {parameter.name}"
        names = [name for name in (parameter.name, *aliases.get(parameter.name, ())) if name in shapes]
        if not names:
            raise CheckpointError(f"{where} has no place in {initial}")
        name = names[0]
        if name in found:
            raise CheckpointError(f"{where} and its {found[name]} have the same place in {initial}: {name}")
        if list(shapes[name]) != parameter.shape:
            raise CheckpointError(f"{where} has the shape {parameter.shape}, and {list(shapes[name])} in {initial}")
        found[name] = parameter.name
    return found


def task_of(run: RunFolder) -> str:
    """The name of the run's task."""
    return str(read_run_yaml(run).get("task", {}).get("type", "masked-lm"))


def _write_weights(path: Path, initial: TensorFile, parameters: dict[str, str], reader: CheckpointReader) -> None:
    """One file of weights: as the initial one, with the trained parameters in fp32 in their places."""
    tensors = {
        name: ("F32" if name in parameters else info.dtype, info.shape) for name, info in initial.tensors.items()
    }

    def content() -> Iterator[memoryview]:
        buffer = memoryview(bytearray(CHUNK_BYTES))  # one for all: a piece is written before the next is asked for
        for name, (dtype, shape) in tensors.items():
            numel, item_bytes = math.prod(shape), ITEM_BYTES[dtype]
            at_once = CHUNK_BYTES // item_bytes
            for start in range(0, numel, at_once):
                piece = buffer[: min(at_once, numel - start) * item_bytes]
                if name in parameters:
                    reader.read_into(piece, parameters[name], "weight", start)
                else:
                    initial.read_into(piece, name, start)
                yield piece

    write_tensor_file(path, tensors, content())


def _free_place(path: Path) -> Path:
    """Where a folder can appear by a rename. Raises InputError."""
    try:
        folder = path.resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{path} exists and is no empty folder; name a new one")
        if folder == Path.cwd() or folder.is_mount():
            raise InputError(f"{path} is the current folder or a mount point; name a new folder in it")
        parent = next(parent for parent in folder.parents if parent.exists())
        if not parent.is_dir():
            raise InputError(f"cannot make {path}: {parent} is a file")
    except (OSError, RuntimeError) as error:  # the latter for links in a circle
        raise InputError(f"cannot make {path}: {getattr(error, 'strerror', error)}") from error
    return folder


def _export(options: argparse.Namespace) -> int:
    folder = _free_place(options.folder)
    run = RunFolder(options.run_folder.absolute())
    checkpoint, manifest = choose_checkpoint(run, options.step)
    export_checkpoint(run, checkpoint, manifest, folder, merge=options.merge)
    say(f"step {manifest.step} of run {run.run_id} exported to {options.folder}")
    return ExitCode.SUCCEEDED


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="distlm export", description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--merge", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="distlm: warning: %(message)s", level=logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)  # a half-written folder is removed
    return exit_code_of(lambda: _export(options))


if __name__ == "__main__":
    sys.exit(main())
