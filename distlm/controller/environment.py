"""The installed packages, as `pip freeze` prints them, and the machine; without pip, network or torch."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from distlm.controller.repository import Git, GitError, remote_url
from distlm.limits import available_cpus
from distlm.redact import redact_uri

DECISIVE_PACKAGES = ("distlm", "torch", "transformers", "deepspeed", "accelerate", "ray", "mlflow")
"""Those whose versions are also tags in MLflow."""


def versions(packages: Sequence[str] = DECISIVE_PACKAGES) -> dict[str, str]:
    """Installed versions of packages, by default those that decide what is computed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment_text() -> str:
    """The content of environment.txt: the machine in comment lines, which pip ignores, then the packages."""
    header = [f"# {name}: {value}" for name, value in machine().items()]
    return "\n".join([*header, *freeze()]) + "\n"


def parse_environment(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """The machine, and the line of each package by its normalised name, from the content of environment.txt."""
    lines = text.splitlines()
    pairs = [line.removeprefix("# ").partition(": ") for line in lines if line.startswith("# ")]
    found = {name: value for name, colon, value in pairs if colon and name in _MACHINE}
    packages = {}
    for before, line in pairwise(["", *lines]):
        if line and not line.startswith("#"):
            # An editable install without an address is named in the comment before it.
            named = re.match(r"# Editable .*\((\S+==\S+)\)", before) if line.startswith("-e ") else None
            line = f"{named[1]} {line}" if named else line
            packages[_normalised(_name_in(line))] = line
    return found, packages


# --- the machine -----------------------------------------------------------------------------------------------------

_MACHINE = ("python", "platform", "cpu", "cpu cores", "devices", "cuda", "cuda driver")


def machine() -> dict[str, str]:
    """What the numbers of a run may depend on besides packages, on the node of the controller."""
    names, driver = _gpus()
    found = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu cores": str(available_cpus()),
        "devices": ", ".join(names) or "no NVIDIA GPU",
        "cuda": _cuda_of_torch(),
        "cuda driver": driver,
    }
    return {name: value for name, value in found.items() if value}


def _cpu_model() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def _cuda_of_torch() -> str:
    """The CUDA (or ROCm) that torch was built for, without importing torch, which takes seconds."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ""
    try:
        text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.findall(r"^(cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return ", ".join(f"{name} {number}" if name == "hip" else number for name, number in found) or "none (CPU build)"


def _gpus() -> tuple[list[str], str]:
    """Names of the NVIDIA GPUs of this node, and the newest CUDA that the driver knows."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - no library or no driver, in whatever way
        return [], ""
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        number = pynvml.nvmlSystemGetCudaDriverVersion()
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles], f"{number // 1000}.{number % 1000 // 10}"
    except Exception:  # noqa: BLE001 - a device that is lost; a record is no reason to fail
        return [], ""
    finally:
        with suppress(Exception):
            pynvml.nvmlShutdown()


# --- packages --------------------------------------------------------------------------------------------------------

_NOT_LISTED = {"pip", "python", "argparse", "wsgiref"} | (
    {"setuptools", "wheel", "distribute"} if sys.version_info < (3, 12) else set()
)
"""By `pip freeze`."""


def freeze(path: Sequence[str] | None = None) -> list[str]:
    """The lines of `pip freeze`, with credentials in URLs redacted. `path`: where to look, by default sys.path."""
    where = _search_path() if path is None else list(path)
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=where):
        if name := distribution.metadata["Name"]:
            found.setdefault(_normalised(name), distribution)  # the first on the path is the one that is imported
    listed = [(found[name].metadata["Name"], found[name]) for name in found if name not in _NOT_LISTED]
    return [line for name, one in sorted(listed, key=lambda pair: pair[0].lower()) for line in _lines(name, one)]


def _search_path() -> list[str]:
    """sys.path without the current folder, which `python -m` puts first and pip does not look into."""
    first, *others = sys.path
    return others if first in ("", str(Path.cwd())) else sys.path


def _lines(name: str, distribution: Distribution) -> list[str]:
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "null")
        if not origin:
            return [f"{name}=={distribution.version}"]
        if origin.get("dir_info", {}).get("editable"):
            return _editable(name, distribution.version, Path(unquote(urlsplit(origin["url"]).path)))
        return [f"{name} @ {_direct_reference(origin)}"]
    except (ValueError, KeyError, AttributeError):  # what an installer has written is no PEP 610
        return [f"{name}=={distribution.version}"]


def _direct_reference(origin: dict[str, Any]) -> str:
    url, fragments = redact_uri(origin["url"]), []
    if vcs := origin.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    elif digest := _digest(origin.get("archive_info") or {}):
        fragments.append(digest)
    if subdirectory := origin.get("subdirectory"):
        fragments.append(f"subdirectory={subdirectory}")
    return f"{url}#{'&'.join(fragments)}" if fragments else url


def _digest(archive: dict[str, Any]) -> str:
    algorithms = sorted(archive.get("hashes") or {})
    return archive.get("hash") or (f"{algorithms[0]}={archive['hashes'][algorithms[0]]}" if algorithms else "")


def _editable(name: str, version_text: str, folder: Path) -> list[str]:
    """Of a checkout with a remote its address, else the folder, as pip does."""
    git = Git(folder)
    try:
        top, commit = git.line("rev-parse", "--show-toplevel"), git.line("rev-parse", "HEAD")
        remote = remote_url(git)
    except GitError:
        return [f"# Editable install with no version control ({name}=={version_text})", f"-e {folder}"]
    if remote is None:
        return [f"# Editable Git install with no remote ({name}=={version_text})", f"-e {folder}"]
    inside = os.path.relpath(os.path.realpath(folder), os.path.realpath(top))
    subdirectory = "" if inside == "." else f"&subdirectory={inside}"
    return [f"-e git+{_as_url(remote)}@{commit}#egg={name.replace('-', '_')}{subdirectory}"]


def _as_url(remote: str) -> str:
    if re.match(r"\w+://", remote):
        return remote
    if os.path.exists(remote):
        return Path(remote).absolute().as_uri()
    if found := re.match(r"(\w+@)?([^/:]+):(\w[^:]*)$", remote):  # git@host:folder/name.git
        return f"ssh://{found[1] or ''}{found[2]}/{found[3]}"
    return remote


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _name_in(line: str) -> str:
    """The name of the package in a line of `pip freeze`."""
    if found := re.search(r"#egg=([^&]+)", line):
        return found[1]
    return re.split(r"==| @ ", line.removeprefix("-e "))[0]
