"""What to do after a failure. A policy is a small object that returns a decision; the loop acts."""

from __future__ import annotations

from dataclasses import dataclass

from distlm.config.schema import MaxRetries, RecoveryConfig
from distlm.errors import Cause, ExitCode
from distlm.outcome import Outcome

_FINAL = (ExitCode.SUCCEEDED, ExitCode.BAD_INPUT, ExitCode.PREEMPTED, ExitCode.CANCELLED)
_REPEATS = (Cause.CODE, Cause.OUT_OF_MEMORY)
"""Causes that lie in the step itself if it fails again in the same one."""
_FIRST_PAUSE_S = 1.0

NO_RETRIES = RecoveryConfig(max_retries=MaxRetries(**dict.fromkeys(MaxRetries.model_fields, 0)))


@dataclass(frozen=True)
class Decision:
    """Go on from the newest checkpoint, or end."""

    try_again: bool
    pause_s: float = 0.0
    """To wait before."""
    reason: str = ""
    """Why not, or which try it is, in one line."""

    @property
    def how(self) -> str:
        """To stand behind what is tried again."""
        pause = f"after {self.pause_s:g} s " if self.pause_s else ""
        return f"{pause}({self.reason})"


class RetryPolicy:
    """Tries again as long as the budget of the failure's cause lasts. A new checkpoint fills all budgets up.

    What fails twice in the same step is not tried a third time: the step is the reason.
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config
        self._num_failures: dict[str, int] = {}
        self._last: tuple[Cause | None, int | None] = (None, None)

    def decide(self, outcome: Outcome, *, has_progressed: bool) -> Decision:
        """`has_progressed`: a checkpoint was committed since the failure before."""
        if outcome.exit_code in _FINAL or not outcome.may_be_tried_again or outcome.cause is None:
            return Decision(try_again=False)
        if has_progressed:
            self._num_failures.clear()
        last, self._last = self._last, (outcome.cause, outcome.step)
        if outcome.cause in _REPEATS and outcome.step is not None and last == self._last:
            return Decision(try_again=False, reason=f"the same in step {outcome.step} twice")
        name = outcome.cause.replace(" ", "_")
        limit = getattr(self._config.max_retries, name, 0)
        number = self._num_failures[name] = self._num_failures.get(name, 0) + 1
        if number > limit:
            reason = f"recovery.max_retries.{name} = {limit} without a new checkpoint" if limit else ""
            return Decision(try_again=False, reason=reason)
        before = sum(self._num_failures.values()) - 1
        pause_s = min(_FIRST_PAUSE_S * 2 ** (before - 1), self._config.longest_pause_s) if before else 0.0
        return Decision(try_again=True, pause_s=pause_s, reason=f"try {number} of {limit}")
