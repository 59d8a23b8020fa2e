"""What to do after an incarnation has ended. A policy is a small object that returns a decision; the loop acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distlm.outcome import Outcome


@dataclass(frozen=True)
class Decision:
    """Train on with a new incarnation, or end the attempt."""

    train_again: bool


class Policy(Protocol):
    def decide(self, outcome: Outcome, incarnation: int) -> Decision: ...


class StopAtFirstFailure:
    """Every outcome is the attempt's outcome."""

    def decide(self, outcome: Outcome, incarnation: int) -> Decision:
        return Decision(train_again=False)
