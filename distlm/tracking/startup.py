"""How long an incarnation takes to the end of its first step, phase by phase, as told by lines of metrics.jsonl.

    {"kind": "event", "event": "phase", "phase": "ray", "incarnation": 1, "timestamp_ms": ...}

says when a phase ended; each begins where the one before it ended. The phases of the controller are told by its clock,
those of the workers by that of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal

from distlm.tracking.records import now_ms

Phase = Literal[
    "begin",  # no phase: the controller has read the config, or for a later incarnation, asks for workers
    "ray",  # a Ray of its own is started, or one is joined
    "preflight",  # capacity, and a file written from every node
    "prepare",  # data, tokenizer and initial weights
    "place",  # Ray Train places the workers and joins them in a process group
    "import",  # of the worker's libraries
    "build",  # the engine: weights and optimizer
    "load",  # the checkpoint where there is one, the data, attestation
    "first_step",
]


def phase_ended(phase: Phase, incarnation: int, **others: Any) -> dict[str, Any]:
    """The message that a phase has ended, now; `others` are further fields."""
    which = {"phase": phase, "incarnation": incarnation}
    return {"kind": "event", "event": "phase", **which, "timestamp_ms": now_ms(), **others}


def startup_seconds(messages: Iterable[Mapping[str, Any]], incarnation: int = 1) -> dict[str, float]:
    """Seconds of each phase of an incarnation that has ended, in order."""
    ended = [m for m in messages if m.get("event") == "phase" and m["incarnation"] == incarnation]
    return {
        after["phase"]: (after["timestamp_ms"] - before["timestamp_ms"]) / 1000 for before, after in pairwise(ended)
    }
