"""Data sets that the library `datasets` loads, copied into the cache as Parquet, up to a limit: their text, or the
columns that a task with labels reads.

    CACHE/dataset-FINGERPRINT/        part-00000.parquet, ..., dataset.json

Copying goes on where it stopped: each part that is on the disk comes with the position in the data set after it. No
code of a data set is executed: `datasets` has no loading scripts since version 4.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distlm.data.cache import fingerprint, make_folder
from distlm.data.lines import is_storage_failure
from distlm.data.notes import PreparationProgress, Report
from distlm.data.rows import column_keys
from distlm.data.sources import BUILDERS, DatasetsSource, check_dataset, source_name
from distlm.data.tables import FormatName, describe_missing_column, describe_no_text
from distlm.errors import InfrastructureError, InputError, Problem
from distlm.redact import drop_queries
from distlm.run_folder import read_json, write_json

_FORMAT_VERSION = 1
_PART_BYTES = 64 * 2**20
_STATE = "state.json"
_INFO = "dataset.json"
_COMMIT_CHARACTERS = 12
_BYTES_PER_VALUE = 8


@dataclass(frozen=True)
class ParquetFiles:
    """A source of files: a copy."""

    paths: list[str]
    source: Literal["files"] = "files"
    text_column: str = "text"
    encoding: str = "utf-8"
    encoding_errors: Literal["strict", "replace"] = "replace"
    format: FormatName | None = None
    column_names: list[str] | None = None
    delimiter: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    document_column: str | None = None
    max_documents: int | None = None


@dataclass(frozen=True)
class DatasetCopy:
    """A data set in the cache."""

    files: ParquetFiles
    identity: list[Any]
    """Tells its content from other content."""
    commit: str | None
    """On the Hub; None: not from there, or not known."""
    reached_limit: str
    """The setting that ended the copy; empty: it is whole."""


def copy_dataset(
    key: str,
    source: DatasetsSource,
    cache: Path,
    report: Report,
    revision: str | None,
    columns: Sequence[str] | None = None,
) -> DatasetCopy:
    """The source, copied into the cache unless it is there: its text, as the column `text`, or those `columns`.

    `revision` is the commit that a run has begun with, which it keeps; None: what the config says. Raises InputError
    with the config's key for what does not exist, lacks a column or holds no text, InfrastructureError where the
    network fails.
    """
    if problems := check_dataset(source):
        raise InputError(*(replace(problem, key=f"{key}.{problem.key}") for problem in problems))
    commit = revision or _commit(source)
    settings = fingerprint(_FORMAT_VERSION, _what_is_read(source, columns))
    folder = cache / f"dataset-{settings}-{commit[:_COMMIT_CHARACTERS] if commit else 'local'}"
    if commit is None and not _is_local(source) and (copies := _copies(cache, settings)):
        folder = copies[-1]  # the Hub does not answer, and here is what it gave before
    make_folder(folder, lambda partial: _Copy(key, source, commit, cache, report, columns).write(partial))
    info = read_json(folder / _INFO)
    paths = [str(path) for path in sorted(folder.glob("part-*.parquet"))]
    files = ParquetFiles(paths) if columns is None else ParquetFiles(paths, text_column=source.text_column)
    return DatasetCopy(files, [settings, folder.name], info["commit"], info["reached_limit"])


def _what_is_read(source: DatasetsSource, columns: Sequence[str] | None = None) -> list[Any]:
    """Everything that the copy depends on, but for the commit."""
    settings = [source.path, source.name, source.split, source.revision, source.data_files, source.text_column]
    limits = [source.max_documents, source.max_gib]
    states = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in _local_files(source)]
    what = [*settings, *limits, states]
    return what if columns is None else [*what, list(columns)]


def _is_local(source: DatasetsSource) -> bool:
    return source.path in BUILDERS or os.path.isdir(source.path)


def _local_files(source: DatasetsSource) -> list[Path]:
    if os.path.isdir(source.path):
        return sorted(file for file in Path(source.path).rglob("*") if file.is_file())
    names = source.data_files or [] if source.path in BUILDERS else []
    return [Path(match) for name in names for match in sorted(glob.glob(name, recursive=True))]


def _copies(cache: Path, settings: str) -> list[Path]:
    """Whole ones of these settings, oldest first."""
    found = [
        path for path in cache.glob(f"dataset-{settings}-*") if (path / _INFO).exists() and path.suffix != ".partial"
    ]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _commit(source: DatasetsSource) -> str | None:
    """What the revision stands for on the Hub now; None: not known."""
    if _is_local(source):
        return None
    from huggingface_hub import HfApi

    try:
        commit: str | None = HfApi().dataset_info(source.path, revision=source.revision, timeout=30).sha
    except Exception:  # noqa: BLE001 - what is wrong, loading will say
        return None
    return commit


class _Copy:
    """The making of one copy."""

    def __init__(
        self,
        key: str,
        source: DatasetsSource,
        commit: str | None,
        cache: Path,
        report: Report,
        columns: Sequence[str] | None,
    ) -> None:
        """`columns`: None for the text alone."""
        self._key, self._source, self._commit, self._cache, self._report = key, source, commit, cache, report
        self._columns = columns
        self._max_bytes = int(source.max_gib * 2**30)
        self._has_copied = False  # there is a part to go on after

    def write(self, folder: Path) -> None:
        if (folder / _INFO).exists():  # whoever made this was killed just before it was renamed
            (folder / _STATE).unlink(missing_ok=True)
            return
        state = read_json(folder / _STATE) or {"num_parts": 0, "num_documents": 0, "num_bytes": 0, "position": None}
        self._has_copied = state["num_parts"] > 0
        dataset = self._load()
        if state["position"] is not None:
            dataset.load_state_dict(state["position"])
        reached = ""
        rows: list[dict[str, Any]] = []
        part_bytes = 0
        for row in self._rows(dataset):
            size = sum(map(_size, row.values()))
            if reached := self._limit(state, size):
                break
            rows.append(row)
            part_bytes += size
            state["num_documents"] += 1
            state["num_bytes"] += size
            if part_bytes >= _PART_BYTES:
                self._write_part(folder, state, rows)
                state["num_parts"] += 1
                state["position"] = dataset.state_dict()
                write_json(folder / _STATE, state)
                self._has_copied = True
                rows, part_bytes = [], 0
        if not state["num_documents"]:
            raise InputError(self._nothing_copied(reached))
        if rows:  # no state tells of this part: whoever goes on from the last one writes it again
            self._write_part(folder, state, rows)
        write_json(folder / _INFO, {"commit": self._commit, "reached_limit": reached})
        (folder / _STATE).unlink(missing_ok=True)

    def _nothing_copied(self, reached: str) -> Problem:
        if reached:
            message = "the first document alone is larger; raise it"
            return Problem(message, f"{self._key}.max_gib", f"{self._source.max_gib:g}")
        return Problem("the split is empty", f"{self._key}.split", self._source.split)

    def _limit(self, state: dict[str, Any], size: int) -> str:
        """The setting that ends the copy before a further document; empty: there is room."""
        if state["num_documents"] == self._source.max_documents:
            return f"max_documents = {self._source.max_documents:,}"
        return f"max_gib = {self._source.max_gib:g}" if state["num_bytes"] + size > self._max_bytes else ""

    def _write_part(self, folder: Path, state: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Part number `num_parts`, which ends with the documents that `state` counts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._columns is None:
            table = pa.table({"text": pa.array([row["text"] for row in rows], pa.large_string())})
        else:
            columns = {name: [row[name] for row in rows] for name in self._columns}
            table = self._explained(lambda: pa.table({name: pa.array(values) for name, values in columns.items()}))
        path = folder / f"part-{state['num_parts']:05d}.parquet"
        with open(path, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        self._report(
            PreparationProgress(
                f"copying {source_name(self._source)}", state["num_bytes"], 0, num_documents=state["num_documents"]
            )
        )

    # --- the library -------------------------------------------------------------------------------------------------

    def _load(self) -> Any:
        """The split as an iterable data set."""
        source = self._source
        try:
            import datasets
        except ModuleNotFoundError:
            message = "the library datasets is not installed here; run: pip install 'distlm[train]'"
            raise InputError(Problem(message, self._key, source.path)) from None

        def load() -> Any:
            dataset = datasets.load_dataset(
                source.path,
                source.name,
                data_files=source.data_files,
                split=source.split,
                revision=self._commit or source.revision,
                streaming=source.streaming,
                # Never in the home folder.
                cache_dir=str(self._cache / "libraries" / "datasets"),
            )
            return dataset if source.streaming else dataset.to_iterable_dataset()

        return self._explained(load)

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        columns = [self._source.text_column] if self._columns is None else self._columns
        features = dataset.features or {}
        with_names = {name: decode for name in columns if (decode := _names_of_classes(features.get(name)))}
        rows = iter(dataset)
        while (row := self._explained(lambda: next(rows, None))) is not None:
            for name in columns:
                if name not in row:
                    key = column_keys(self._source).get(name, "text_column")
                    raise InputError(Problem(describe_missing_column(name, row, key), f"{self._key}.{key}", name))
            if self._columns is None:
                yield {"text": self._text(row[columns[0]])}
            else:
                yield {name: with_names[name](row[name]) if name in with_names else row[name] for name in columns}

    def _text(self, value: Any) -> str:
        if value is not None and not isinstance(value, str):
            text_column = self._source.text_column
            message = describe_no_text(text_column, f"a {type(value).__name__}")
            raise InputError(Problem(message, f"{self._key}.text_column", text_column))
        return value or ""

    def _explained(self, call: Callable[[], Any]) -> Any:
        """What the call gives. What the library raises comes out with the config's key and the reason in one line."""
        try:
            return call()
        except Exception as raised:
            cause = raised.__cause__ if type(raised).__name__ == "DatasetGenerationError" else None
            error = cause if isinstance(cause, Exception) else raised
            reason = (
                drop_queries(" ".join(str(error).split()))[:_MAX_REASON_CHARACTERS]
                or _REASONS.get(type(error))
                or type(error).__name__
            )
            names = {kind.__name__ for kind in type(error).__mro__}
            is_refused = not self._has_copied and _is_refusal(error, reason)
            if (names & _NETWORK_ERRORS or is_storage_failure(error)) and not is_refused:
                message = f"{drop_queries(self._source.path)}: {reason}; copying goes on when the run is resumed"
                raise InfrastructureError(message) from raised
            raise InputError(self._problem(reason)) from raised

    def _problem(self, reason: str) -> Problem:
        source = self._source
        if "BuilderConfig" in reason or "onfig name" in reason:
            return Problem(reason, f"{self._key}.name", source.name or "")
        if "split" in reason.lower():
            return Problem(reason, f"{self._key}.split", source.split)
        return Problem(reason, f"{self._key}.path", drop_queries(source.path))


def _names_of_classes(feature: Any) -> Callable[[Any], Any] | None:
    """What makes names of the numbers in a column of class labels, or of lists of them; None: it is another column.
    -1, which stands for no label, becomes None."""
    from datasets import ClassLabel, LargeList, List

    if isinstance(feature, ClassLabel):
        names = feature.names
        return lambda value: None if value is None or value < 0 else names[value]
    if isinstance(feature, List | LargeList) and (decode := _names_of_classes(feature.feature)):
        return lambda values: None if values is None else [decode(value) for value in values]
    return None


def _size(value: Any) -> int:
    """Bytes of text in a value, and a few for anything else."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    return sum(map(_size, value)) if isinstance(value, list) else _BYTES_PER_VALUE


def _is_refusal(error: Exception, reason: str) -> bool:
    """Whether it would be the same at the next attempt: a name that the machine is told not to look up, or that the Hub
    does not know or give."""
    if "OfflineModeIsEnabled" in type(error).__name__ + reason:
        return True
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 429)  # timeout, too many requests


_MAX_REASON_CHARACTERS = 500
_REASONS: dict[type[Exception], str] = {StopIteration: "there are no data files"}
_NETWORK_ERRORS = {"ConnectionError", "Timeout", "TimeoutError", "TransportError", "HfHubHTTPError"}
"""Names of classes in requests, httpx, huggingface_hub and the standard library."""
