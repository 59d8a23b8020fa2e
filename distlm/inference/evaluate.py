"""The metrics of a run's model on other data: `python -m distlm.inference.evaluate RUN_FOLDER DATA... [--out DIR]`.

Samples, batches, precision and scores are those of the evaluations in training, so on the same data the metrics are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlm.config.resolve import looks_at_documents
from distlm.config.schema import FilesSource, ParallelSource, TokenClassificationTask
from distlm.console import exit_code_of, say
from distlm.data.batches import evaluation_batches
from distlm.data.labelled import ROWS_AT_ONCE, columns_of, make_encoder
from distlm.data.labels import LabelInfo
from distlm.data.order import permute
from distlm.data.row_encoder import LabelledRow, RowCounts, RowEncoder
from distlm.data.row_source import LabelledSource
from distlm.data.rows import labelled_columns
from distlm.data.samples import IGNORED, SampleDataset, SampleWriter, sample_schema
from distlm.data.tagged import words_of
from distlm.errors import ExitCode, InputError, Problem
from distlm.inference.predict import interruptible, parse
from distlm.inference.predictor import EvaluatedModel, best_device
from distlm.inference.run_settings import RunSettings, labelled_source, named_as_arguments
from distlm.run_folder import RunFolder
from distlm.table_arguments import TableArguments, add_table_arguments
from distlm.tasks import Task, tags
from distlm.tasks.scores import Evaluation
from distlm.tasks.text_classification import TextClassification
from distlm.tasks.token_classification import TokenClassification
from distlm.worker.train import write_tables
from distlm.worker.trained_model import load_trained_model, tokenizer_of

_MAX_NAMES = 10


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation has found."""

    step: int
    num_rows: int
    evaluation: Evaluation
    unknown_labels: dict[str, int]
    """Labels that the training data has not, and how often they stand in this data; they count as wrong."""


class _Rows:
    """The rows of files, again and again."""

    def __init__(self, source: FilesSource | ParallelSource, has_documents: bool) -> None:
        self.columns = columns_of(source, "data", has_documents)
        self._source = LabelledSource("data", source, labelled_columns(source, has_documents), source)

    def rows(self) -> Iterator[LabelledRow]:
        """Raises InputError for what cannot be read as asked."""
        for number, row in enumerate(self._source.rows()):
            yield LabelledRow(row, self.columns, number)


def evaluate(
    run: RunFolder, wanted: str | None, paths: list[Path], batch_size: int | None, about: TableArguments
) -> Evaluated:
    """Raises InputError for data that cannot be read, and what `load_trained_model` raises."""
    settings = RunSettings.of(run, "evaluate")
    source = labelled_source(settings, paths, about)
    with named_as_arguments(), tempfile.TemporaryDirectory(prefix="distlm-evaluate-") as folder:
        rows = _Rows(source, looks_at_documents(settings.task))
        task_config = _with_known_labels(settings, rows)
        encoder = make_encoder(task_config, tokenizer_of(run), settings.max_seq_length)
        info = encoder.learn(lambda: iter(()))
        file = Path(folder) / "samples.arrow"
        num_rows = _write_samples(encoder, rows, file)
        task: Task = (
            TokenClassification(task_config, replace(settings.prepared, labels=list(info.names)))
            if isinstance(task_config, TokenClassificationTask)
            else TextClassification(task_config, replace(settings.prepared, labels=list(info.names)))
        )
        data = SampleDataset([file])
        model, _, step = load_trained_model(run, wanted)
        found = _scores(settings, task, data, model, batch_size or settings.batch_size)
        unknown = _unknown_labels(data, info, settings)
    return Evaluated(step, num_rows, found, unknown)


def _with_known_labels(settings: RunSettings, rows: _Rows) -> Any:
    """The config of the task as the model was trained, for data that may spell its tags in another way."""
    task = settings.task.model_copy(update={"labels": settings.labels or None})
    if not isinstance(task, TokenClassificationTask) or task.tag_scheme != "auto":
        return task
    scheme = tags.TagScheme.NONE
    if settings.prepared.tag_scheme != "none":
        scheme = tags.detect_scheme(words_of(row, row.label, "label") for row in rows.rows())
        if scheme is tags.TagScheme.NONE:
            strange = tags.not_tags({label for row in rows.rows() for label in words_of(row, row.label, "label")})
            message = (
                f"the model was trained on tags such as B-PER, I-PER and O, and the data has others: "
                f"{', '.join(map(repr, strange[:_MAX_NAMES]))}"
            )
            raise InputError(Problem(message, "label_column", rows.columns.label))
    return task.model_copy(update={"tag_scheme": str(scheme)})


def _write_samples(encoder: RowEncoder, rows: _Rows, path: Path) -> int:
    """Returns the number of rows."""
    count = 0
    with open(path, "wb") as file:
        writer = SampleWriter(file, sample_schema(encoder.has_token_types, encoder.label_type))
        remaining: Iterator[LabelledRow] = rows.rows()
        while some := list(itertools.islice(remaining, ROWS_AT_ONCE)):
            for samples in encoder.encode(some, RowCounts(), False):
                for sample in samples:
                    writer.add(sample.input_ids, sample.labels, sample.rows, sample.token_type_ids)
            count += len(some)
        writer.close()
    return count


def _scores(
    settings: RunSettings, task: Task, data: SampleDataset, trained: torch.nn.Module, batch_size: int
) -> Evaluation:
    device = best_device()
    model = EvaluatedModel(trained, settings.mixed_precision, device)
    loss_sum, num_targets = 0.0, 0.0
    judged = []
    everything = permute(np.arange(len(data)), len(data), 0, 0)  # as in training, where some may be left out
    for chosen in evaluation_batches(everything, data.lengths, batch_size, settings.max_batch_tokens, 1):
        samples = data[chosen.indices]
        batch = task.collate(samples, np.zeros_like(chosen.indices), chosen.indices, training=False)
        with torch.no_grad():
            loss, predicted = task.loss(model, batch, device)
        loss_sum += float(loss)
        num_targets += task.count_targets(batch)
        judged.append(task.judge(batch, chosen.indices, predicted))
    mean = loss_sum / num_targets if num_targets else float("nan")
    found = task.evaluation(judged, mean, num_targets, data)
    return Evaluation(({"loss": mean} if num_targets else {}) | found.metrics, found.tables)


def _unknown_labels(data: SampleDataset, info: LabelInfo, settings: RunSettings) -> dict[str, int]:
    counts = Counter[str]()
    if settings.labels and len(info.names) > info.num_known:
        is_multi = getattr(settings.task, "problem_type", "") == "multi_label_classification"
        for index in range(len(data)):
            labels = data[np.array([index])].labels[0]
            ids = np.flatnonzero(labels) if is_multi else labels[labels != IGNORED]
            counts.update(info.names[number] for number in ids[ids >= info.num_known].tolist())
    return dict(counts.most_common())


def report(evaluated: Evaluated, run: RunFolder, paths: list[Path]) -> str:
    """For people."""
    name = ", ".join(map(str, paths))
    lines = [f"step {evaluated.step} of run {run.run_id} on {evaluated.num_rows:,} rows of {name}", ""]
    width = max(map(len, evaluated.evaluation.metrics), default=0)
    lines += [f"{metric:<{width}}  {value:.6g}" for metric, value in evaluated.evaluation.metrics.items()]
    if unknown := evaluated.unknown_labels:
        shown = ", ".join(f"{label} ({count:,})" for label, count in itertools.islice(unknown.items(), _MAX_NAMES))
        more = f" and {len(unknown) - _MAX_NAMES} others" if len(unknown) > _MAX_NAMES else ""
        lines += ["", f"labels that training did not have, which count as wrong: {shown}{more}"]
    return "\n".join(lines)


def _evaluate(options: argparse.Namespace) -> int:
    run = RunFolder(options.run_folder.absolute())
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise InputError(Problem("is a file; name a folder", "--out", str(options.out)))
    found = evaluate(run, options.step, options.data, options.batch_size, TableArguments.of(options))
    if options.out is not None:
        write_tables(options.out, found.evaluation.tables)
    if options.json:
        say(
            json.dumps(
                {
                    "run_id": run.run_id,
                    "step": found.step,
                    "data": list(map(str, options.data)),
                    "num_rows": found.num_rows,
                    "metrics": found.evaluation.metrics,
                    "unknown_labels": found.unknown_labels,
                },
                indent=2,
            )
        )
    else:
        say(report(found, run, options.data))
        if options.out is not None and found.evaluation.tables:
            say(f"tables in {options.out}: {', '.join(sorted(found.evaluation.tables))}")
    return ExitCode.SUCCEEDED


def main(arguments: list[str] | None = None) -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("data", type=Path, nargs="+")
        parser.add_argument("--out", type=Path)
        parser.add_argument("--json", action="store_true")
        add_table_arguments(parser, with_labels=True)

    options = parse(arguments, "distlm evaluate", add)
    interruptible()
    return exit_code_of(lambda: _evaluate(options))


if __name__ == "__main__":
    sys.exit(main())
