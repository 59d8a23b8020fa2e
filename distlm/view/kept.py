"""What is shown of an attempt, kept as lines in output.log of its folder: for who looks from elsewhere or later."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TextIO

from distlm.run_folder import OUTPUT_LOG
from distlm.view import Event, View
from distlm.view.plain import PlainView


class KeptView:
    """Shows all in `view`, if there is one, and keeps it: with each event `begin`, in the log of that attempt."""

    def __init__(self, view: View | None) -> None:
        self._view = view
        self._file: TextIO | None = None
        self._kept: PlainView | None = None

    def show(self, event: Event) -> None:
        if event["event"] == "begin":
            self._open(Path(event["log"]) / OUTPUT_LOG)
        if self._kept:
            self._kept.show(event)
        if self._view:
            self._view.show(event)

    def stop_requested(self, count: int) -> None:
        if self._kept:
            self._kept.stop_requested(count)
        if self._view:
            self._view.stop_requested(count)

    def keep(self, line: str) -> None:
        """A line that is not of an event."""
        if self._file:
            with suppress(OSError):
                print(line, file=self._file, flush=True)

    def close(self) -> None:
        """The log stays open for what is still to be kept."""
        if self._view:
            self._view.close()

    def _open(self, path: Path) -> None:
        """Where there is no room for it, nothing is kept."""
        self._kept = self._file = None
        with suppress(OSError):
            self._file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 - as long as the process
            self._kept = PlainView(self._file)
