"""With what a run was made: versions of the packages and the commit of the code in the current folder."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("distlm", "torch", "transformers", "deepspeed", "accelerate", "ray", "mlflow")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what is computed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of the current folder's repository, with "-dirty" where tracked files are changed; "" outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
