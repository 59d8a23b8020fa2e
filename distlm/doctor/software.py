"""Python, packages, the C++ compiler and git."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import NamedTuple

from distlm.doctor import Finding, findings

_INSTALL = "pip install 'distlm[train]'"
_TIMEOUT_S = 30.0


class Requirement(NamedTuple):
    """Of a package's metadata, such as `ray[train]<2.61,>=2.60; extra == "train"`."""

    name: str
    versions: str
    """Such as <2.61,>=2.60; empty: any."""
    extra: str


def parse_requirement(text: str) -> Requirement:
    """Raises ValueError for what is no requirement."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(?:\[.*?\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?", text)
    if match is None:
        raise ValueError(f"{text!r} is no requirement")
    extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", match[3] or "")
    return Requirement(match[1], match[2].replace(" ", ""), extra[1] if extra else "")


def is_within(found: str, versions: str) -> bool:
    """Whether a version is in a range of >=, >, <=, <, == and !=, which is all that we declare. Only the numbers before
    a suffix such as rc1 or +cpu count."""
    for part in filter(None, versions.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|>|<)([0-9.]+)", part)
        if match is None:
            raise ValueError(f"{part!r} is no range of versions")
        has, bound = _numbers(found), _numbers(match[2])
        length = max(len(has), len(bound))
        has, bound = (numbers + (0,) * (length - len(numbers)) for numbers in (has, bound))
        holds = {
            ">=": has >= bound, "<=": has <= bound, "==": has == bound, "!=": has != bound, ">": has > bound,
            "<": has < bound,
        }  # fmt: skip
        if not holds[match[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def check_software() -> Iterator[Finding]:
    return findings({"packages": _check_packages, "C++ compiler": _check_compiler, "git": _check_git})


def _check_packages() -> Iterator[Finding]:
    """Python and what distlm declares to need, by what pip has noted."""
    try:
        ours = distribution("distlm")
    except PackageNotFoundError:
        yield Finding("ok", "Python", platform.python_version())
        yield Finding(
            "warning", "distlm", "not installed as a package, so the versions that it needs are not known",
            "pip install -e '.[train]' in its folder",
        )  # fmt: skip
        return
    python, wanted = platform.python_version(), str(ours.metadata.json.get("requires_python") or "")
    if is_within(python, wanted):
        yield Finding("ok", "Python", python)
    else:
        yield Finding("missing", "Python", f"{python} is not in {wanted}", "use one that is")
    for requirement in map(parse_requirement, ours.requires or []):
        if requirement.extra in ("", "train"):
            yield check_package(requirement)


def check_package(requirement: Requirement) -> Finding:
    name, versions, _ = requirement
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("missing", name, f"not installed (needs {versions or 'any version'})", _INSTALL)
    if is_within(found, versions):
        return Finding("ok", name, found)
    return Finding("warning", name, f"{found} is not in {versions}, which is what is tested", f"{_INSTALL} --upgrade")


def _check_compiler() -> Finding:
    """By compiling a line, which also needs the standard headers."""
    subject = "C++ compiler"
    advice = (
        "deepspeed.offload_optimizer_device, offload_param_device and training.torch_compile need one: install g++ (on "
        "Debian and Ubuntu: the package build-essential), or set CXX"
    )
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))  # such as: ccache g++
    except ValueError as error:
        return Finding("warning", subject, f"CXX = {os.environ['CXX']}: {error}", "correct it, or unset it")
    names = [chosen, ["c++"], ["g++"], ["clang++"]]
    command = next(([found, *name[1:]] for name in names if name and (found := shutil.which(name[0]))), None)
    if command is None:
        return Finding("warning", subject, "none found", advice)
    compiler = shlex.join(command)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "one.cpp")
            source.write_text("#include <vector>\nint main() { return int(std::vector<int>().size()); }\n")
            _run(*command, str(source), "-o", str(source.with_suffix("")))
        return Finding("ok", subject, f"{compiler}: {_run(*command, '--version').splitlines()[0]}")
    except subprocess.CalledProcessError as error:
        reason = ([line for line in error.stderr.splitlines() if "error" in line] or ["no reason given"])[0]
        return Finding("warning", subject, f"{compiler} does not compile: {reason}", advice)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return Finding("warning", subject, f"{compiler} does not work: {error}", advice)


def _check_git() -> Finding:
    try:
        return Finding("ok", "git", _run("git", "--version").strip().removeprefix("git version "))
    except (OSError, subprocess.SubprocessError):
        return Finding("warning", "git", "not found", "install it, so that runs record the commit of their code")


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_TIMEOUT_S,
        stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return done.stdout
