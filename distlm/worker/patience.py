"""The best evaluation so far, and early stopping: whether a training still gets better (Prechelt 1998, "Early stopping
- but when?")."""

from __future__ import annotations

from distlm.checkpoint.manifest import Progress
from distlm.config.schema import TrainingConfig


class Patience:
    """Watches the metric for the best model. All workers look at the same values and so agree."""

    def __init__(self, config: TrainingConfig, greater_is_better: bool) -> None:
        self._patience, self._threshold = config.early_stopping_patience, config.early_stopping_threshold
        self._sign = 1.0 if greater_is_better else -1.0
        self.best: float | None = None
        self.num_without_improvement = 0
        """Evaluations since the last one that was better by more than the threshold."""
        self.best_is_new = False
        """The last evaluation was the best one."""

    def look_at(self, value: float | None) -> None:
        """Take a new evaluation into account; None: it lacks the metric, and so is no better."""
        gain = float("-inf") if value is None else self._sign * (value - self.best) if self.best is not None else None
        self.best_is_new = gain is None or gain > 0
        self.num_without_improvement = 0 if gain is None or gain > self._threshold else self.num_without_improvement + 1
        if self.best_is_new:
            self.best = value

    def restore(self, progress: Progress) -> None:
        """Go on from a checkpoint."""
        self.best, self.num_without_improvement = progress.best_metric, progress.num_evaluations_without_improvement

    @property
    def is_exhausted(self) -> bool:
        """Whether the training is to end. Never without `training.early_stopping_patience`."""
        return self._patience is not None and self.num_without_improvement >= self._patience
