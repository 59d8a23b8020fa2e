"""What a finished run says about itself, as far as predictions need it, and how the user's tables are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from distlm.config.attempt import current_tree
from distlm.config.load import expanded
from distlm.config.schema import (
    FilesSource,
    ParallelSource,
    Source,
    Task,
    TextClassificationTask,
    TokenClassificationTask,
)
from distlm.data.tables import FormatName, describe_unsupported, format_of
from distlm.errors import InputError, Problem
from distlm.run_folder import RunFolder, read_json
from distlm.table_arguments import TableArguments, option
from distlm.worker.prepare import Prepared

_Source = TypeVar("_Source", FilesSource, ParallelSource)


@dataclass(frozen=True)
class RunSettings:
    """Parts of a run's config and of what was prepared for it."""

    task: TextClassificationTask | TokenClassificationTask
    source: Source
    """The first one of the training sources."""
    prepared: Prepared
    max_seq_length: int
    batch_size: int
    """Samples of a batch of an evaluation."""
    max_batch_tokens: int | None
    """Of a batch, padding included."""
    mixed_precision: str

    @classmethod
    def of(cls, run: RunFolder, verb: str) -> Self:
        """Raises InputError for a run that was never prepared, is damaged, or has no labels to predict."""
        tree = current_tree(run)
        try:
            if tree.get("task", {}).get("type", "masked-lm") == "masked-lm":
                message = (
                    f"run {run.run_id} trains masked-lm, which fills in hidden words and knows no labels, so there is "
                    f"nothing to {verb}; name a run of text-classification or token-classification, or use its model "
                    f'with transformers: pipeline("fill-mask", model="{run.model}")'
                )
                raise InputError(message)
            prepared = read_json(run.init / "prepared.json")
            if prepared is None:
                raise InputError(f"run {run.run_id} was never prepared: {run.init / 'prepared.json'} is missing")
            training = tree["training"]
            task: Any = TypeAdapter(Task).validate_python(expanded(tree["task"], "task"))
            return cls(
                task=task,
                source=TypeAdapter(Source).validate_python(tree["data"]["train"][0]),
                prepared=Prepared(**prepared),
                max_seq_length=int(tree["data"]["max_seq_length"]),
                batch_size=int(training["per_device_eval_batch_size"]),
                max_batch_tokens=training.get("per_device_train_batch_tokens"),
                mixed_precision=training["mixed_precision"],
            )
        except (KeyError, TypeError, AttributeError, IndexError, ValidationError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"{run.run_yaml} or {run.init / 'prepared.json'} is damaged: {text}") from error

    @property
    def labels(self) -> list[str]:
        """Those that the model knows, by id; empty for a regression."""
        return self.prepared.labels[: self.prepared.num_labels]


def labelled_source(
    settings: RunSettings, paths: Sequence[Path], arguments: TableArguments
) -> FilesSource | ParallelSource:
    """How labelled data is read: tables as `files_source` has it; parallel files where each path is COLUMN=FILE."""
    are_named = any("=" in str(path) and not path.exists() for path in paths)
    want_names = settings.source.source == "parallel" and arguments.format is None and _without_format(paths)
    if not are_named and not want_names:
        return files_source(settings, paths, arguments)
    columns: dict[str, str] = {}
    for path in paths:
        name, equals, file = str(path).partition("=")
        if path.exists() or not (name and equals and file) or name in columns:
            message = "name one file for each column, COLUMN=FILE (text=seq.in label=seq.out), or tables alone"
            raise InputError(Problem(message, location=str(path)))
        columns[name] = file
    for argument in ("column_names", "delimiter", "format"):
        if getattr(arguments, argument) is not None:
            message = "is for tables; line i of each COLUMN=FILE is row i"
            raise InputError(Problem(message, option(argument), getattr(arguments, argument)))
    known = _columns_of_run(settings.source) | {"encoding": getattr(settings.source, "encoding", "utf-8")}
    known |= _given(arguments, "text_column", "text_pair_column", "label_column", "encoding")
    return _validated(ParallelSource, source="parallel", columns=columns, **known)


def files_source(settings: RunSettings, paths: Sequence[Path], arguments: TableArguments) -> FilesSource:
    """How files are read: as the arguments say, else with the columns of the run's first training source, and, where
    that one is files of the same format, laid out as those are. Raises InputError."""
    trained: Any = settings.source
    known = _columns_of_run(trained)
    form = _format(paths, arguments, trained)
    if trained.source == "files" and form == (trained.format or format_of(Path(trained.paths[0]), rows=True)):
        known |= {name: getattr(trained, name) for name in ("column_names", "delimiter", "encoding")}
    if arguments.column_names is not None:
        known["column_names"] = arguments.column_names.split(",")
    known |= _given(arguments, "text_column", "text_pair_column", "label_column", "delimiter", "encoding")
    if arguments.delimiter == "\\t":  # what a shell makes of '\t'
        known["delimiter"] = "\t"
    return _validated(FilesSource, source="files", paths=[str(path) for path in paths], format=form, **known)


def _columns_of_run(trained: Any) -> dict[str, Any]:
    return {
        "text_column": getattr(trained, "text_column", "text"),
        "text_pair_column": trained.text_pair_column,
        "label_column": trained.label_column,
        "document_column": trained.document_column,
    }


def _given(arguments: TableArguments, *names: str) -> dict[str, str]:
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _validated(kind: type[_Source], **keys: Any) -> _Source:
    """Raises InputError, with the names of arguments for those of keys."""
    try:
        return kind(**keys)
    except ValidationError as error:
        problems = (
            Problem(details["msg"], option(str(details["loc"][0])), str(details["input"])) for details in error.errors()
        )
        raise InputError(*problems) from None


def _format(paths: Sequence[Path], arguments: TableArguments, trained: Any) -> FormatName | None:
    """Of all files; None: each has its own, which its suffix tells."""
    form: Any = arguments.format
    if form is not None:
        return form
    forms = {format_of(path, rows=True) for path in paths}
    if None in forms:
        if trained.source == "files" and trained.format is not None:
            form = trained.format
            return form
        if unknown := _without_format(paths):
            message = f"{describe_unsupported(unknown[0], rows=True)}; or say which it is with --format"
            raise InputError(Problem(message, location=str(unknown[0])))
        return None
    return forms.pop() if len(forms) == 1 else None


def _without_format(paths: Sequence[Path]) -> list[Path]:
    """Files whose suffix tells none."""
    return [path for path in paths if format_of(path, rows=True) is None and not path.is_dir()]


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Problems of a source are said with the argument that mends them, in place of the config's key."""
    try:
        yield
    except InputError as error:
        raise InputError(*map(_with_argument, error.problems)) from error


def _with_argument(problem: Problem) -> Problem:
    name = problem.key.rpartition(".")[2]
    is_argument = name in TableArguments.__dataclass_fields__
    return replace(problem, key=option(name) if is_argument else "")
