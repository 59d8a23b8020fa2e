"""Which of the failures of a worker group was the first, what class of cause it has, and what to do about it."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distlm.causes import cause_of, exit_code_of_cause, is_consequence
from distlm.config.schema import RunConfig
from distlm.errors import Cause, ExitCode
from distlm.outcome import Follower, Outcome
from distlm.worker.failure import failure_message

Failure = Mapping[str, Any]
"""What a worker tells of its exception: see `distlm.worker.failure`."""

_SOURCE_FILE = re.compile(r"\[\S+\.(?:cc|cpp|h|cu):\d+\] ")
"""Where in the source code of torch it was raised, which torch puts first."""
_ENDED = "ended with it"
_RAY_KILLED_IT = "running low on memory"
"""What Ray says of workers that it has killed itself. It names the kernel's OOM killer for every death."""


def first_failure(
    failures: Sequence[Failure], error: BaseException, world_size: int, kernel_killed: bool = False
) -> Outcome:
    """The cause of a failed incarnation: the earliest failure that is not the consequence of another one.

    `error` is Ray Train's, which knows the exception of each rank, or what broke Ray Train itself. `kernel_killed`: the
    kernel has lately killed a process of this host for want of memory.
    """
    of_ranks: dict[int, Exception] = getattr(error, "worker_failures", {})
    told_by = {failure["rank"] for failure in failures}
    # Some could tell Ray only; of those that are gone Ray has an error of its own.
    late = [failure_message(e, rank, 0) for rank, e in of_ranks.items() if rank not in told_by and not _is_ray(e)]
    failures = [*failures, *(message | {"host": ""} for message in late)]
    outcome = _first_failure(failures, error, kernel_killed)
    if outcome.rank is None:
        return outcome
    others = sorted((f for f in failures if f["rank"] != outcome.rank), key=lambda failure: failure["rank"])
    told = [_follower(failure, outcome.message) for failure in others]
    silent = set(range(world_size)) - {outcome.rank, *(follower.rank for follower in told)}
    return replace(outcome, followers=[*told, *(Follower(rank, _ENDED) for rank in sorted(silent))])


def _follower(failure: Failure, first: str) -> Follower:
    """Who raises what the first one has raised, failed like it, or was only told of it."""
    text, was_told = _text(failure), failure.get("follows", False)
    message = _ENDED if was_told and text == first else text.partition("\n")[0]
    return Follower(failure["rank"], message, failure["host"], is_same=text == first and not was_told)


def _first_failure(failures: Sequence[Failure], error: BaseException, kernel_killed: bool) -> Outcome:
    failures = sorted(failures, key=lambda failure: (failure.get("follows", False), failure["timestamp_ms"]))
    of_ranks: dict[int, Exception] = getattr(error, "worker_failures", {})
    if first := next((f for f in failures if f["expected"] or not is_consequence(f["message"])), None):
        return _told(first)
    told = {failure["rank"] for failure in failures}
    if silent := sorted(rank for rank in of_ranks if rank not in told):
        return _silent(silent[0], of_ranks[silent[0]], kernel_killed)
    if failures:
        return _unexplained(failures)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0] if lines else ''}"
    cause = Cause.HANG if cause_of(error) == Cause.HANG else Cause.INFRASTRUCTURE
    return Outcome(ExitCode.INFRASTRUCTURE, message, details=str(error), cause=cause)


def _is_ray(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


def _told(first: Failure) -> Outcome:
    """A worker has raised it and has said so."""
    cause = Cause(first["cause"])
    return Outcome(
        ExitCode(first["exit_code"]),
        _text(first),
        first["rank"],
        first["host"],
        first["details"],
        cause,
        place="" if first["expected"] else first["place"],
        step=first["step"],
        may_be_tried_again=not first["expected"] or first["exit_code"] == ExitCode.INFRASTRUCTURE,
    )


def _silent(rank: int, error: Exception, kernel_killed: bool) -> Outcome:
    """A worker is gone without a word."""
    details = str(error)
    found = re.search(r"hostname='([^']*)'", details)
    host = found[1] if found else ""
    kernel_killed &= host in ("", socket.gethostname())
    if cause_of(error) == Cause.HANG:
        cause, text = Cause.HANG, "the worker process does not answer"
    elif kernel_killed or _RAY_KILLED_IT in details:
        killer = "the kernel" if kernel_killed else "Ray"
        cause, text = Cause.OUT_OF_MEMORY, f"the worker process was killed by {killer} because memory ran out"
    else:
        cause, text = Cause.NODE_LOST, "the worker process died without an error of its own (killed or crashed)"
    return Outcome(exit_code_of_cause(cause), text, rank, host, details, cause)


def _unexplained(failures: Sequence[Failure]) -> Outcome:
    """All who speak were waiting for somebody who does not."""
    first = failures[0]
    is_hang = any(failure["cause"] == Cause.HANG for failure in failures)
    cause = Cause.HANG if is_hang else Cause.NODE_LOST
    return Outcome(
        ExitCode.INFRASTRUCTURE,
        f"lost the connection to another worker: {_text(first)}" if not is_hang else _text(first),
        first["rank"],
        first["host"],
        first["details"],
        cause,
    )


def _text(failure: Failure) -> str:
    message = failure["message"].strip() or failure["type"]
    if failure["expected"]:
        return message
    return f"{failure['type']}: {_SOURCE_FILE.sub('', message.splitlines()[0])}"


def advice(cause: Cause | None, config: RunConfig) -> str:
    """The keys to change, or what else to do, where the message of the failure does not say it itself."""
    training, deepspeed = config.training, config.deepspeed
    match cause:
        case Cause.OUT_OF_MEMORY:
            ways = [f"lower training.per_device_train_batch_size (now {training.per_device_train_batch_size})"]
            if deepspeed.zero_stage < 3 and config.resources.max_workers > 1:
                ways.append(f"raise deepspeed.zero_stage (now {deepspeed.zero_stage})")
            if not training.gradient_checkpointing:
                ways.append("set training.gradient_checkpointing=true")
            if len(ways) == 1:
                ways.append(f"use more workers than resources.num_workers={config.resources.num_workers}")
            return " or ".join(ways)
        case Cause.NODE_LOST:
            return "if it happens again, look at the host's own logs"
        case Cause.HANG:
            return "the logs of the other ranks tell which one did not answer"
    return ""
