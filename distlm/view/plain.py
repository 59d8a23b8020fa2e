"""One line for what happens and one for each point of the metrics: for logs, pipes and CI."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO

from distlm.console import discard
from distlm.view import Event, encode_event
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
            _write(self._stream, f"{line}\n")

    def stop_requested(self, count: int) -> None:
        self.state.stopping = stop_message(count, self.state.is_training)
        with suppress(OSError, ValueError):
            os.write(self._stream.fileno(), f"{self.state.stopping}\n".encode())

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
    """Prints each event as a line of JSON: for programs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: Event) -> None:
        _write(self._stream, encode_event(event))

    def stop_requested(self, count: int) -> None:
        return

    def close(self) -> None:
        return


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # the reader has gone
        with suppress(OSError, ValueError):
            discard(stream)
