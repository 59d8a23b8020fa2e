"""A new run that equals another one: its config, and what the user wants to be otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm import __version__
from distlm.config.attempt import Attempt, accepted_attempts, read_run_yaml, written_tree
from distlm.config.load import LoadedConfig, load_tree, read_config, with_overrides
from distlm.config.resolve import flatten
from distlm.config.schema import RunConfig
from distlm.errors import InputError, Problem
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder

_PATH_KEYS = ("data", "model", "tokenizer")
"""Sections that may hold relative paths."""
_MAX_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Reproduction:
    """The config of a new run that equals another one but for overrides."""

    original: RunFolder
    loaded: LoadedConfig
    changed: list[str]
    """What the overrides make otherwise, as "key = new (was old)"."""
    warnings: list[str]
    """Why the numbers of the two may differ though nothing was overridden, as far as their configs tell."""


def reproduce(
    original: RunFolder, overrides: Sequence[str], check: Callable[[RunConfig], Iterator[Problem]]
) -> Reproduction:
    """The config that `original` has after its last resume, with `overrides` on top.

    Raises InputError, located in the files of `original` or on the command line.
    """
    run_yaml = Path(os.path.relpath(original.run_yaml))
    _, origins = read_config(run_yaml)
    attempts = [(folder, Attempt.read(folder)) for folder in accepted_attempts(original)]
    tree = read_run_yaml(original)
    trees = [with_overrides(tree, attempt.changes) for _, attempt in attempts]
    if attempts:
        folder, last = attempts[-1]
        origins |= {item.partition("=")[0]: os.path.relpath(folder.attempt_yaml) for item in last.changes}
    else:
        last = None
    try:
        loaded = load_tree(written_tree(original, last.changes if last else ()), overrides, check, origins=origins)
    except InputError as error:
        causes = _possible_causes(original, last, error.problems) if last else []
        raise InputError(*error.problems, *causes) from None
    warnings = list(_resized(original, trees))
    if last and _is_elsewhere(last):
        warnings.append(_elsewhere(original, last))
    before = trees[-1] if trees else tree
    return Reproduction(original, loaded, list(_changed(before, with_overrides(before, overrides))), warnings)


def original_of(run: RunFolder) -> RunFolder | None:
    """The run that this one was submitted to equal; None: none. Raises InputError for damaged files."""
    first = run.attempts()[:1]  # a resume of it equals the same run
    path = Attempt.read(first[0]).reproduces if first else ""
    return RunFolder(Path(path)) if path else None


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    old, new = flatten(before), flatten(after)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield f"{key} = {_shown(new.get(key))} (was {_shown(old.get(key))})"


def _shown(value: Any) -> str:
    text = redact_uri("null" if value is None else str(value))
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[: _MAX_SHOWN_CHARACTERS - 3] + "..."


def _resized(original: RunFolder, trees: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The numbers of a run depend in their last bits on its workers and its ZeRO stage."""
    for section, key, what in (("resources", "num_workers", "workers"), ("deepspeed", "zero_stage", "ZeRO stage")):
        values = [tree.get(section, {}).get(key) for tree in trees]
        texts = [str(value) for value in values]
        if len(set(texts)) > 1 or any(isinstance(value, list) for value in values):
            yield (
                f"the attempts of run {original.run_id} had {what} {', '.join(texts)}, and this run has those of the "
                "last: their numbers are the same up to rounding"
            )


def _possible_causes(original: RunFolder, last: Attempt, problems: Sequence[Problem]) -> Iterator[str]:
    """Why a config that was good once is refused."""
    if last.distlm_version != __version__:
        yield f"run {original.run_id} was made by distlm {last.distlm_version}, and this is {__version__}"
    if _is_elsewhere(last) and any(problem.key.partition(".")[0] in _PATH_KEYS for problem in problems):
        yield _elsewhere(original, last)


def _is_elsewhere(last: Attempt) -> bool:
    return last.working_directory not in ("", str(Path.cwd()))


def _elsewhere(original: RunFolder, last: Attempt) -> str:
    return (
        f"run {original.run_id} was started in {last.working_directory}, where its relative paths begin; here they "
        f"begin in {Path.cwd()}"
    )
