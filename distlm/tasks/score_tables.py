"""Tables of an evaluation as text: CSV for tools, Markdown to read, and a picture of the confusion matrix (SVG).

A label may be any text, with commas, bars and line ends in it.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MAX_MATRIX_LABELS = 100
"""With more labels the matrix is written as a list of its cells."""
MAX_READABLE_LABELS = 20
"""With more labels the report has the most confused pairs only."""
MAX_DRAWN_LABELS = 40
NUM_CONFUSED_PAIRS = 20

_CELL_PX, _MARGIN_PX, _LETTER_PX = 30, 8, 7


class ScoreRow(NamedTuple):
    """The scores of a label, or the average over labels; `support` is how often it occurs among the true labels."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class ConfusionCell(NamedTuple):
    """How many samples of a label were predicted as another one, or as itself."""

    label: str
    prediction: str
    num_samples: int


def scores_csv(rows: Iterable[ScoreRow]) -> str:
    """One line a label or average, as scikit-learn's classification_report names the columns."""
    header = ("label", "precision", "recall", "f1-score", "support")
    return _csv([header, *((label, *(f"{value:.6f}" for value in scores), n) for label, *scores, n in rows)])


def confusion_csv(names: Sequence[str], cells: Sequence[ConfusionCell]) -> str:
    """One line a true label, one column a predicted one. With more than MAX_MATRIX_LABELS labels: one line a cell that
    is not 0, with the columns label, prediction, samples."""
    if len(names) > MAX_MATRIX_LABELS:
        return _csv([("label", "prediction", "samples"), *cells])
    return _csv([("true \\ predicted", *names), *_matrix(names, cells)])


def metrics_report(metrics: Mapping[str, float], size: str) -> str:
    """The head of a report; `size` says what was evaluated."""
    return f"# Evaluation\n\n{size}\n\n" + _markdown(
        ["metric", "value"], [(name, f"{value:.4f}") for name, value in metrics.items()]
    )


def scores_report(title: str, rows: Iterable[ScoreRow], note: str = "") -> str:
    table = _markdown(
        ["label", "precision", "recall", "f1-score", "support"],
        [(label, *(f"{value:.4f}" for value in scores), f"{support:,}") for label, *scores, support in rows],
    )
    return f"## {title}\n\n{table}" + (f"\n{note}\n" if note else "")


def confusion_report(names: Sequence[str], cells: Sequence[ConfusionCell]) -> str:
    """The matrix where it can be read, and the pairs of labels that are confused most."""
    text = "## Confusion\n\nRows: true labels, columns: predictions.\n"
    if len(names) <= MAX_READABLE_LABELS:
        text += "\n" + _markdown(["", *names], _matrix(names, cells))
    support: dict[str, int] = {}
    for label, _, count in cells:
        support[label] = support.get(label, 0) + count
    confused = sorted((cell for cell in cells if cell.label != cell.prediction), key=lambda cell: -cell.num_samples)
    pairs = [
        (label, prediction, f"{count:,}", f"{count / support[label]:.1%}")
        for label, prediction, count in confused[:NUM_CONFUSED_PAIRS]
    ]
    if not pairs:
        return f"{text}\nNothing is confused.\n"
    header = ["label", "predicted as", "samples", "share of the label"]
    return f"{text}\nMost confused:\n\n{_markdown(header, pairs)}"


def confusion_svg(names: Sequence[str], cells: Sequence[ConfusionCell]) -> str | None:
    """The matrix as a picture: the darker a cell, the greater its share of the row. None with too many labels."""
    if len(names) > MAX_DRAWN_LABELS:
        return None
    shown = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    corner = "true \\ predicted"
    start = 2 * _MARGIN_PX + _LETTER_PX * max(map(len, [*shown, corner]))
    size = start + _CELL_PX * len(names) + _MARGIN_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" font-family="sans-serif"'
        ' font-size="11" text-anchor="middle">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<text x="{start / 2}" y="{start / 2}">{corner}</text>',
    ]
    for i, name in enumerate(shown):
        middle = start + (i + 0.5) * _CELL_PX + 4  # 4: half the height of a letter
        text = html.escape(name)
        parts.append(f'<text x="{start - _MARGIN_PX}" y="{middle}" text-anchor="end">{text}</text>')
        turn = f"translate({middle} {start - _MARGIN_PX}) rotate(-90)"
        parts.append(f'<text transform="{turn}" text-anchor="start">{text}</text>')
    for i, (_, *counts) in enumerate(_matrix(names, cells)):
        for j, count in enumerate(counts):
            share = count / max(sum(counts), 1)
            x, y = start + j * _CELL_PX, start + i * _CELL_PX
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_CELL_PX}" height="{_CELL_PX}" stroke="#ddd" fill="#08519c"'
                f' fill-opacity="{share:.3f}"/>'
            )
            if count:
                color = "white" if share > 0.5 else "black"
                parts.append(f'<text x="{x + _CELL_PX / 2}" y="{y + _CELL_PX / 2 + 4}" fill="{color}">{count}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _matrix(names: Sequence[str], cells: Iterable[ConfusionCell]) -> list[tuple[Any, ...]]:
    """A row for each true label: its name, then its count for each prediction."""
    counts = {(label, prediction): count for label, prediction, count in cells}
    return [(label, *(counts.get((label, prediction), 0) for prediction in names)) for label in names]


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _markdown(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table with its first column to the left and numbers to the right."""

    def line(cells: Iterable[Any]) -> str:
        in_one_line = (" ".join(str(cell).split()) for cell in cells)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in in_one_line) + " |\n"

    return line(header) + "|---|" + "---:|" * (len(header) - 1) + "\n" + "".join(map(line, rows))
