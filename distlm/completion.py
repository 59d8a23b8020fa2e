"""What a shell is told when it asks how a `distlm` command may go on. Imported only when it does (`_ARGCOMPLETE`)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import argcomplete
from argcomplete.completers import DirectoriesCompleter, FilesCompleter

from distlm.run_folder import runs_in

_MAX_RUNS = 50


def complete(parser: argparse.ArgumentParser) -> None:
    """Write the completions of the command line that the shell names, and end this process."""
    for verb in _verbs(parser):
        for action in verb._actions:
            if (completer := _COMPLETERS.get(action.dest)) is not None:
                action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it
    argcomplete.autocomplete(parser, always_complete_options=False)


def _verbs(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _runs(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Ids, newest first, then `last`; and folders, for a run that lies elsewhere."""
    if "/" in prefix:
        return list(DirectoriesCompleter()(prefix))
    found = [run.run_id for run in runs_in(parsed_args.runs_dir) if run.run_yaml.is_file()]
    return [name for name in (*found[:_MAX_RUNS], "last") if name.startswith(prefix)]


def _overrides(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Keys that end in "=", and after it the values of those that have few."""
    from distlm.config.resolve import MAY_CHANGE_ON_RESUME

    key, equals, _written = prefix.partition("=")
    allowed = MAY_CHANGE_ON_RESUME if hasattr(parsed_args, "run") else ""
    keys = [(name, annotation) for name, annotation in _keys() if name.startswith(allowed)]
    if equals:
        found = [f"{key}={value}" for name, annotation in keys if name == key for value in _values(annotation)]
    else:
        found = [f"{name}=" for name, _ in keys]
    return [item for item in dict.fromkeys(found) if item.startswith(prefix)]


def _keys() -> Iterator[tuple[str, Any]]:
    """The keys that hold a value, with its annotation; those of a list's items as those of its first item."""
    from distlm.config.load import all_fields, models_in

    lists: list[str] = []
    for key, annotation in all_fields():
        if not any(models_in(annotation)):
            for one in lists:
                key = key.replace(f"{one}.", f"{one}.0.", 1) if key.startswith(f"{one}.") else key
            yield key, annotation
        elif get_origin(annotation) is list:
            lists.append(key)


def _values(annotation: Any) -> list[str]:
    """The values of a Literal or a boolean, in the words of YAML."""
    if annotation is bool:
        return ["true", "false"]
    if annotation is type(None):
        return ["null"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if get_origin(annotation) is list:
        return []
    values = [value for inner in get_args(annotation) for value in _values(inner)]
    return values if values != ["null"] else []


_FOLDERS = DirectoriesCompleter()
_COMPLETERS: dict[str, Any] = {
    "run": _runs,
    "config": FilesCompleter(("yaml", "yml"), directories=True),
    "overrides": _overrides,
    "runs_dir": _FOLDERS,
    "dir": _FOLDERS,
    "input": FilesCompleter(),
    "data": FilesCompleter(),
    "step": lambda **_: ["last", "best"],
}
"""By the name of the argument, which means the same in every verb."""
