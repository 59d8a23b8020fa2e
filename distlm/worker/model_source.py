"""Where the weights come from that a run begins with: what another run has trained becomes a folder in the cache."""

from __future__ import annotations

from pathlib import Path

from distlm.config.schema import RunConfig
from distlm.data.cache import make_folder
from distlm.errors import DistlmError, InputError, Problem
from distlm.run_folder import RunFolder
from distlm.run_reference import resolve_reference


def with_local_weights(config: RunConfig, run: RunFolder) -> RunConfig:
    """The config with folders in place of its references to other runs.

    Raises InputError where a run or its checkpoint cannot be used.
    """
    if config.model.name_or_path is not None:
        folder = _folder(config.model.name_or_path, "model.name_or_path", run, merge=True)
        config = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": folder})})
    if config.peft is not None and "adapter_name_or_path" in config.peft:
        folder = _folder(str(config.peft["adapter_name_or_path"]), "peft.adapter_name_or_path", run, merge=False)
        config = config.model_copy(update={"peft": config.peft | {"adapter_name_or_path": folder}})
    return config


def _folder(name_or_path: str, key: str, run: RunFolder, merge: bool) -> str:
    """The folder with what a reference means; others than references stay as they are."""
    from distlm.worker.export import choose_checkpoint, export_checkpoint

    try:
        reference = resolve_reference(name_or_path, run.runs_dir)
        if reference is None:
            return name_or_path
        checkpoint, manifest = choose_checkpoint(reference.run, str(reference.step))
        kind = "model" if merge else "adapter"
        folder = run.cache / f"{kind}-{reference.run.run_id}-{reference.step}"

        def write(partial: Path) -> None:
            export_checkpoint(reference.run, checkpoint, manifest, partial / "exported", merge=merge)

        make_folder(folder, write)
        return str(folder / "exported")
    except InputError as error:
        raise InputError(Problem(str(error), key, name_or_path)) from error
    except DistlmError as error:
        raise InputError(Problem(f"cannot be used: {error}", key, name_or_path)) from error
