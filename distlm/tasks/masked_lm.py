"""Masked language modelling (Devlin et al. 2019, BERT, section 3.1): predict hidden tokens from both sides.

Of the chosen tokens 80 % become [MASK], 10 % a random token and 10 % stay as they are. Choices are made anew in every
epoch, as a function of (seed, epoch, sample index, position) alone: the same on any worker, at any world size and after
any restart. Shapes: B samples, S tokens, H hidden size, V vocabulary, T targets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from distlm.config.schema import MaskedLMTask
from distlm.data.order import uniform
from distlm.data.pack import PackedDataset
from distlm.data.samples import IGNORED
from distlm.tasks.scores import Evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distlm.tasks import Batch
    from distlm.tasks.words import WordParts
    from distlm.worker.prepare import Prepared

EVALUATION_SEED = 0
"""Evaluation always hides the same tokens, so that runs with different seeds compare."""

# Streams of random numbers, one for each independent choice.
_CHOOSE, _TREAT, _REPLACE = 1, 2, 3


class MaskedLM:
    """See `distlm.tasks.Task`. `word_parts` are given where whole words are masked in training."""

    def __init__(
        self, config: MaskedLMTask, seed: int, prepared: Prepared, word_parts: WordParts | None = None
    ) -> None:
        self._config = config
        self._seed = seed
        assert prepared.mask_token_id is not None, "the tokenizer was checked"
        self._mask_token_id = prepared.mask_token_id
        self._pad_token_id = prepared.pad_token_id
        self._special_token_ids = np.array(prepared.special_token_ids)
        self._vocab_size = prepared.vocab_size
        self._word_parts = word_parts
        self._uses_masked_only_head = config.masked_only_head and prepared.masked_only_head
        self._head: MaskedOnlyHead | None = None

    def dataset(self, paths: Sequence[Path]) -> PackedDataset:
        return PackedDataset(paths)

    def attach(self, model: nn.Module) -> None:
        if self._uses_masked_only_head:
            self._head = MaskedOnlyHead(model)

    def head(self, model: nn.Module) -> nn.Module | None:
        try:
            return prediction_head(model)
        except HeadError:
            return None

    def collate(self, samples: np.ndarray, epochs: np.ndarray, indices: np.ndarray, training: bool) -> Batch:
        input_ids = samples  # [B, S]
        seed = self._seed if training else EVALUATION_SEED
        probability = self._config.mlm_probability if training else self._config.eval_mlm_probability
        positions = np.arange(input_ids.shape[1])[None, :]

        def draw(stream: int) -> np.ndarray:
            return uniform(seed, epochs[:, None], indices[:, None], positions, stream)  # [B, S]

        is_special = np.isin(input_ids, self._special_token_ids)
        choice = draw(_CHOOSE)
        if training and self._word_parts is not None:
            choice = np.take_along_axis(choice, _word_starts(self._word_parts.continues(input_ids), is_special), axis=1)
        chosen = (choice < probability) & ~is_special
        labels = np.where(chosen, input_ids, IGNORED)
        treatment = draw(_TREAT)
        hidden = np.where(chosen & (treatment < 0.8), self._mask_token_id, input_ids)
        random_ids = (draw(_REPLACE) * self._vocab_size).astype(input_ids.dtype)
        hidden = np.where(chosen & (treatment >= 0.8) & (treatment < 0.9), random_ids, hidden)
        return {
            "input_ids": torch.from_numpy(hidden.astype(np.int64)),
            "attention_mask": torch.from_numpy((input_ids != self._pad_token_id).astype(np.int64)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }

    def count_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def leave_out(self, batch: Batch, rows: torch.Tensor) -> None:
        batch["labels"][rows] = IGNORED

    def loss(self, model: nn.Module, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {"input_ids": batch["input_ids"].to(device, non_blocking=True)}
        if not batch["attention_mask"].all():  # without one, transformers neither makes a mask nor looks whether it may
            inputs["attention_mask"] = batch["attention_mask"].to(device, non_blocking=True)
        # Looked up on the host: how many there are decides shapes, and asking a GPU for it would wait for all its work.
        labels = batch["labels"].flatten()
        target_positions = torch.nonzero(labels != IGNORED).squeeze(1)
        labels = labels[target_positions].to(device, non_blocking=True)  # [T]
        target_positions = target_positions.to(device, non_blocking=True)  # [T], into [B x S]
        if self._head:
            logits = self._head.logits_at(target_positions, model, inputs)  # [T, V]
        else:
            logits = model(**inputs).logits.flatten(0, 1)[target_positions]
        logits = logits.float()
        correct = torch.zeros((), dtype=torch.long, device=device)
        if not torch.is_grad_enabled():  # looking for the largest of V logits takes a per cent of a small model's step
            correct = (logits.argmax(dim=-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), correct

    def judge(self, batch: Batch, indices: np.ndarray, predicted: torch.Tensor) -> int:
        return int(predicted)

    def evaluation(self, judged: list[Any], loss: float, num_targets: float, data: Any) -> Evaluation:
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation({"perplexity": perplexity, "accuracy": sum(judged) / max(num_targets, 1.0)}, tables={})


def _word_starts(continues: np.ndarray, is_special: np.ndarray) -> np.ndarray:
    """Position of the first token of each token's word, [B, S]: all tokens of a word then share its choice."""
    continues[:, 1:] &= ~(is_special[:, 1:] | is_special[:, :-1])
    return np.maximum.accumulate(np.where(continues, 0, np.arange(continues.shape[1])), axis=1)


class MaskedOnlyHead:
    """Has a masked language model's head compute the chosen positions only.

    The head looks at one position at a time, so the other logits, which nobody asks for, cost the most expensive
    product of a small model for nothing; loss and gradients are the same. Under ZeRO-3 the head must be called on every
    rank, whatever the number of positions, since gathering its weights is collective; it is, with none as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._positions: torch.Tensor | None = None
        prediction_head(model).register_forward_pre_hook(self._select)

    def logits_at(self, positions: torch.Tensor, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [T, V] of the positions [T] (into the flattened [B x S]) of a batch of model inputs. Raises
        HeadError where the model does not give those."""
        self._positions = positions
        try:
            logits: torch.Tensor = model(**inputs).logits
        finally:
            self._positions = None
        if logits.ndim != 2 or len(logits) != len(positions):
            raise HeadError(f"{list(logits.shape)} are no logits of {len(positions)} positions")
        return logits

    def _select(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        hidden_states, *others = arguments  # [B, S, H]
        return hidden_states.flatten(0, 1)[self._positions], *others


class HeadError(LookupError):
    """A model has no head that could be told from the rest of it, or it does not compute single positions."""


def prediction_head(model: nn.Module) -> nn.Module:
    """The direct child of a masked language model, with an adapter or without one, that holds its output embeddings:
    the projection to the vocabulary, in many architectures with the dense layer before it. Raises HeadError where there
    is none."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    for child in model.children():
        if any(module is embeddings for module in child.modules()):
            return child
    raise HeadError(f"{type(model).__name__} has no output embeddings")
