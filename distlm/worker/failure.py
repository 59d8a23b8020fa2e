"""What a worker tells of the exception that ends it."""

from __future__ import annotations

import socket
import time
import traceback
from pathlib import Path
from typing import Any

from distlm.causes import cause_of, exit_code_of_cause
from distlm.errors import DistlmError


def failure_message(error: Exception, rank: int, incarnation: int, step: int | None = None) -> dict[str, Any]:
    """The message of kind failure for the recorder. `step`: that the worker was in; None: in none."""
    cause = cause_of(error)
    failed_ranks = getattr(error, "failed_ranks", ())  # all ranks raise it together
    return {
        "kind": "failure",
        "rank": rank,
        "host": socket.gethostname(),
        "incarnation": incarnation,
        "step": step,
        "timestamp_ms": time.time_ns() // 1_000_000,
        "type": type(error).__name__,
        "message": str(error),
        "details": "".join(traceback.format_exception(error)),
        "cause": str(cause),
        "place": _place(error),
        "exit_code": int(error.exit_code if isinstance(error, DistlmError) else exit_code_of_cause(cause)),
        "expected": isinstance(error, DistlmError),
        "follows": bool(failed_ranks) and rank not in failed_ranks,
    }


def _place(error: Exception) -> str:
    """FILE:LINE in FUNCTION of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}"
