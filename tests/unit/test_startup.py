"""The phases of a start, from the lines of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from distlm.tracking.startup import phase_ended, startup_seconds


def at(phase: Any, incarnation: int, timestamp_ms: int) -> dict[str, Any]:
    return phase_ended(phase, incarnation, timestamp_ms=timestamp_ms)


def test_a_phase_lasts_from_the_end_of_the_one_before() -> None:
    lines = [
        {"kind": "status", "status": "RUNNING"},
        at("begin", 1, 1_000),
        at("ray", 1, 3_500),
        {"kind": "event", "event": "warning", "message": "a phase"},
        at("place", 1, 3_750),
        at("begin", 2, 9_000),
        at("place", 2, 9_125),
    ]
    assert startup_seconds(lines) == {"ray": 2.5, "place": 0.25}
    assert startup_seconds(lines, incarnation=2) == {"place": 0.125}
    assert startup_seconds(lines, incarnation=3) == {}
