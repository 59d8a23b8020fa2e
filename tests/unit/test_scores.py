"""Scores are those of scikit-learn, scipy and seqeval; tables hold what they should; the config knows all metrics."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import random
import time
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from seqeval import metrics as seqeval_metrics
from sklearn import metrics as sklearn_metrics

from distlm.config.metrics import METRICS
from distlm.tasks.scores import Evaluation, classification, multi_label, regression, tagging
from distlm.tasks.tags import TagScheme, to_iob2

REAL_DATA = Path(os.environ.get("DISTLM_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; set DISTLM_TEST_DATA"
)


def rows_of(evaluation: Evaluation, file: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(evaluation.tables[file])))


def score_table(evaluation: Evaluation, file: str = "per_label.csv") -> dict[str, list[float]]:
    """Label -> precision, recall, F1, support."""
    header, *rows = rows_of(evaluation, file)
    assert header == ["label", "precision", "recall", "f1-score", "support"]
    return {label: [float(value) for value in values] for label, *values in rows}


def report_table(report: dict[str, Any], *left_out: str) -> dict[str, list[float]]:
    """The same of scikit-learn's and seqeval's classification_report(output_dict=True)."""
    return {
        label: pytest.approx(list(row.values()), abs=6e-7) for label, row in report.items() if label not in left_out
    }


# --- one label a sample ----------------------------------------------------------------------------------------------


def expected_classification(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    def score(function: Any, average: str) -> float:
        return function(labels, predictions, average=average, zero_division=0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single label in all
        return {
            "accuracy": sklearn_metrics.accuracy_score(labels, predictions),
            "f1_macro": score(sklearn_metrics.f1_score, "macro"),
            "f1_weighted": score(sklearn_metrics.f1_score, "weighted"),
            "precision_macro": score(sklearn_metrics.precision_score, "macro"),
            "recall_macro": score(sklearn_metrics.recall_score, "macro"),
            "matthews_correlation": sklearn_metrics.matthews_corrcoef(labels, predictions),
        }


@pytest.mark.parametrize("num_labels", [1, 2, 3, 30, 150])
@pytest.mark.parametrize("num_samples", [1, 5, 400])
def test_classification_scores_are_those_of_scikit_learn(num_labels: int, num_samples: int) -> None:
    random_numbers = np.random.default_rng(num_labels * num_samples)
    names = [f"label {i:03}" for i in range(num_labels)]
    for _ in range(10):
        labels = random_numbers.integers(num_labels, size=num_samples)
        guesses = random_numbers.integers(num_labels, size=num_samples)
        predictions = np.where(random_numbers.random(num_samples) < 0.6, labels, guesses)
        evaluation = classification(labels, predictions, names, num_labels)
        expected = expected_classification(labels, predictions)
        expected["f1"] = expected["f1_macro"]
        if num_labels == 2:
            expected["f1"] = sklearn_metrics.f1_score(labels, predictions, labels=[0, 1], zero_division=0)
        assert evaluation.metrics == pytest.approx(expected, abs=1e-12)
        report = sklearn_metrics.classification_report(
            np.array(names)[labels], np.array(names)[predictions], output_dict=True, zero_division=0
        )
        assert score_table(evaluation) == report_table(report, "accuracy")


def test_the_confusion_matrix_of_few_labels() -> None:
    names = ["a, b", "c | d", "<e>\n", "never"]
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 1, 0])
    evaluation = classification(labels, predictions, names, 4)
    assert rows_of(evaluation, "confusion_matrix.csv") == [
        ["true \\ predicted", "a, b", "c | d", "<e>\n"],
        ["a, b", "1", "2", "0"],
        ["c | d", "0", "2", "0"],
        ["<e>\n", "1", "0", "0"],
    ]
    report = evaluation.tables["report.md"].splitlines()
    assert "| c \\| d | 0 | 2 | 0 |" in report
    assert report[-2:] == ["| a, b | c \\| d | 2 | 66.7% |", "| <e> | a, b | 1 | 100.0% |"]
    assert "| accuracy | 0.5000 |" in report


def test_the_picture_of_a_confusion_matrix_shows_its_counts() -> None:
    names = ["<one> & two", "x" * 50]
    evaluation = classification(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0]), names, 2)
    svg = "{http://www.w3.org/2000/svg}"
    picture = ET.fromstring(evaluation.tables["confusion_matrix.svg"])
    texts = [element.text for element in picture.iter(f"{svg}text")]
    assert texts.count("<one> & two") == 2
    assert [text for text in texts if text and text.isdigit()] == ["2", "1", "1"]
    assert [float(cell.get("fill-opacity", -1)) for cell in picture.iter(f"{svg}rect")][1:] == [0.667, 0.333, 1, 0]


def test_many_labels_have_a_list_of_cells_and_of_the_most_confused_pairs() -> None:
    names = [f"intent {i}" for i in range(120)]
    labels = np.repeat(np.arange(120), 3)
    predictions = labels.copy()
    predictions[:2] = 7  # two of three samples of label 0
    predictions[30 * 3 : 60 * 3 : 3] += 1  # one sample of each of 30 labels
    evaluation = classification(labels, predictions, names, 120)
    header, *cells = rows_of(evaluation, "confusion_matrix.csv")
    assert header == ["label", "prediction", "samples"]
    assert len(cells) == 120 + 1 + 30
    assert sum(int(count) for _, _, count in cells) == 360
    assert ["intent 0", "intent 7", "2"] in cells
    assert "confusion_matrix.svg" not in evaluation.tables
    pairs = evaluation.tables["report.md"].split("Most confused:")[1].splitlines()[4:]
    assert len(pairs) == 20
    assert pairs[0] == "| intent 0 | intent 7 | 2 | 66.7% |"


def test_labels_that_training_never_saw_count_as_wrong() -> None:
    names = ["no", "yes", "new", "newer"]
    evaluation = classification(np.array([0, 1, 1, 2, 2]), np.array([0, 1, 1, 0, 1]), names, 2)
    assert evaluation.metrics["accuracy"] == pytest.approx(3 / 5)
    assert evaluation.metrics["f1"] == pytest.approx(4 / 5), "two known labels: F1 of label 1"
    assert score_table(evaluation)["new"] == [0, 0, 0, 2]
    assert "newer" not in score_table(evaluation)
    assert "Never seen in training, so never right (samples): new (2)." in evaluation.tables["report.md"]


def test_a_second_label_that_does_not_occur_has_an_f1_of_0() -> None:
    evaluation = classification(np.zeros(3, int), np.zeros(3, int), ["no", "yes"], 2)
    assert evaluation.metrics == {
        "accuracy": 1, "f1": 0, "f1_macro": 1, "f1_weighted": 1, "precision_macro": 1, "recall_macro": 1,
        "matthews_correlation": 0,
    }  # fmt: skip
    assert "Nothing is confused." in evaluation.tables["report.md"]


def test_very_many_labels_need_no_square_of_memory() -> None:
    count = 20_000
    evaluation = classification(np.arange(count), np.arange(count)[::-1], [str(i) for i in range(count)], count)
    assert evaluation.metrics["accuracy"] == 0
    assert evaluation.metrics["matthews_correlation"] == pytest.approx(-1 / (count - 1))


# --- several labels a sample -----------------------------------------------------------------------------------------


def test_multi_label_scores_are_those_of_scikit_learn() -> None:
    random_numbers = np.random.default_rng(0)
    names = list("abcde")
    for share in (0.0, 0.1, 0.5, 1.0):
        labels = (random_numbers.random((50, 5)) < share).astype(np.int64)
        scores = 0.6 * labels + 0.5 * random_numbers.random((50, 5))
        scores[:, 3] = 0  # a label that is never predicted
        evaluation = multi_label(labels, scores, names, threshold=0.4)
        predictions = (scores >= 0.4).astype(np.int64)
        expected = {
            f"f1_{average}": sklearn_metrics.f1_score(labels, predictions, average=average, zero_division=0)
            for average in ("micro", "macro", "weighted")
        }
        expected["accuracy"] = sklearn_metrics.accuracy_score(labels, predictions)
        assert evaluation.metrics == pytest.approx(expected, abs=1e-12)
        report = sklearn_metrics.classification_report(
            labels, predictions, target_names=names, output_dict=True, zero_division=0
        )
        assert score_table(evaluation) == report_table(report, "samples avg")


def test_multi_label_takes_the_threshold_as_reached_and_unseen_labels_as_wrong() -> None:
    labels = np.array([[1, 0, 0], [1, 0, 1]])
    evaluation = multi_label(labels, np.array([[0.5, 0.49], [0.5, 0.1]]), ["a", "b", "new"])
    assert evaluation.metrics["accuracy"] == 0.5
    assert score_table(evaluation)["new"] == [0, 0, 0, 1]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_regression_scores_are_those_of_scipy_and_scikit_learn() -> None:
    random_numbers = np.random.default_rng(0)
    for size, decimals in itertools.product([2, 3, 500], [0, 1, 8]):
        labels = np.round(5 * random_numbers.random(size), decimals)
        labels[0] = 6  # never constant
        predictions = (labels + random_numbers.normal(size=size)).astype(np.float32)
        expected = {
            "mse": sklearn_metrics.mean_squared_error(labels, predictions),
            "mae": sklearn_metrics.mean_absolute_error(labels, predictions),
            "pearson": stats.pearsonr(labels, predictions.astype(float)).statistic,
            "spearman": stats.spearmanr(labels, predictions).statistic,
            "r2": sklearn_metrics.r2_score(labels, predictions),
        }
        assert regression(labels, predictions).metrics == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("labels", "predictions", "names"),
    [
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], {"mse", "mae", "r2"}),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], {"mse", "mae"}),
        ([1.0], [2.0], {"mse", "mae"}),
        ([1.0, 2.0], [math.nan, 2.0], set()),
        ([1.0, 2.0], [math.inf, 2.0], {"spearman"}),
        ([1.0, 2.0], [1e200, 2.0], {"mae", "pearson", "spearman"}),
    ],
)
def test_regression_leaves_out_what_has_no_value(
    labels: list[float], predictions: list[float], names: set[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(regression(np.array(labels), np.array(predictions)).metrics) == names


# --- a label for each token ------------------------------------------------------------------------------------------


def expected_tokens(labels: list[list[str]], predictions: list[list[str]]) -> dict[str, Any]:
    flat = [[tag for tags in side for tag in tags] for side in (labels, predictions)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single label in all
        return sklearn_metrics.classification_report(*flat, output_dict=True, zero_division=0)


def assert_same_as_references(labels: list[list[str]], predictions: list[list[str]]) -> None:
    evaluation = tagging(labels, predictions, TagScheme.IOB2)
    tokens = expected_tokens(labels, predictions)
    expected = {
        "precision": seqeval_metrics.precision_score(labels, predictions, zero_division=0),
        "recall": seqeval_metrics.recall_score(labels, predictions, zero_division=0),
        "f1": seqeval_metrics.f1_score(labels, predictions, zero_division=0),
        "accuracy": seqeval_metrics.accuracy_score(labels, predictions),
        "token_f1_macro": tokens["macro avg"]["f1-score"],
        "token_f1_weighted": tokens["weighted avg"]["f1-score"],
    }
    assert evaluation.metrics == pytest.approx(expected, abs=1e-12)
    assert score_table(evaluation) == report_table(tokens, "accuracy")
    if any(tag != "O" for tags in [*labels, *predictions] for tag in tags):  # else seqeval's report raises
        report = seqeval_metrics.classification_report(labels, predictions, output_dict=True, zero_division=0)
        assert score_table(evaluation, "per_entity_type.csv") == report_table(report)


def test_any_predictions_have_the_scores_of_seqeval_and_scikit_learn() -> None:
    random.seed(0)
    tags = ["O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-MISC"]
    for _ in range(100):
        lengths = [random.randrange(8) for _ in range(random.randrange(1, 6))] + [1]
        labels = [to_iob2(random.choices(tags[:-1], k=length), TagScheme.IOB2) for length in lengths]
        predictions = [[random.choice([tag, random.choice(tags)]) for tag in sentence] for sentence in labels]
        assert_same_as_references(labels, predictions)


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        ([["O", "O"], []], [["O", "O"], []]),  # no entity on either side
        ([["O", "B-X"]], [["O", "O"]]),
        ([["O", "O"]], [["I-X", "O"]]),
        ([["B-X"]], [["B-X"]]),
        ([["B-X", "I-X"]], [["I-X", "I-X"]]),
        ([["B-X", "B-X"]], [["B-X", "I-X"]]),
        ([["B-X"], ["B-X"]], [["B-X"], ["I-X"]]),  # an entity does not go on over the end of a sentence
    ],
)
def test_tagging_at_the_edges(labels: list[list[str]], predictions: list[list[str]]) -> None:
    assert_same_as_references(labels, predictions)


def test_labels_without_a_scheme_have_token_scores_only() -> None:
    labels, predictions = [["NN", "VB"], ["NN"], []], [["NN", "NN"], ["B-X"], []]
    evaluation = tagging(labels, predictions, TagScheme.NONE)
    tokens = expected_tokens(labels, predictions)
    assert score_table(evaluation) == report_table(tokens, "accuracy")
    assert "per_entity_type.csv" not in evaluation.tables
    macro = tokens["macro avg"]
    assert evaluation.metrics == pytest.approx(
        {
            "precision": macro["precision"],
            "recall": macro["recall"],
            "f1": macro["f1-score"],
            "accuracy": tokens["accuracy"],
            "token_f1_macro": macro["f1-score"],
            "token_f1_weighted": tokens["weighted avg"]["f1-score"],
        }
    )


@pytest.mark.parametrize("predictions", [[["O", "O"]], [["O", "O"], ["O", "O"]], [["O", "O", "O"], []]])
def test_tagging_wants_a_prediction_for_each_label(predictions: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="one prediction for each"):
        tagging([["O", "O"], ["B-X"]], predictions, TagScheme.IOB2)


@needs_real_data
def test_a_real_test_set_is_scored_as_by_the_references_and_fast() -> None:
    blocks = (REAL_DATA / "conll2003" / "test.conll").read_text(encoding="utf-8").split("\n\n")
    sentences = [[line.split()[3] for line in block.splitlines()] for block in blocks if block.strip()]
    labels = [to_iob2(tags, TagScheme.IOB1) for tags in sentences]
    random.seed(0)
    known = sorted({tag for tags in labels for tag in tags})
    predictions = [[random.choice(known) if random.random() < 0.1 else tag for tag in tags] for tags in labels]
    start_s = time.process_time()
    evaluation = tagging(labels, predictions, TagScheme.IOB2)
    assert time.process_time() - start_s < 1.5
    table = score_table(evaluation, "per_entity_type.csv")
    assert [table[type_][3] for type_ in ("LOC", "MISC", "ORG", "PER")] == [1668, 702, 1661, 1617]
    assert_same_as_references(labels, predictions)


# --- all kinds -------------------------------------------------------------------------------------------------------

ONE_OF_EACH = {
    "single_label_classification": classification(np.array([0, 1]), np.array([0, 0]), ["a", "b"], 2),
    "multi_label_classification": multi_label(np.eye(2, dtype=int), np.eye(2), ["a", "b"]),
    "regression": regression(np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "token-classification": tagging([["O", "B-X"]], [["O", "O"]], TagScheme.IOB2),
}


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_the_config_knows_every_metric_of_each_kind(kind: str) -> None:
    assert METRICS[kind].keys() == ONE_OF_EACH[kind].metrics.keys() | {"loss"}
    assert [name for name, is_greater in METRICS[kind].items() if not is_greater] == (
        ["loss", "mse", "mae"] if kind == "regression" else ["loss"]
    )


def test_nothing_to_evaluate_gives_nothing() -> None:
    none = np.zeros(0, int)
    assert classification(none, none, ["a", "b"], 2) == Evaluation({}, {})
    assert multi_label(np.zeros((0, 2), int), np.zeros((0, 2)), ["a", "b"]) == Evaluation({}, {})
    assert regression(none, none) == Evaluation({}, {})
    assert tagging([[], []], [[], []], TagScheme.IOB2) == Evaluation({}, {})
