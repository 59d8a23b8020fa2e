"""How an attempt ended: result.json, the truth about it. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

from distlm.errors import Cause, DistlmError, ExitCode
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

    @classmethod
    def of(cls, error: DistlmError, details: str = "") -> Self:
        return cls(error.exit_code, str(error), details=details, cause=error.cause)

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
        "details": outcome.details,
        "log": str(folder.worker_log(outcome.rank) if outcome.rank is not None else folder.controller_log),
        "started_at": _iso(started) if started is not None else None,
        "ended_at": _iso(datetime.now(UTC).timestamp()),
    }
    return {key: redacted(value) for key, value in result.items()}


def write_result(
    folder: AttemptFolder, outcome: Outcome, started: float | None, problems: list[dict[str, str]] | None = None
) -> None:
    """Write result.json: see `result_of`."""
    write_json(folder.result_json, result_of(folder, outcome, started, problems))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
