"""How good predictions are: the metrics and tables of an evaluation, from labels and predictions alone.

Definitions are those of the field's references, scikit-learn and seqeval, so that scores compare with published ones.
A ratio without a denominator, such as the precision of a label that is never predicted, is 0 (`zero_division=0`
there). All metrics are finite. Shapes: n samples or tokens, L labels. Metrics by name: distlm/config/metrics.py.

Precision, recall and F1 come from three counts of each label and nothing else. Taking them here costs milliseconds,
where importing scikit-learn alone costs seconds and memory in the process that trains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distlm.tasks.score_tables import (
    ConfusionCell,
    ScoreRow,
    confusion_csv,
    confusion_report,
    confusion_svg,
    metrics_report,
    scores_csv,
    scores_report,
)
from distlm.tasks.tags import TagScheme, entities

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]

PER_LABEL_FILE = "per_label.csv"
PER_ENTITY_TYPE_FILE = "per_entity_type.csv"
CONFUSION_FILE = "confusion_matrix.csv"
CONFUSION_PICTURE_FILE = "confusion_matrix.svg"
REPORT_FILE = "report.md"


@dataclass(frozen=True)
class Evaluation:
    """`metrics` by name, without `eval/`; `tables` by file name: CSV for tools, and a report and a picture to look at.

    Without samples there are none of either.
    """

    metrics: dict[str, float]
    tables: dict[str, str]


def classification(labels: Ints, predictions: Ints, names: Sequence[str], num_known: int) -> Evaluation:
    """One of L labels for each sample: `labels` [n] and `predictions` [n] are ids, indices of `names` [L].

    f1 is that of label 1 where training knows two labels, as in GLUE, else f1_macro. Averages go over the labels that
    occur on either side. Labels with ids from `num_known` on were never seen in training: no model predicts them, so
    they count as wrong, and the tables hold them.
    """
    if not len(labels):
        return Evaluation({}, {})
    scores = _Scores.of_ids(labels, predictions, names)
    occurring = scores.occurring()
    accuracy = float(np.mean(labels == predictions))
    metrics = {
        "accuracy": accuracy,
        "f1": float(scores.f1[1]) if num_known == 2 else occurring.macro.f1,
        "f1_macro": occurring.macro.f1,
        "f1_weighted": occurring.weighted.f1,
        "precision_macro": occurring.macro.precision,
        "recall_macro": occurring.macro.recall,
        "matthews_correlation": scores.matthews_correlation(),
    }
    metrics = _finite(metrics)
    rows = [*occurring.rows(), occurring.macro, occurring.weighted]
    cells = _confusion(labels, predictions, names)
    unseen = [f"{names[i]} ({scores.support[i]})" for i in range(num_known, len(names)) if scores.support[i]]
    note = f"Never seen in training, so never right (samples): {', '.join(unseen)}." if unseen else ""
    tables = {
        PER_LABEL_FILE: scores_csv(rows),
        CONFUSION_FILE: confusion_csv(occurring.names, cells),
        REPORT_FILE: _report(
            metrics_report(metrics, f"{len(labels):,} samples"),
            scores_report("Labels", rows, note),
            confusion_report(occurring.names, cells),
        ),
    }
    if picture := confusion_svg(occurring.names, cells):
        tables[CONFUSION_PICTURE_FILE] = picture
    return Evaluation(metrics, tables)


def multi_label(labels: Ints, scores: Floats, names: Sequence[str], threshold: float = 0.5) -> Evaluation:
    """Any number of L labels for each sample: `labels` [n, L] are 0 or 1, `scores` [n, K] probabilities, K <= L.

    A label is predicted where its score is at least `threshold`; labels from K on were never seen in training and are
    not predicted. accuracy is the share of samples with all labels right. Averages go over all L labels.
    """
    if not len(labels):
        return Evaluation({}, {})
    actual = np.asarray(labels) != 0
    predicted = np.zeros_like(actual)
    predicted[:, : scores.shape[1]] = scores >= threshold
    per_label = _Scores.from_counts(names, actual.sum(0), predicted.sum(0), (actual & predicted).sum(0))
    metrics = _finite(
        {
            "accuracy": float((actual == predicted).all(axis=1).mean()),
            "f1_micro": per_label.micro.f1,
            "f1_macro": per_label.macro.f1,
            "f1_weighted": per_label.weighted.f1,
        }
    )
    rows = [*per_label.rows(), per_label.micro, per_label.macro, per_label.weighted]
    report = _report(metrics_report(metrics, f"{len(labels):,} samples"), scores_report("Labels", rows))
    return Evaluation(metrics, {PER_LABEL_FILE: scores_csv(rows), REPORT_FILE: report})


def regression(labels: Floats, predictions: Floats) -> Evaluation:
    """A number for each sample, `labels` [n] and `predictions` [n].

    What has no value is left out: pearson and spearman where either side is constant, r2 where the labels are, and
    everything that an infinite prediction or NaN spoils.
    """
    if not len(labels):
        return Evaluation({}, {})
    actual, predicted = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    with np.errstate(all="ignore"):
        errors = predicted - actual
        metrics = {"mse": float(np.mean(errors**2)), "mae": float(np.mean(np.abs(errors)))}
        if np.ptp(actual) > 0:
            metrics["r2"] = float(1 - metrics["mse"] / np.var(actual))
            if np.ptp(predicted) > 0:
                metrics["pearson"] = _correlation(actual, predicted)
                metrics["spearman"] = _correlation(_ranks(actual), _ranks(predicted))
    return Evaluation(_finite(metrics), {})


def tagging(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], scheme: TagScheme) -> Evaluation:
    """A label for each token of each sentence, both sides in IOB2, or any labels for the scheme `none`.

    precision, recall and f1 count entities, all types together: right is what has the same type, first and last token
    (seqeval's default). For `none`, where there are no entities, they are the macro averages over the tokens' labels.
    accuracy and token_... count tokens, O included. Averages go over the labels that occur on either side. Raises
    ValueError where a sentence has not as many predictions as labels, or a label is no tag.
    """
    actual = [label for sentence in labels for label in sentence]
    predicted = [label for sentence in predictions for label in sentence]
    if list(map(len, labels)) != list(map(len, predictions)):
        raise ValueError("each sentence needs one prediction for each of its labels")
    if not actual:
        return Evaluation({}, {})
    names = sorted({*actual, *predicted})
    ids = {name: i for i, name in enumerate(names)}
    actual_ids, predicted_ids = (np.array([ids[label] for label in side]) for side in (actual, predicted))
    tokens = _Scores.of_ids(actual_ids, predicted_ids, names)
    token_rows = [*tokens.rows(), tokens.macro, tokens.weighted]
    summary = tokens.macro
    tables = {}
    entity_section = ""
    if scheme is not TagScheme.NONE:
        types = _entity_scores(labels, predictions)
        summary = types.micro
        entity_rows = [*types.rows(), types.micro, types.macro, types.weighted]
        tables[PER_ENTITY_TYPE_FILE] = scores_csv(entity_rows)
        entity_section = scores_report("Entities", entity_rows)
    metrics = _finite(
        {
            "precision": summary.precision,
            "recall": summary.recall,
            "f1": summary.f1,
            "accuracy": float(np.mean(actual_ids == predicted_ids)),
            "token_f1_macro": tokens.macro.f1,
            "token_f1_weighted": tokens.weighted.f1,
        }
    )
    tables[PER_LABEL_FILE] = scores_csv(token_rows)
    tables[REPORT_FILE] = _report(
        metrics_report(metrics, f"{len(labels):,} sentences, {len(actual):,} tokens"),
        entity_section,
        scores_report("Tokens", token_rows),
    )
    return Evaluation(metrics, tables)


@dataclass(frozen=True)
class _Scores:
    """Precision, recall, F1 and the three counts that they come from, of each label; all [L]."""

    names: list[str]
    support: NDArray[np.int64]
    num_predicted: NDArray[np.int64]
    num_correct: NDArray[np.int64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]

    @classmethod
    def from_counts(cls, names: Sequence[str], support: Ints, num_predicted: Ints, num_correct: Ints) -> Self:
        support, num_predicted, num_correct = (
            np.asarray(counts, np.int64) for counts in (support, num_predicted, num_correct)
        )
        return cls(
            list(names),
            support,
            num_predicted,
            num_correct,
            precision=_ratio(num_correct, num_predicted),
            recall=_ratio(num_correct, support),
            f1=_ratio(2 * num_correct, support + num_predicted),
        )

    @classmethod
    def of_ids(cls, labels: Ints, predictions: Ints, names: Sequence[str]) -> Self:
        right = labels[labels == predictions]
        return cls.from_counts(names, *(np.bincount(ids, minlength=len(names)) for ids in (labels, predictions, right)))

    def occurring(self) -> Self:
        """Without the labels that stand neither among the labels nor among the predictions."""
        kept = np.flatnonzero(self.support + self.num_predicted)
        names = [self.names[i] for i in kept]
        return self.from_counts(names, self.support[kept], self.num_predicted[kept], self.num_correct[kept])

    def rows(self) -> list[ScoreRow]:
        columns = (self.precision, self.recall, self.f1, self.support)
        return [ScoreRow(*row) for row in zip(self.names, *(column.tolist() for column in columns), strict=True)]

    @property
    def micro(self) -> ScoreRow:
        sums = [np.atleast_1d(counts.sum()) for counts in (self.support, self.num_predicted, self.num_correct)]
        return self.from_counts(["micro avg"], *sums).rows()[0]

    @property
    def macro(self) -> ScoreRow:
        return self._average("macro avg", np.ones(len(self.names)))

    @property
    def weighted(self) -> ScoreRow:
        return self._average("weighted avg", self.support)

    def _average(self, name: str, weights: NDArray[Any]) -> ScoreRow:
        total = weights.sum()
        precision, recall, f1 = (
            float(values @ weights / total) if total else 0.0 for values in (self.precision, self.recall, self.f1)
        )
        return ScoreRow(name, precision, recall, f1, int(self.support.sum()))

    def matthews_correlation(self) -> float:
        """Of all labels together (Gorodkin 2004); 0 where one side is constant."""
        support, num_predicted = self.support.astype(float), self.num_predicted.astype(float)
        n = support.sum()
        covariance = self.num_correct.sum() * n - support @ num_predicted
        variances = (n**2 - support @ support) * (n**2 - num_predicted @ num_predicted)
        return float(covariance / math.sqrt(variances)) if variances > 0 else 0.0


def _entity_scores(labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> _Scores:
    """Scores of each type of entities, sorted by name."""
    support, num_predicted, num_correct = Counter[str](), Counter[str](), Counter[str]()
    for sentence, predicted_sentence in zip(labels, predictions, strict=True):
        actual, predicted = set(entities(sentence)), set(entities(predicted_sentence))
        for counts, found in ((support, actual), (num_predicted, predicted), (num_correct, actual & predicted)):
            counts.update(type_ for type_, _, _ in found)
    types = sorted(support | num_predicted)

    def in_order(counts: Mapping[str, int]) -> NDArray[np.int64]:
        return np.array([counts[type_] for type_ in types], np.int64)

    return _Scores.from_counts(types, in_order(support), in_order(num_predicted), in_order(num_correct))


def _confusion(labels: Ints, predictions: Ints, names: Sequence[str]) -> list[ConfusionCell]:
    """The cells of the confusion matrix that are not 0; the matrix of many labels is nearly empty."""
    cells, counts = np.unique(labels.astype(np.int64) * len(names) + predictions, return_counts=True)
    pairs = zip(*(part.tolist() for part in (*np.divmod(cells, len(names)), counts)), strict=True)
    return [ConfusionCell(names[label], names[prediction], count) for label, prediction, count in pairs]


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator != 0)


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Pearson's; neither side may be constant."""
    left, right = left - left.mean(), right - right.mean()
    return float(np.clip(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)), -1, 1))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_ranks = np.cumsum(counts)
    return np.asarray((last_ranks - (counts - 1) / 2)[inverse])


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _report(*sections: str) -> str:
    return "\n".join(section for section in sections if section)
