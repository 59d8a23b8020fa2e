"""How the records of two attempts differ: why a run that is to equal another one may give other numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distlm.controller.environment import DECISIVE_PACKAGES, parse_environment
from distlm.run_folder import AttemptFolder, read_json

_SHOWN_PACKAGES = 5
_COMMIT_CHARACTERS = 12
SAME_REPOSITORY = "working_directory"
"""In code.json in place of distlm's own repository, where it is that of the working directory."""


@dataclass(frozen=True)
class AttemptRecord:
    """What distlm.controller.provenance has recorded of an attempt; None: nothing of the kind."""

    code: dict[str, Any] | None
    environment: str | None
    data: dict[str, Any] | None

    @classmethod
    def read(cls, folder: AttemptFolder) -> AttemptRecord:
        """Raises InputError for damaged files, OSError for unreadable ones."""
        try:
            environment = folder.environment_txt.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            environment = None
        return cls(read_json(folder.code_json), environment, read_json(folder.data_json))


def differences(ours: AttemptRecord, theirs: AttemptRecord, name: str) -> Iterator[str]:
    """One line for each difference. `name` is what the other attempt is called."""
    parts: tuple[tuple[str, Any, Any, Callable[[Any, Any, str], Iterator[str]]], ...] = (
        ("code", ours.code, theirs.code, _code),
        ("environment", ours.environment, theirs.environment, _environment),
        ("data", ours.data, theirs.data, _data),
    )
    for what, mine, other, compare in parts:
        if mine is not None and other is not None:
            yield from compare(mine, other, name)
        elif mine is not None:
            yield f"{what}: {name} has no record of it, so it is not compared"


def _code(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> Iterator[str]:
    is_one = ours["distlm"] == theirs["distlm"] == SAME_REPOSITORY
    for part in ("working_directory",) if is_one else ("working_directory", "distlm"):
        what = f"code of {'distlm' if part == 'distlm' else 'the working directory'}"
        mine, other = (
            code["working_directory"] if code[part] == SAME_REPOSITORY else code[part] or {} for code in (ours, theirs)
        )
        commits = mine.get("commit"), other.get("commit")
        if commits[0] != commits[1]:
            shown = [commit[:_COMMIT_CHARACTERS] if commit else "none" for commit in commits]
            yield f"{what}: commit {shown[0]} ({name}: {shown[1]})"
        elif commits[0] and None in (mine.get("diff_sha256"), other.get("diff_sha256")):
            yield f"{what}: whether uncommitted changes are the same is not known"
        elif mine.get("diff_sha256") != other.get("diff_sha256"):
            yield f"{what}: the uncommitted changes are not those of {name}"


def _environment(ours: str, theirs: str, name: str) -> Iterator[str]:
    (machine, packages), (other_machine, other_packages) = parse_environment(ours), parse_environment(theirs)
    for key in dict.fromkeys([*machine, *other_machine]):
        if machine.get(key) != other_machine.get(key):
            yield f"{key}: {machine.get(key, 'none')} ({name}: {other_machine.get(key, 'none')})"
    changed = [
        package
        for package in sorted(packages.keys() | other_packages.keys())
        if packages.get(package) != other_packages.get(package)
    ]
    for package in changed:
        if package in DECISIVE_PACKAGES:
            lines = [found.get(package, "not installed") for found in (packages, other_packages)]
            yield f"package {package}: {lines[0]} ({name}: {lines[1]})"
    if others := [package for package in changed if package not in DECISIVE_PACKAGES]:
        more = ", ..." if len(others) > _SHOWN_PACKAGES else ""
        yield (
            f"{len(others)} other package{'s are' if len(others) > 1 else ' is'} not as in {name}: "
            f"{', '.join(others[:_SHOWN_PACKAGES])}{more} (environment.txt)"
        )


def _data(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> Iterator[str]:
    for split in ("train", "validation"):
        digests = [(data[split] or {}).get("content_sha256") for data in (ours, theirs)]
        if digests[0] != digests[1]:
            sources = _changed_sources(ours["sources"][split], theirs["sources"][split])
            yield f"data.{split}: the text is not that of {name}{f' ({sources})' if sources else ''}"
    if ours["tokenizer_sha256"] != theirs["tokenizer_sha256"]:
        yield f"tokenizer: it is not that of {name}"
    if ours["initial_weights_sha256"] != theirs["initial_weights_sha256"]:
        yield f"initial weights: they are not those of {name}"


def _changed_sources(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Names of the training sources with other text, as far as that is recorded."""
    if len(ours) != len(theirs):
        return f"{len(ours)} sources, and it had {len(theirs)}"
    pairs = zip(ours, theirs, strict=True)
    return "; ".join(mine["name"] for mine, other in pairs if mine.get("content_sha256") != other.get("content_sha256"))
