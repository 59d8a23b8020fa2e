"""One line for what happens and one for each point of the metrics: for logs, pipes and CI."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TextIO

from distlm.view import Event
from distlm.view.state import AttemptState, evaluation_line, stop_message, training_line

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
            self._write(line)

    def stop_requested(self, count: int) -> None:
        with suppress(OSError, ValueError):
            os.write(self._stream.fileno(), f"{stop_message(count)}\n".encode())

    def close(self) -> None:
        return

    def _lines(self, event: Event) -> list[str]:
        match event["event"]:
            case "begin":
                place = os.path.relpath(event["folder"])
                attempt = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
                return [f"run {event['run_id']} in {place}{attempt}"]
            case "phase" | "note" | "stopping":
                return [event["message"]]
            case "warning":
                return [f"warning: {event['message']}"]
            case "preparation":
                return [self.state.preparation] if self._is_time_for_preparation() else []
            case "metrics" if "train/loss" in event["values"]:
                return [training_line(self.state, event["values"])]
            case "metrics" if "eval/loss" in event["values"]:
                return [evaluation_line(self.state, event["values"])]
        return []

    def _is_time_for_preparation(self) -> bool:
        now = self.state.clock()
        if now < max(self.state.preparation_began_s + _QUIET_S, self._next_preparation_s):
            return False
        self._next_preparation_s = now + _PREPARATION_INTERVAL_S
        return True

    def _write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # the reader has gone
            self._stream.write(f"{line}\n")
            self._stream.flush()


class JsonView:
    """Prints each event as a line of JSON: for programs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: Event) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(json.dumps(event, ensure_ascii=False) + "\n")
            self._stream.flush()

    def stop_requested(self, count: int) -> None:
        return

    def close(self) -> None:
        return
