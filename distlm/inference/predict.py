"""Predictions for every row of a file: `python -m distlm.inference.predict RUN_FOLDER INPUT --out FILE ...`.

The input is read twice: once to check all rows and to write down what predictions are made from, in parts of
`ROWS_PER_PART` rows beside FILE, and once to write its columns beside the predictions when all parts have theirs. One
worker predicts in this process; several are actors of Ray Data, on a Ray of their own that ends with this process, or
on the cluster that RAY_ADDRESS names.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from transformers.utils.logging import disable_progress_bar

from distlm.config.resolve import looks_at_documents
from distlm.config.schema import ResourcesConfig
from distlm.console import exit_code_of, say
from distlm.data.labelled import columns_of
from distlm.data.readers import Piece
from distlm.data.row_encoder import LabelledRow
from distlm.data.rows import document_column, text_columns
from distlm.data.sources import UndecodableCount, files_of
from distlm.data.tables import DOCSTART
from distlm.data.tagged import words_of
from distlm.data.texts import text_of
from distlm.errors import DistlmError, ExitCode, InfrastructureError, InputError, Problem
from distlm.inference.output import Columns, check_output, check_row, column_for, write_predictions
from distlm.inference.parts import FORMAT_VERSION, ROWS_PER_PART, Parts, sha256_of
from distlm.inference.predictor import Example, Predictor
from distlm.inference.run_settings import RunSettings, files_source, named_as_arguments
from distlm.inference.whole_rows import WholeRows
from distlm.run_folder import RunFolder
from distlm.table_arguments import TableArguments, add_table_arguments
from distlm.worker.export import choose_checkpoint

_PROGRESS_INTERVAL_S = 10.0


def predict(options: argparse.Namespace) -> int:
    run, output = RunFolder(options.run_folder.absolute()), options.out.absolute()
    settings = RunSettings.of(run, "predict")
    has_words = settings.task.type == "token-classification"
    check_output(output, has_words)
    checkpoint, manifest = choose_checkpoint(run, options.step)
    source = files_source(settings, [options.input], TableArguments.of(options))
    with named_as_arguments():
        (path,) = _one_file(files_of(source, rows=True))
        document = document_column(source) if looks_at_documents(settings.task) else None
        required = list(dict.fromkeys([*text_columns(source), *([document] if document else [])]))
        rows = WholeRows(source.model_copy(update={"paths": [str(path)]}), required)
    parts = Parts.beside(output)
    about: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "rows_per_part": ROWS_PER_PART,
        "run_id": run.run_id,
        "checkpoint": [manifest.step, sha256_of(checkpoint.path / "manifest.json")],
        "input_sha256": sha256_of(path),
        "source": source.model_dump(exclude={"paths"}),
        "suffix": output.suffix,
        "batch_size": options.batch_size or settings.batch_size,
    }
    if output.exists() and not parts.folder.exists():
        raise InputError(Problem("exists; remove it, or name another file", "--out", str(options.out)))
    with parts.locked():
        known = parts.about()
        if known is None or any(known.get(key) != value for key, value in about.items()):
            if known is not None:
                say(f"distlm: {parts.folder} is of something else; beginning anew", file=sys.stderr)
            with named_as_arguments():
                known = about | _begin(parts, rows, output, settings)
            parts.write_about(known)
        columns = _columns(known["columns"], source.text_column, settings)
        missing = parts.missing()
        if missing:
            in_all = -(-known["num_rows"] // ROWS_PER_PART)
            if len(missing) < in_all:
                say(f"distlm: going on: {in_all - len(missing)} of {in_all} parts are there", file=sys.stderr)
            progress = _Progress(known["num_rows"], in_all - len(missing))
            if options.workers > 1:
                _predict_on_ray(run, manifest.step, parts, missing, options.batch_size, options.workers, progress)
            else:
                _predict_here(run, manifest.step, parts, missing, options.batch_size, progress)
        schema = _schema(path) if rows.format == "parquet" and output.suffix == ".parquet" else None
        both = zip((row.values for row in rows), parts.predictions(), strict=True)
        write_predictions(output, columns, both, schema)
        parts.remove()
    say(f"{known['num_rows']:,} predictions of step {manifest.step} of run {run.run_id} in {options.out}")
    return ExitCode.SUCCEEDED


def _one_file(files: list[Path]) -> list[Path]:
    if len(files) != 1:
        raise InputError(f"INPUT is one file, and this names {len(files)}; predict one after the other")
    return files


def _columns(of_input: list[str], text_column: str, settings: RunSettings) -> Columns:
    task = settings.task
    separator: str | None = " "
    if task.type == "token-classification":
        predicted = ["labels"]
    else:
        kind = task.problem_type
        predicted = {"regression": ["prediction"], "multi_label_classification": ["labels", "scores"]}.get(
            kind, ["label", "score"]
        )
        separator = task.label_separator
    return Columns(of_input, {what: column_for(what, of_input) for what in predicted}, text_column, separator)


def _begin(parts: Parts, rows: WholeRows, output: Path, settings: RunSettings) -> dict[str, Any]:
    """Check all rows and write the examples; how many rows there are, and their columns."""
    source = rows.source
    names: dict[str, None] = dict.fromkeys(rows.columns or [])
    undecodable = UndecodableCount()
    has_documents = looks_at_documents(settings.task)
    where = columns_of(source, "data", has_documents)
    has_words = settings.task.type == "token-classification"

    def examples() -> Iterator[Example]:
        for number, row in enumerate(rows):
            undecodable.add(Piece("", True, row.undecodable_at))
            if rows.columns is None:
                names.update(dict.fromkeys(name for name in row.values if name != DOCSTART))
            labelled = LabelledRow(row, where, number)
            if has_words:
                document = str(labelled.document) if has_documents else None
                example = Example(words_of(labelled, labelled.text, "text"), document=document)
            else:
                pair = None if where.pair is None else text_of(labelled, labelled.pair, "text_pair")
                example = Example(text_of(labelled, labelled.text, "text"), pair)
            check_row(row, output, _columns([], source.text_column, settings))
            yield example

    num_rows = parts.begin(examples())
    if problems := undecodable.problems(source.encoding):
        raise InputError(*problems)
    return {"num_rows": num_rows, "columns": list(names)}


def _schema(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(path)


class _Progress:
    """Says now and then how far it is."""

    def __init__(self, num_rows: int, num_parts_done: int) -> None:
        self._num_rows, self._num_done = num_rows, num_parts_done
        self._began_with, self._begun_s = num_parts_done, time.monotonic()
        self._said_s = self._begun_s
        self.stream: TextIO = sys.stderr

    def part_is_done(self) -> None:
        self._num_done += 1
        now_s = time.monotonic()
        if now_s - self._said_s < _PROGRESS_INTERVAL_S:
            return
        self._said_s = now_s
        done = min(self._num_done * ROWS_PER_PART, self._num_rows)
        speed = (self._num_done - self._began_with) * ROWS_PER_PART / (now_s - self._begun_s)
        say(f"distlm: {done:,} of {self._num_rows:,} rows, {speed:.3g} rows/s", file=self.stream)


def _predict_here(
    run: RunFolder, step: int, parts: Parts, missing: list[int], batch_size: int | None, progress: _Progress
) -> None:
    predictor = Predictor(run, step, batch_size)
    for number in missing:
        parts.write(number, predictor.predict(parts.examples(number)))
        progress.part_is_done()


class _PartWorker:
    """An actor of Ray Data: predicts the parts whose numbers it is given, and gives the numbers back."""

    def __init__(self, run: Path, step: int, parts: Path, batch_size: int | None, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._parts, self._predictor = Parts(parts), Predictor(RunFolder(run), step, batch_size)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["part"].tolist():
            self._parts.write(number, self._predictor.predict(self._parts.examples(number)))
        return batch


def _predict_on_ray(
    run: RunFolder,
    step: int,
    parts: Parts,
    missing: list[int],
    batch_size: int | None,
    num_workers: int,
    progress: _Progress,
) -> None:
    from distlm.controller.cluster import connect
    from distlm.processes import no_descendants_left
    from distlm.temporary import temporary_root

    resources = ResourcesConfig(num_workers=num_workers)
    with ExitStack() as scope:
        progress.stream = scope.enter_context(_output_to(parts.log))
        scope.enter_context(no_descendants_left())
        root = scope.enter_context(nullcontext(None) if os.environ.get("RAY_ADDRESS") else temporary_root())
        cluster = scope.enter_context(connect(resources, [num_workers], run.path, root))
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        # Ray 2.60 has no other way to say how often a worker is restarted.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        numbers = ray.data.from_items([{"part": number} for number in missing], override_num_blocks=len(missing))
        done = numbers.map_batches(
            _PartWorker,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(num_workers, len(missing)), max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(run.path, step, parts.folder, batch_size, cluster.cpus_per_worker),
            num_cpus=cluster.cpus_per_worker,
            num_gpus=1 if cluster.device == "cuda" else 0,
            # What is killed for want of memory would be begun anew for ever; another call goes on with the parts.
            max_restarts=0,
            max_task_retries=0,
        )
        try:
            for _ in done.iter_rows():
                progress.part_is_done()
        except Exception as error:
            raise _explained(error, parts.log) from error


@contextmanager
def _output_to(log: Path) -> Iterator[TextIO]:
    """Send what Ray prints, tracebacks of all its layers among it, to a file; what comes is the real stderr."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(log, "w", encoding="utf-8") as file, os.fdopen(os.dup(2), "w", errors="backslashreplace") as stderr:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield stderr
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _explained(error: BaseException, log: Path) -> DistlmError:
    """Ours, which Ray has wrapped, or what Ray says in one line."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DistlmError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0].rstrip('.') if lines else ''}"
    return InfrastructureError(f"a worker failed: {reason}; the same command goes on where it was; log: {log}")


def parse(arguments: list[str] | None, prog: str, add: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--batch-size", type=int)
    add(parser)
    return parser.parse_args(arguments)


def interruptible() -> None:
    """SIGTERM and a closed terminal do as Ctrl-C: what was begun is cleaned up or can be continued."""
    logging.basicConfig(format="distlm: warning: %(message)s", level=logging.WARNING)
    disable_progress_bar()  # transformers' own, of the weights
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def main(arguments: list[str] | None = None) -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("input", type=Path)
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--workers", type=int, default=1)
        add_table_arguments(parser, with_labels=False)

    options = parse(arguments, "distlm predict", add)
    interruptible()
    return exit_code_of(lambda: predict(options))


if __name__ == "__main__":
    sys.exit(main())
