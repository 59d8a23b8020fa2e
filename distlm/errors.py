"""Every error distlm raises on purpose, and the exit code that each one ends a command with.

    DistlmError
    |-- InputError               2    the user can mend it: a config key, a data file, a command line
    |-- TrainingError            1    the run failed and would fail again
    |   |-- NonFiniteLossError        the loss became NaN or infinite
    |   `-- AttestationError          the workers would have trained something else than asked
    |-- InfrastructureError      3    a machine, the network or the storage failed; a new attempt may succeed
    |   |-- CheckpointError           a checkpoint cannot be written, or is missing, torn or altered
    |   |   |-- UnknownFormatError        it is whole, and another version of distlm wrote it
    |   |   `-- UnreadableError           the storage does not give it; it may be whole
    |   `-- RayLostError              the Ray that the attempt runs on is gone
    |-- Preempted               75    stopped from outside: continue me
    `-- Cancelled              130    the user asked to stop

Exit code 0 means succeeded, and nothing else does. This module belongs to the control plane: standard library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Any, Self


class ExitCode(IntEnum):
    """How a distlm command or controller process ends; the same on every target."""

    SUCCEEDED = 0
    FAILED = 1
    BAD_INPUT = 2
    INFRASTRUCTURE = 3
    PREEMPTED = 75
    CANCELLED = 130


class Cause(StrEnum):
    """Why an attempt ended before its time, as result.json and the terminal say it."""

    OUT_OF_MEMORY = "out of memory"
    USER_DATA = "user data"
    CODE = "code"
    """An exception that none of the others explains: the user's code, a library's or ours."""
    DIVERGENCE = "divergence"
    """The loss is not a number any more."""
    NODE_LOST = "node lost"
    """A worker's process or its host is gone without a word."""
    HANG = "hang"
    """Workers waited for another one until a time limit."""
    STORAGE = "storage"
    CONFIGURATION = "configuration"
    INFRASTRUCTURE = "infrastructure"
    """Ray, the network, the tracker, or the controller itself."""
    PREEMPTION = "preemption"
    CANCELLATION = "cancellation"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave, and what would be right.

    `message` says what is wrong and what is allowed or to be done. `value` is the offending value as the user wrote it
    (never an expanded secret). `location` is "file:line" where that is known.
    """

    message: str
    key: str = ""
    value: str = ""
    location: str = ""

    def __str__(self) -> str:
        subject = " = ".join(part for part in (self.key, self.value) if part)
        return ": ".join(part for part in (self.location, subject, self.message) if part)

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


class DistlmError(Exception):
    """Base of all errors raised on purpose. The text is one line for the user: cause first, then the remedy."""

    exit_code = ExitCode.FAILED
    cause = Cause.CODE

    def __init__(self, message: str = "", failed_ranks: tuple[int, ...] = ()) -> None:
        """`failed_ranks`: where it happened, when all ranks raise it; empty: where it is raised."""
        self.failed_ranks = failed_ranks
        super().__init__(message)


class InputError(DistlmError):
    """The user's input is wrong. Carries all problems found, so that they are mended in one go."""

    exit_code = ExitCode.BAD_INPUT
    cause = Cause.CONFIGURATION

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(Problem(p) if isinstance(p, str) else p for p in problems)
        if self.problems and all(problem.key.startswith("data.") for problem in self.problems):
            self.cause = Cause.USER_DATA
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[InputError], tuple[Problem, ...]]:
        # Without this, unpickling in another process would call __init__ with the joined text.
        return type(self), self.problems


class TrainingError(DistlmError):
    """The training itself failed; the same run would fail again."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite and the run's policy is to stop."""

    cause = Cause.DIVERGENCE


class AttestationError(TrainingError):
    """What is about to train is not what the config asks for."""


class InfrastructureError(DistlmError):
    """A machine, the network or the storage failed; a new attempt may succeed."""

    exit_code = ExitCode.INFRASTRUCTURE
    cause = Cause.INFRASTRUCTURE


class CheckpointError(InfrastructureError):
    """A checkpoint cannot be written, or is missing, torn, altered or of an unknown format version."""

    cause = Cause.STORAGE


class UnknownFormatError(CheckpointError):
    """A checkpoint is whole, and its format version is one that this distlm does not read."""


class UnreadableError(CheckpointError):
    """The storage does not give a checkpoint, which may be whole nevertheless."""


class RayLostError(InfrastructureError):
    """The Ray that the attempt runs on is gone; a new attempt may go on."""


class Preempted(DistlmError):
    """Stopped from outside; `distlm resume` continues the last checkpoint."""

    exit_code = ExitCode.PREEMPTED
    cause = Cause.PREEMPTION


class Cancelled(DistlmError):
    """The user asked to stop."""

    exit_code = ExitCode.CANCELLED
    cause = Cause.CANCELLATION
