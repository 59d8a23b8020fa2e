"""What to do after an incarnation has ended. A policy is a small object that returns a decision; the loop acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from distlm.errors import ExitCode


@dataclass(frozen=True)
class Outcome:
    """How an incarnation ended, in the words of result.json."""

    exit_code: ExitCode
    message: str = ""
    """One line: the first cause and what to do about it."""
    rank: int | None = None
    """Rank that failed first; None: no single one did."""
    host: str = ""
    details: str = ""
    """Traceback of the first failure."""

    @property
    def state(self) -> str:
        return self.exit_code.name.lower()


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
