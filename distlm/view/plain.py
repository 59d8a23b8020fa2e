"""One line for what happens and one for each point of the metrics: for logs, pipes and CI."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from typing import Any, TextIO

from distlm.console import discard
from distlm.view import Event
from distlm.view.state import AttemptState, lines_of, stop_message, training_line

_QUIET_S = 5.0
"""Preparation that takes less shows no line."""
_PREPARATION_INTERVAL_S = 10.0


class PlainView:
    """Writes lines to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.state = AttemptState()
        self._next_preparation_s = 0.0

    def show(self, event: Event) -> None:
        self.state.update(event)
        for line in self._lines(event):
            _write_line(self._stream, line)

    def stop_requested(self, count: int) -> None:
        with suppress(OSError, ValueError):
            os.write(self._stream.fileno(), f"{stop_message(count)}\n".encode())

    def close(self) -> None:
        return

    def _lines(self, event: Event) -> list[str]:
        match event["event"]:
            case "preparation" if self.state.preparation and self._is_time_for_preparation():
                return [self.state.preparation.line()]
            case "metrics" if "train/loss" in event["values"]:
                return [training_line(self.state, event["values"]), *lines_of(self.state, event)]
        return lines_of(self.state, event)

    def _is_time_for_preparation(self) -> bool:
        now = self.state.clock()
        if now < max(self.state.preparation_began_s + _QUIET_S, self._next_preparation_s):
            return False
        self._next_preparation_s = now + _PREPARATION_INTERVAL_S
        return True


class JsonView:
    """Prints each event as a line of JSON: for programs. NaN and infinity, which JSON has not, become null."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: Event) -> None:
        _write_line(self._stream, json.dumps(_finite(event), ensure_ascii=False, allow_nan=False))

    def stop_requested(self, count: int) -> None:
        return

    def close(self) -> None:
        return


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _write_line(stream: TextIO, line: str) -> None:
    try:
        stream.write(f"{line}\n")
        stream.flush()
    except (OSError, ValueError):  # the reader has gone
        with suppress(OSError, ValueError):
            discard(stream)
