"""Which run a user means."""

from __future__ import annotations

from pathlib import Path

from distlm.config.attempt import read_run_yaml
from distlm.errors import InputError
from distlm.run_folder import RunFolder, runs_in


def find_run(runs_dir: Path, name: str) -> RunFolder:
    """The run named by its id, a beginning of it, its folder, or 'last'; or the newest of those with that name. Raises
    InputError unless it is exactly one."""
    if (Path(name) / "run.yaml").is_file() and (Path(name) / "attempts").is_dir():
        return RunFolder(Path(name).absolute())
    for folder in (Path(name), runs_dir / name):
        if (folder / "attempts").is_dir() and not (folder / "run.yaml").is_file():
            raise InputError(f"{folder} has no run.yaml, the config of a run, any more; it cannot be used without")
    known = [run for run in runs_in(runs_dir) if run.run_yaml.is_file()]
    if name == "last":
        found = [run for run in known if run.created_s is not None][:1]
    else:
        found = [run for run in known if run.run_id.startswith(name)]
        found = found or [run for run in known if run_name(run) == name][:1]
    if len(found) == 1:
        return found[0]
    if not found:
        newest = ", ".join(run.run_id for run in known[:5]) or "none"
        raise InputError(
            f"there is no run {name} in {runs_dir} (newest runs: {newest}); use --runs-dir for another folder"
        )
    raise InputError(f"{name} is the beginning of {len(found)} runs: {', '.join(run.run_id for run in found[:5])}")


def run_name(run: RunFolder) -> str | None:
    """The `name` in the config of a run; None where it is damaged."""
    try:
        return str(read_run_yaml(run)["name"])
    except (InputError, KeyError):
        return None
