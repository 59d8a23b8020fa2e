"""Masking: how many tokens are hidden and how, which never, and what the choice depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from distlm.config.schema import MaskedLMTask
from distlm.tasks import Batch
from distlm.tasks.masked_lm import IGNORED, MaskedLM
from distlm.tasks.words import WordParts
from distlm.worker.prepare import Prepared

PAD, UNK, CLS, SEP, MASK = range(5)
VOCAB_SIZE = 1000
CPU = torch.device("cpu")
NUM_SAMPLES, LENGTH = 500, 128
INDICES = np.arange(NUM_SAMPLES)
EPOCH_0, EPOCH_1 = np.zeros(NUM_SAMPLES, np.int64), np.ones(NUM_SAMPLES, np.int64)


def masked_lm(
    seed: int = 7,
    mlm_probability: float = 0.3,
    eval_mlm_probability: float = 0.15,
    word_parts: WordParts | None = None,
) -> MaskedLM:
    config = MaskedLMTask(mlm_probability=mlm_probability, eval_mlm_probability=eval_mlm_probability)
    prepared = Prepared(
        train_paths=["train-00000.arrow"],
        validation_path=None,
        num_train_samples=NUM_SAMPLES,
        num_validation_samples=0,
        total_steps=1,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK,
        pad_token_id=PAD,
        special_token_ids=[PAD, CLS, SEP, MASK],
        num_parameters=1,
        forward_flops_per_sample=1.0,
        masked_only_head=False,
        data_info={},
        train_mixture=[],
        data_was_cached=True,
    )
    return MaskedLM(config, seed, prepared, word_parts)


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    """[CLS] text [SEP], with a separator in the middle; the last tenth of the samples is padded from the middle on."""
    blocks = np.random.default_rng(0).integers(MASK + 1, VOCAB_SIZE, (NUM_SAMPLES, LENGTH))
    blocks[:, 0], blocks[:, LENGTH // 2], blocks[:, -1] = CLS, SEP, SEP
    blocks[-NUM_SAMPLES // 10 :, LENGTH // 2 + 1 :] = PAD
    blocks[:, 3] = UNK
    return blocks


@pytest.fixture(scope="module")
def is_text(blocks: np.ndarray) -> np.ndarray:
    return ~np.isin(blocks, [PAD, CLS, SEP, MASK])


def masks(batch: Batch) -> torch.Tensor:
    return batch["labels"] != IGNORED


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("training", "share"), [(True, 0.3), (False, 0.15)])
def test_shares(blocks: np.ndarray, is_text: np.ndarray, training: bool, share: float) -> None:
    """About 60,000 tokens: the tolerances are four standard deviations or more."""
    batch = masked_lm().collate(blocks, EPOCH_0, INDICES, training)
    chosen = masks(batch).numpy()
    ids, original = batch["input_ids"].numpy()[chosen], blocks[chosen]
    assert chosen.sum() / is_text.sum() == pytest.approx(share, abs=0.008)
    assert np.mean(ids == MASK) == pytest.approx(0.8, abs=0.018)
    assert np.mean(ids == original) == pytest.approx(0.1, abs=0.013)
    random_ids = ids[(ids != MASK) & (ids != original)]
    assert len(random_ids) / len(ids) == pytest.approx(0.1, abs=0.013)
    counts, _ = np.histogram(random_ids, bins=10, range=(0, VOCAB_SIZE))
    assert counts == pytest.approx(np.full(10, len(random_ids) / 10), rel=0.35)


@pytest.mark.parametrize("training", [True, False])
def test_only_text_is_hidden_and_the_labels_are_the_text(
    blocks: np.ndarray, is_text: np.ndarray, training: bool
) -> None:
    batch = masked_lm(mlm_probability=0.9, eval_mlm_probability=0.9).collate(blocks, EPOCH_0, INDICES, training)
    chosen = masks(batch).numpy()
    assert not (chosen & ~is_text).any()
    assert chosen[:, 3].any(), "an unknown word is a word"
    assert np.array_equal(batch["labels"].numpy()[chosen], blocks[chosen])
    assert np.array_equal(batch["input_ids"].numpy()[~chosen], blocks[~chosen])
    assert np.array_equal(batch["attention_mask"].numpy(), blocks != PAD)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_each_epoch_each_sample_and_each_seed_hides_other_tokens(blocks: np.ndarray, is_text: np.ndarray) -> None:
    def hidden(seed: int, epochs: np.ndarray, indices: np.ndarray) -> torch.Tensor:
        return masks(masked_lm(seed).collate(blocks, epochs, indices, training=True)).float()

    reference = hidden(7, EPOCH_0, INDICES)
    others = [hidden(7, EPOCH_1, INDICES), hidden(7, EPOCH_0, INDICES + 1), hidden(8, EPOCH_0, INDICES)]
    for other in others:
        # Independent choices of 30 % agree in 0.3 * 0.3 of the places.
        assert float((reference * other).mean()) == pytest.approx(0.09 * is_text.mean(), abs=0.005)
    assert torch.equal(reference, hidden(7, EPOCH_0, INDICES))


def test_a_sample_does_not_depend_on_its_batch(blocks: np.ndarray) -> None:
    task, epochs = masked_lm(), INDICES % 3
    batch = task.collate(blocks, epochs, INDICES, training=True)
    chosen = np.array([17, 4, 333])
    small = task.collate(blocks[chosen], epochs[chosen], INDICES[chosen], training=True)
    assert same(small, {name: tensor[chosen] for name, tensor in batch.items()})


def test_evaluation_hides_the_same_whatever_the_seed(blocks: np.ndarray) -> None:
    one, other = (masked_lm(seed).collate(blocks, EPOCH_0, INDICES, training=False) for seed in (7, 8))
    assert same(one, other)
    settings = masked_lm(8, mlm_probability=0.5).collate(blocks, EPOCH_0, INDICES, training=False)
    assert same(one, settings)


# Every token that is no multiple of 3 goes on with the word before it.
WORD_PARTS = WordParts(np.arange(VOCAB_SIZE) % 3 > 0, np.ones(VOCAB_SIZE, np.bool_))


def words_of(row: np.ndarray, is_text: np.ndarray) -> list[list[int]]:
    """Positions of the tokens of each word of a sample."""
    words: list[list[int]] = []
    for position in np.flatnonzero(is_text):
        goes_on = row[position] % 3 > 0 and position > 0 and is_text[position - 1]
        words = [*words[:-1], [*words[-1], position]] if goes_on else [*words, [position]]
    return words


def test_whole_words_are_hidden_or_not_and_as_many_tokens(blocks: np.ndarray, is_text: np.ndarray) -> None:
    batch = masked_lm(word_parts=WORD_PARTS).collate(blocks, EPOCH_0, INDICES, training=True)
    chosen = masks(batch).numpy()
    lengths = set()
    for row, text, hidden in zip(blocks[:60], is_text, chosen, strict=False):
        for word in words_of(row, text):
            lengths.add(len(word))
            assert hidden[word].all() or not hidden[word].any()
    assert {1, 2, 3, 4} <= lengths, "the test has words of several lengths"
    assert not (chosen & ~is_text).any()
    assert chosen.sum() / is_text.sum() == pytest.approx(0.3, abs=0.02)
    single = masks(masked_lm().collate(blocks, EPOCH_0, INDICES, training=True)).numpy()
    assert not np.array_equal(chosen, single)
    few = np.array([17, 4, 333])
    small = masked_lm(word_parts=WORD_PARTS).collate(blocks[few], EPOCH_0[few], INDICES[few], training=True)
    assert same(small, {name: tensor[few] for name, tensor in batch.items()})


class Guess(torch.nn.Module):
    """Logits from a table, one row for each token id."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCAB_SIZE, VOCAB_SIZE))
        self.num_calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Guess:
        self.num_calls += 1
        self.logits = self.table[input_ids]
        return self


def test_loss_is_a_sum_over_the_targets(blocks: np.ndarray) -> None:
    task, model = masked_lm(), Guess()
    batch = task.collate(blocks[:4], EPOCH_0[:4], INDICES[:4], training=True)
    with torch.no_grad():
        at_unk = model.table[MASK]
        at_unk[int(batch["labels"][masks(batch)][0])] += 100.0  # one token that the model always guesses
    loss_sum, not_counted = task.loss(model, batch, CPU)
    with torch.no_grad():
        _, correct = task.loss(model, batch, CPU)
    logits = model.table[batch["input_ids"]].flatten(0, 1)
    labels = batch["labels"].flatten()
    assert loss_sum.item() == pytest.approx(cross_entropy(logits, labels, reduction="sum").item(), rel=1e-6)
    assert int(not_counted) == 0, "training does not look for the largest logit"
    assert int(correct) == int((logits.argmax(-1) == labels).sum()) > 0
    assert task.count_targets(batch) == int(masks(batch).sum())


def test_a_batch_without_targets_still_calls_the_model_and_has_gradients_of_zero(blocks: np.ndarray) -> None:
    task, model = masked_lm(), Guess()
    batch = task.collate(blocks[:2], EPOCH_0[:2], INDICES[:2], training=True)
    batch["labels"].fill_(IGNORED)
    loss_sum, correct = task.loss(model, batch, CPU)
    loss_sum.backward()
    assert model.num_calls == 1
    assert (loss_sum.item(), int(correct), task.count_targets(batch)) == (0.0, 0, 0)
    assert model.table.grad is not None and not model.table.grad.any()
