"""The metrics of an evaluation by kind of task, and in which direction each one gets better.

`training.metric_for_best_model` is one of these names; metrics.jsonl and MLflow have them with `eval/` before. Those of
classification, regression and tagging are explained where they are computed: distlm/tasks/scores.py. Belongs to the
control plane.
"""

from __future__ import annotations

_GREATER, _SMALLER = True, False

METRICS: dict[str, dict[str, bool]] = {
    "masked-lm": {"loss": _SMALLER, "perplexity": _SMALLER, "accuracy": _GREATER},
    "single_label_classification": {
        "loss": _SMALLER,
        "accuracy": _GREATER,
        "f1": _GREATER,
        "f1_macro": _GREATER,
        "f1_weighted": _GREATER,
        "precision_macro": _GREATER,
        "recall_macro": _GREATER,
        "matthews_correlation": _GREATER,
    },
    "multi_label_classification": {
        "loss": _SMALLER,
        "accuracy": _GREATER,
        "f1_micro": _GREATER,
        "f1_macro": _GREATER,
        "f1_weighted": _GREATER,
    },
    "regression": {
        "loss": _SMALLER,
        "mse": _SMALLER,
        "mae": _SMALLER,
        "pearson": _GREATER,
        "spearman": _GREATER,
        "r2": _GREATER,
    },
    "token-classification": {
        "loss": _SMALLER,
        "accuracy": _GREATER,
        "f1": _GREATER,
        "precision": _GREATER,
        "recall": _GREATER,
        "token_f1_macro": _GREATER,
        "token_f1_weighted": _GREATER,
    },
}
"""Kind of task -> name -> whether greater is better. Text classification has a kind for each problem type."""
