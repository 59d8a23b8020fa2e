"""How an attempt ended: result.json, the truth about it. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

from distlm.errors import Cause, DistlmError, ExitCode, InfrastructureError, RayLostError
from distlm.redact import redacted
from distlm.run_folder import AttemptFolder, write_json


@dataclass(frozen=True)
class Follower:
    """A rank that failed, too, but not first."""

    rank: int
    message: str
    """The first line of what it says."""
    host: str = ""
    is_same: bool = False
    """It says the same as the first: they failed together."""


def on_rank(rank: int | None, host: str | None) -> str:
    """Where something has happened: " on rank 1 (node-7)", or nothing."""
    return "" if rank is None else f" on rank {rank}" + (f" ({host})" if host else "")


@dataclass(frozen=True)
class Retry:
    """A failure after which new workers went on."""

    incarnation: int
    """That has failed."""
    cause: Cause | None
    rank: int | None
    host: str
    message: str
    step: int | None
    """That it failed in."""
    from_step: int
    """After which the next one went on."""
    failed_at: str
    """UTC in ISO 8601."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt, or an incarnation of it, ended."""

    exit_code: ExitCode
    message: str = ""
    """One line: the first cause."""
    rank: int | None = None
    """Rank that failed first; None: no single one did."""
    host: str = ""
    details: str = ""
    """Traceback of the first failure."""
    cause: Cause | None = None
    """None: it succeeded."""
    place: str = ""
    """Where in the code it was raised, as FILE:LINE in FUNCTION."""
    advice: str = ""
    """Key to change, or what else to do about it, in one line; empty where the message says it."""
    followers: Sequence[Follower] = ()
    step: int | None = None
    """The step that the workers were in; None: not known, or in none."""
    may_be_tried_again: bool = True
    """False: it was refused or stopped on purpose, and would be again."""
    needs_new_attempt: bool = False
    """What the attempt ran on is lost: only another one can go on."""
    retries: Sequence[Retry] = ()
    """The failures before this end, oldest first."""

    @classmethod
    def of(cls, error: DistlmError, details: str = "") -> Self:
        return cls(
            error.exit_code,
            str(error),
            details=details,
            cause=error.cause,
            may_be_tried_again=isinstance(error, InfrastructureError),
            needs_new_attempt=isinstance(error, RayLostError),
        )

    @property
    def state(self) -> str:
        return self.exit_code.name.lower()


def tracker_status(exit_code: int) -> str:
    """What a tracker is told of the end of an attempt, in MLflow's words."""
    if exit_code == ExitCode.SUCCEEDED:
        return "FINISHED"
    return "KILLED" if exit_code in (ExitCode.CANCELLED, ExitCode.PREEMPTED) else "FAILED"


def result_of(
    folder: AttemptFolder, outcome: Outcome, started: float | None, problems: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    """The content of result.json. `started` is in seconds since the epoch; None: not known. `problems` are those of the
    user's input, as JSON."""
    result = {
        "state": outcome.state,
        "exit_code": int(outcome.exit_code),
        "message": outcome.message,
        "problems": problems or [],
        "cause": outcome.cause,
        "rank": outcome.rank,
        "host": outcome.host,
        "place": outcome.place,
        "advice": outcome.advice,
        "followers": [asdict(follower) for follower in outcome.followers],
        "step": outcome.step,
        "needs_new_attempt": outcome.needs_new_attempt,
        "retries": [asdict(retry) for retry in outcome.retries],
        "details": outcome.details,
        "log": str(folder.worker_log(outcome.rank) if outcome.rank is not None else folder.controller_log),
        "started_at": iso_time(started) if started is not None else None,
        "ended_at": iso_time(time.time()),
    }
    return {key: redacted(value) for key, value in result.items()}


def write_result(
    folder: AttemptFolder, outcome: Outcome, started: float | None, problems: list[dict[str, str]] | None = None
) -> None:
    """Write result.json: see `result_of`."""
    write_json(folder.result_json, result_of(folder, outcome, started, problems))


def iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
