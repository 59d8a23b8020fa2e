"""Where the weights come from that a run begins with: what another run has trained becomes a folder in the cache."""

from __future__ import annotations

from pathlib import Path

from distlm.config.schema import RunConfig
from distlm.data.cache import make_folder
from distlm.errors import DistlmError, InputError, Problem
from distlm.run_folder import RunFolder
from distlm.run_reference import export_in_cache, resolve_reference


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

    kind = "model" if merge else "adapter"
    exported = export_in_cache(name_or_path, run.cache, kind)
    if exported is not None and exported.is_dir():
        return str(exported)
    try:
        reference = resolve_reference(name_or_path, run.runs_dir)
        if reference is None:
            return name_or_path
        checkpoint, manifest = choose_checkpoint(reference.run, str(reference.step))
        exported = export_in_cache(reference.text(run.runs_dir), run.cache, kind)
        assert exported is not None, "it is written out"

        def write(partial: Path) -> None:
            export_checkpoint(reference.run, checkpoint, manifest, partial / "exported", merge=merge)

        make_folder(exported.parent, write)
        return str(exported)
    except InputError as error:
        raise InputError(Problem(str(error), key, name_or_path)) from error
    except DistlmError as error:
        raise InputError(Problem(f"cannot be used: {error}", key, name_or_path)) from error
