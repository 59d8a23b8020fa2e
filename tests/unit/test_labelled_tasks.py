"""Losses of the tasks with labels against those of transformers' own models, and what must not change them.

B samples, S tokens, L labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from distlm.config.schema import TextClassificationTask, TokenClassificationTask
from distlm.data.samples import IGNORED, Samples
from distlm.tasks import Batch
from distlm.tasks.text_classification import TextClassification
from distlm.tasks.token_classification import TokenClassification
from distlm.worker.prepare import Prepared

CPU = torch.device("cpu")
NAMES, UNSEEN = ["a", "b", "c"], ["new", "newer"]
NUM_LABELS, PAD = 3, 0
SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"
LENGTHS = [9, 4, 7, 2, 5]
INDICES = np.arange(len(LENGTHS))


def prepared(weights: list[float] | None = None, num_labels: int = NUM_LABELS, scheme: str = "none") -> Prepared:
    return Prepared(
        train_paths=[],
        validation_path=None,
        num_train_samples=1,
        num_validation_samples=0,
        total_steps=1,
        vocab_size=50,
        mask_token_id=None,
        pad_token_id=PAD,
        special_token_ids=[],
        num_parameters=1,
        forward_flops_per_sample=1.0,
        masked_only_head=False,
        data_info={"max_seq_length": max(LENGTHS)},
        train_mixture=[],
        data_was_cached=True,
        labels=[*NAMES, *UNSEEN] if num_labels > 1 else [],
        num_labels=num_labels,
        label_weights=weights,
        tag_scheme=scheme,
    )


def model(kind: Any, **config: Any) -> Any:
    """In training mode, without dropout."""
    torch.manual_seed(0)
    made = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **{"num_labels": NUM_LABELS, **config},
    )  # fmt: skip
    network = kind(made).train()
    with torch.no_grad():  # so that predictions differ
        network.classifier.weight.mul_(50)
    return network


def texts(labels: list[Any]) -> Samples:
    """A sample for each label, of different lengths, with two segments."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(5, 50, length) for length in LENGTHS[: len(labels)]]
    kinds = [(np.arange(len(one)) > len(one) // 2).astype(np.int8) for one in ids]
    return Samples(ids, kinds, [np.array(row) for row in labels], [np.array([i]) for i in range(len(labels))])


def text_task(problem: str, weights: list[float] | None = None, smoothing: float = 0.0) -> TextClassification:
    config = TextClassificationTask(
        type="text-classification",
        problem_type=problem,  # type: ignore[arg-type]
        label_smoothing_factor=smoothing,
    )
    return TextClassification(config, prepared(weights, 1 if problem == NUMBER else NUM_LABELS))


def word_task(weights: list[float] | None = None, smoothing: float = 0.0, scheme: str = "none") -> TokenClassification:
    config = TokenClassificationTask(type="token-classification", label_smoothing_factor=smoothing)
    return TokenClassification(config, prepared(weights, scheme=scheme))


def collated(task: Any, samples: Samples) -> Batch:
    batch: Batch = task.collate(samples, np.zeros_like(INDICES), INDICES, training=True)
    return batch


def mean_loss(task: Any, network: Any, batch: Batch) -> torch.Tensor:
    loss, _ = task.loss(network, batch, CPU)
    return loss / task.count_targets(batch)


def gradients(network: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None
    }


def assert_same_training(task: Any, network: Any, batch: Batch, expected: torch.Tensor) -> None:
    found = mean_loss(task, network, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradients(network, expected)
    for name, gradient in gradients(network, mean_loss(task, network, batch)).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


# --- as transformers -------------------------------------------------------------------------------------------------

LABELS = {
    SINGLE: [[0], [2], [1], [1], [0]],
    MULTI: [[1.0, 0, 1], [0.0, 0, 0], [1.0, 1, 1], [0.0, 1, 0], [0.0, 0, 1]],
    NUMBER: [[0.5], [-3.0], [7.0], [0.0], [2.0]],
}


@pytest.mark.parametrize("problem", [SINGLE, MULTI, NUMBER])
def test_the_loss_of_texts_is_that_of_transformers(problem: str) -> None:
    network = model(BertForSequenceClassification, problem_type=problem, num_labels=1 if problem == NUMBER else 3)
    task = text_task(problem)
    batch = collated(task, texts(LABELS[problem]))
    assert batch["input_ids"].shape == (5, 9) and batch["attention_mask"].sum(1).tolist() == LENGTHS
    assert "token_type_ids" in batch
    assert task.count_targets(batch) == 5
    assert_same_training(task, network, batch, network(**batch).loss)


def word_labels() -> list[list[int]]:
    generator = np.random.default_rng(1)
    rows = [[IGNORED, *generator.choice([0, 1, 2, IGNORED], length - 2), IGNORED] for length in LENGTHS]
    rows[0][1] = 2
    return rows


def test_the_loss_of_words_is_that_of_transformers() -> None:
    network, task = model(BertForTokenClassification), word_task()
    batch = collated(task, texts(word_labels()))
    assert task.count_targets(batch) == sum(label != IGNORED for row in word_labels() for label in row)
    assert_same_training(task, network, batch, network(**batch).loss)


@pytest.mark.parametrize(("weights", "smoothing"), [([0.5, 3.0, 1.0], 0.0), (None, 0.2), ([0.5, 3.0, 1.0], 0.2)])
def test_weights_and_smoothing_are_those_of_torch(weights: list[float] | None, smoothing: float) -> None:
    as_tensor = None if weights is None else torch.tensor(weights)
    for task, network, batch in (
        (one := text_task(SINGLE, weights, smoothing), model(BertForSequenceClassification),
         collated(one, texts(LABELS[SINGLE]))),
        (two := word_task(weights, smoothing), model(BertForTokenClassification), collated(two, texts(word_labels()))),
    ):  # fmt: skip
        logits = network(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        expected = cross_entropy(
            logits.flatten(0, -2), batch["labels"].flatten(), weight=as_tensor, label_smoothing=smoothing
        )
        assert_same_training(task, network, batch, expected)


def test_weights_of_several_labels() -> None:
    weights, network = [0.5, 3.0, 1.0], model(BertForSequenceClassification, problem_type=MULTI)
    task = text_task(MULTI, weights)
    batch = collated(task, texts(LABELS[MULTI]))
    logits = network(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none")
    assert_same_training(task, network, batch, (each * torch.tensor(weights)).mean())


# --- what changes nothing --------------------------------------------------------------------------------------------


def tasks() -> list[tuple[Any, Any, list[Any]]]:
    return [
        (text_task(SINGLE), model(BertForSequenceClassification), LABELS[SINGLE]),
        (text_task(MULTI), model(BertForSequenceClassification), LABELS[MULTI]),
        (text_task(NUMBER), model(BertForSequenceClassification, num_labels=1), LABELS[NUMBER]),
        (word_task([2.0, 1.0, 0.5]), model(BertForTokenClassification), word_labels()),
    ]


def part(samples: Samples, chosen: list[int]) -> Samples:
    def some(column: list[Any]) -> list[Any]:
        return [column[i] for i in chosen]

    kinds = None if samples.token_type_ids is None else some(samples.token_type_ids)
    return Samples(some(samples.input_ids), kinds, some(samples.labels), some(samples.rows))


def test_padding_changes_nothing() -> None:
    for task, network, labels in tasks():
        samples = texts(labels)
        whole = task.loss(network, collated(task, samples), CPU)[0]
        alone = sum(task.loss(network, collated(task, part(samples, [i])), CPU)[0] for i in range(5))
        assert alone.item() == pytest.approx(whole.item(), rel=1e-5)
        counts = [task.count_targets(collated(task, part(samples, [i]))) for i in range(5)]
        assert sum(counts) == task.count_targets(collated(task, samples))


def test_samples_that_are_left_out_count_for_nothing() -> None:
    left_out = torch.tensor([False, True, False, True, False])
    for task, network, labels in tasks():
        samples = texts(labels)
        batch, kept = collated(task, samples), collated(task, part(samples, [0, 2, 4]))
        task.leave_out(batch, left_out)
        assert task.count_targets(batch) == task.count_targets(kept)
        loss, predicted = task.loss(network, batch, CPU)
        expected, _ = task.loss(network, kept, CPU)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        judged = task.judge(batch, INDICES, predicted)
        numbers = judged[0].tolist() if isinstance(judged, tuple) else [index for index, _ in judged]
        assert numbers == [0, 2, 4]
        task.leave_out(batch, torch.ones(5, dtype=torch.bool))
        nothing = task.loss(network, batch, CPU)[0]
        assert nothing.item() == 0.0 and task.count_targets(batch) == 0
        assert all(not gradient.any() for gradient in gradients(network, nothing).values())


def test_labels_that_no_model_knows_are_no_part_of_the_loss() -> None:
    single = text_task(SINGLE, [2.0, 1.0, 0.5])
    network = model(BertForSequenceClassification)
    batch = collated(single, texts([[0], [3], [1], [4], [0]]))
    kept = collated(single, part(texts([[0], [3], [1], [4], [0]]), [0, 2, 4]))
    assert single.count_targets(batch) == single.count_targets(kept) == 5.0
    found, expected = (float(single.loss(network, one, CPU)[0]) for one in (batch, kept))
    assert found == pytest.approx(expected, rel=1e-5)

    multi = text_task(MULTI)
    wider = [[*row, 1.0, 0.0] for row in LABELS[MULTI]]
    found, expected = (
        float(multi.loss(network, collated(multi, texts(rows)), CPU)[0]) for rows in (wider, LABELS[MULTI])
    )
    assert found == expected

    words = word_task()
    unknown = [[4 if label == 1 else label for label in row] for row in word_labels()]
    ignored = [[IGNORED if label == 1 else label for label in row] for row in word_labels()]
    for rows in (unknown, ignored):
        batch = collated(words, texts(rows))
        assert words.count_targets(batch) == sum(label in (0, 2) for row in rows for label in row)
    losses = [
        float(words.loss(model(BertForTokenClassification), collated(words, texts(rows)), CPU)[0])
        for rows in (unknown, ignored)
    ]
    assert losses[0] == losses[1]


# --- evaluation ------------------------------------------------------------------------------------------------------


class Data:
    """What an evaluation asks a data set for."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, indices: np.ndarray) -> Samples:
        return part(self._samples, indices.tolist())


def evaluated(task: Any, samples: Samples, predictions: torch.Tensor, left_out: list[bool] | None = None) -> Any:
    batch = collated(task, samples)
    if left_out is not None:
        task.leave_out(batch, torch.tensor(left_out))
    # Two workers, in any order.
    judged = [task.judge(batch, INDICES, predictions)]
    return task.evaluation(judged[::-1], 0.0, 1.0, Data(samples))


def test_texts_are_scored_and_unknown_labels_are_wrong() -> None:
    samples = texts([[0], [3], [1], [4], [0]])
    found = evaluated(text_task(SINGLE), samples, torch.tensor([0, 0, 1, 0, 2]))
    assert found.metrics["accuracy"] == pytest.approx(2 / 5)
    assert "new" in found.tables["per_label.csv"]
    found = evaluated(text_task(SINGLE), samples, torch.tensor([0, 0, 1, 0, 2]), [False, True, False, True, False])
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)


def test_several_labels_are_scored_also_where_rows_are_narrower() -> None:
    samples = texts([[1.0, 0, 0], [0.0, 1, 0, 1], [0.0, 0, 1], [0.0, 0, 0, 0, 1], [0.0, 0, 0]])
    predictions = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.4], [0.1] * 3, [0.1] * 3])
    found = evaluated(text_task(MULTI), samples, predictions)
    assert found.metrics["accuracy"] == pytest.approx(2 / 5), "the first and the last"
    assert found.metrics["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 3))


def test_numbers_are_scored() -> None:
    found = evaluated(text_task(NUMBER), texts(LABELS[NUMBER]), torch.tensor([0.5, -3.0, 7.0, 0.0, 4.0]))
    assert found.metrics["mse"] == pytest.approx(4 / 5) and found.metrics["mae"] == pytest.approx(2 / 5)


def test_words_are_scored_in_the_rows_that_they_are_of() -> None:
    """Windows of a row are put together again: its entity ends in the second one. The model says O where it is I-X."""
    names = ["B-X", "I-X", "O"]
    task = TokenClassification(
        TokenClassificationTask(type="token-classification"),
        Prepared(**{**prepared(scheme="iob2").__dict__, "labels": [*names, "B-Y"]}),
    )
    labels = [[IGNORED, 2, 0, IGNORED], [IGNORED, 1, 2], [IGNORED, 3, IGNORED]]
    rows = [np.array([7, 7]), np.array([7, 7]), np.array([8])]
    samples = Samples([np.arange(5, 5 + len(row)) for row in labels], None, [np.array(row) for row in labels], rows)
    right = torch.full((3, 4), 2)
    right[0, 2], right[1, 1] = 0, 1
    batch = collated(task, samples)
    assert "token_type_ids" not in batch
    for change, f1 in ((1, 2 * 1 / (1 + 2)), (2, 0.0)):  # B-Y is never found
        ids = right.clone()
        ids[1, 1] = change  # I-X stays, since the row's words are decoded together: the B-X is in the other window
        predicted = 5.0 * one_hot(ids, NUM_LABELS)
        first, last = slice(0, 1), slice(1, 3)
        judged = [
            task.judge({name: tensor[part_] for name, tensor in batch.items()}, np.arange(3)[part_], predicted[part_])
            for part_ in (last, first)
        ]
        found = task.evaluation(judged, 0.0, 1.0, Data(samples))  # type: ignore[arg-type]
        assert found.metrics["f1"] == pytest.approx(f1)
        assert found.metrics["accuracy"] == pytest.approx((4 if change == 1 else 3) / 5)
