"""What is wrong with the files and folders that a config names, as far as this machine sees them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from distlm.config.resolve import looks_at_documents
from distlm.config.schema import RunConfig
from distlm.data.rows import check_rows, labelled_columns
from distlm.data.sources import check_source
from distlm.errors import Problem
from distlm.run_reference import check_references


def check_files(config: RunConfig) -> Iterator[Problem]:
    """Data, local models and tokenizers, other runs, and the folder for runs."""
    for section, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            is_text = config.task.type == "masked-lm"
            for problem in (
                check_source(source)
                if is_text
                else check_rows(source, labelled_columns(source, looks_at_documents(config.task)))
            ):
                key = ".".join(filter(None, ("data", section, str(index), problem.key)))
                yield Problem(_with_place(problem), key, problem.value)
    for key, name in (
        ("model.name_or_path", config.model.name_or_path),
        ("tokenizer.name_or_path", config.tokenizer.name_or_path),
    ):
        if name and name.startswith("~"):
            yield Problem("'~' is not expanded here; write ${HOME} for it", key)
        elif name and name.startswith((".", "/")) and not os.path.isdir(name):
            yield Problem("there is no such folder", key)
    yield from check_references(config)
    yield from _check_runs_dir(Path(config.runs_dir))


def _with_place(problem: Problem) -> str:
    """The problem of a data file as one text: the key of the config is said by the caller."""
    return f"{problem.location}: {problem.message}" if problem.location else problem.message


def _check_runs_dir(runs_dir: Path) -> Iterator[Problem]:
    nearest = next(path for path in (runs_dir, *runs_dir.parents, Path("/")) if os.path.exists(path))
    if str(runs_dir).startswith("~"):
        yield Problem("'~' is not expanded here; write ${HOME} for it", "runs_dir")
    elif not nearest.is_dir():
        yield Problem(f"{nearest} is a file, and a folder is needed", "runs_dir")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        yield Problem(f"nothing can be written to the folder {nearest}", "runs_dir")
