"""Masked language modelling (Devlin et al. 2019, BERT, section 3.1): predict hidden tokens from both sides.

Of the chosen tokens 80 % become [MASK], 10 % a random token and 10 % stay as they are. Choices are made anew in every
epoch, as a function of (seed, epoch, sample index, position) alone: the same on any worker, at any world size and after
any restart. Shapes: B samples, S tokens, V vocabulary, T targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from distlm.config.schema import MaskedLMTask
from distlm.data.order import uniform

if TYPE_CHECKING:
    from distlm.tasks import Batch
    from distlm.worker.prepare import Prepared

IGNORED = -100
"""Label of a token that is not predicted, as everywhere in transformers."""

EVALUATION_SEED = 0
"""Evaluation always hides the same tokens, so that runs with different seeds compare."""

# Streams of random numbers, one for each independent choice.
_CHOOSE, _TREAT, _REPLACE = 1, 2, 3


class MaskedLM:
    """See `distlm.tasks.Task`."""

    def __init__(self, config: MaskedLMTask, seed: int, prepared: Prepared) -> None:
        self._config = config
        self._seed = seed
        self._mask_token_id = prepared.mask_token_id
        self._pad_token_id = prepared.pad_token_id
        self._special_token_ids = np.array(prepared.special_token_ids)
        self._vocab_size = prepared.vocab_size

    def collate(self, input_ids: np.ndarray, epochs: np.ndarray, indices: np.ndarray, training: bool) -> Batch:
        seed = self._seed if training else EVALUATION_SEED
        probability = self._config.mlm_probability if training else self._config.eval_mlm_probability
        positions = np.arange(input_ids.shape[1])[None, :]

        def draw(stream: int) -> np.ndarray:
            return uniform(seed, epochs[:, None], indices[:, None], positions, stream)  # [B, S]

        chosen = (draw(_CHOOSE) < probability) & ~np.isin(input_ids, self._special_token_ids)
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

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # [B, S, V]
        is_target = batch["labels"] != IGNORED  # [B, S]
        logits, labels = logits[is_target].float(), batch["labels"][is_target]  # [T, V], [T]
        correct = (logits.detach().argmax(dim=-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), correct
