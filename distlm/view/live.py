"""The live view of a terminal: a few lines at its bottom that show where the attempt is; what happens scrolls above.

One thread alone reads the events and writes to the terminal, so that nothing waits for a slow terminal, and a signal
handler may come at any time. The only module that imports rich.
"""

from __future__ import annotations

import atexit
import math
import os
import queue
import re
import select
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from distlm.console import shown_path
from distlm.errors import ExitCode
from distlm.view import Event
from distlm.view.state import (
    EVALUATION_METRICS,
    AttemptState,
    finite_mean,
    format_duration,
    format_workers,
    lines_of,
    measures,
    step_of,
    stop_message,
    time_left,
)

_REFRESH_INTERVAL_S = 0.25
_LAST_REFRESH_TIMEOUT_S = 5.0
"""A terminal that is halted (Ctrl-S) for longer does not see the end."""


class LiveView:
    """Shows the attempt on the terminal that `stream` writes to, until `close`, at the latest at exit."""

    def __init__(self, stream: TextIO) -> None:
        self.state = AttemptState()
        self._terminal = _Terminal(stream)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop_count = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-view", daemon=True)
        atexit.register(self.close)
        self._excepthook, sys.excepthook = sys.excepthook, self._die
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._suspend)
        self._thread.start()

    def show(self, event: Event) -> None:
        self._events.put(event)

    def stop_requested(self, count: int) -> None:
        self._stop_count = count  # shown at the next refresh

    def close(self) -> None:
        atexit.unregister(self.close)
        if sys.excepthook == self._die:
            sys.excepthook = self._excepthook
        self._closing.set()
        self._thread.join(_LAST_REFRESH_TIMEOUT_S)

    def _run(self) -> None:
        stop_count = 0
        try:
            is_last = False
            while not is_last:
                is_last = self._closing.wait(_REFRESH_INTERVAL_S)
                if self._stop_count > stop_count:
                    stop_count = self._stop_count
                    self.state.stopping = stop_message(stop_count, self.state.is_training)
                log = self._log()
                size = self._terminal.size()
                draw = summary if is_last else panel
                # One column is left free: where a line ends at the last one, terminals differ.
                self._terminal.paint(log, draw(self.state, size.columns - 1, size.lines - 1), size)
        finally:
            self._terminal.release()

    def _log(self) -> list[Text]:
        """What the events since the last refresh add to the log."""
        log = []
        for _ in range(self._events.qsize()):
            event = self._events.get()
            self.state.update(event)
            style = "yellow" if event["event"] in ("warning", "stopping") else ""
            log += [Text(_printable(line), style) for line in lines_of(self.state, event)]
        return log

    def _die(self, *error: Any) -> None:
        """An exception that nobody catches is printed below the live lines and not into them."""
        self.close()
        self._excepthook(*error)

    def _suspend(self, number: int, _: FrameType | None) -> None:
        """Ctrl-Z: leave the shell a clean terminal with a cursor; goes on after `fg`."""
        self._terminal.pause()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._suspend)
        self._terminal.resume()


# --- the terminal ----------------------------------------------------------------------------------------------------

_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_ERASE_LINE_END, _ERASE_BELOW = "\x1b[K", "\x1b[J"

_ASCII = str.maketrans("━─·…×▁▂▃▄▅▆▇█⣾⣽⣻⢿⡿⣟⣯⣷", "#--~x_.-~=+*#|/-\\|/-\\")
"""What stands for the characters that we draw with, where the encoding has only those of ASCII."""


class _Terminal:
    """The last lines of a terminal, which are painted again and again.

    Between two paintings the cursor stands at the beginning of the first of them. There it also stands after the
    terminal was resized, however the terminal has broken the lines anew, and what is below it may be erased.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._descriptor = stream.fileno()
        self._encoding = stream.encoding
        self._has_blocks = _can_encode(self._encoding, "━▁⣾…")
        self._console = Console(file=stream, force_terminal=True, markup=False, emoji=False, highlight=False)
        self._lines: list[Text] = []
        self._size = os.terminal_size((0, 0))
        self._is_paused = self._is_gone = False

    def size(self) -> os.terminal_size:
        try:
            columns, lines = os.get_terminal_size(self._descriptor)
        except OSError:
            columns = lines = 0
        return os.terminal_size((columns or 80, lines or 24))

    def paint(self, log: list[Text], lines: list[Text], size: os.terminal_size) -> None:
        """Add `log` above the live lines, and change those to `lines`, made for a terminal of this size."""
        if not self._is_foreground():
            lines = []  # the screen is the shell's
        if self._is_paused or not (log or lines != self._lines or size != self._size):
            return
        parts = [_HIDE_CURSOR] if lines else []
        if self._lines and (log or len(lines) < len(self._lines) or size != self._size):
            parts.append(f"\r{_ERASE_BELOW}")
        parts += [f"{self._styled(text)}\n" for text in log]
        if lines:
            parts.append(f"\r{_NO_WRAP}")
            parts.append("\n".join(f"{self._styled(line)}{_ERASE_LINE_END}" for line in lines))
            parts.append(f"\r{_WRAP}" + (f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""))
        self._lines, self._size = lines, size
        self._write("".join(parts))

    def release(self) -> None:
        """Leave the lines as they are, and the cursor below them."""
        self._write("\n" * len(self._lines) + _SHOW_CURSOR)
        self._is_gone = True

    def pause(self) -> None:
        """Remove the live lines. May be called in a signal handler."""
        self._is_paused = True
        self._write(f"\r{_ERASE_BELOW}{_SHOW_CURSOR}")

    def resume(self) -> None:
        self._lines, self._is_paused = [], False

    def _is_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # not our controlling terminal
            return True

    def _styled(self, text: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(text, soft_wrap=True, end="")
        return capture.get()

    def _write(self, text: str) -> None:
        data = (text if self._has_blocks else text.translate(_ASCII)).encode(self._encoding, "replace")
        while data and not self._is_gone:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # another program has set the terminal to non-blocking
                select.select([], [self._descriptor], [])
            except OSError:
                self._is_gone = True


def _can_encode(encoding: str, text: str) -> bool:
    with suppress(UnicodeEncodeError):
        return bool(text.encode(encoding))
    return False


_ESCAPES = re.compile(r"\x1b\[[0-9;:?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _printable(text: str) -> str:
    """Without what would move the cursor or change colours."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


# --- the lines -------------------------------------------------------------------------------------------------------

_LABEL_COLUMNS = 9
_TWO_COLUMNS_FROM = 120
_MIN_SPARKLINE, _MAX_SPARKLINE = 8, 40
_SPINNER = "⣾⣽⣻⢿⡿⣟⣯⣷"
_LEVELS = "▁▂▃▄▅▆▇█"


def panel(state: AttemptState, columns: int, rows: int) -> list[Text]:
    """The live lines, at most `rows` of them, each at most `columns` wide."""
    if not state.begin:
        return []
    lines = _head(state, columns)
    if state.total_steps:
        lines.append(_steps(state, columns))
    if not state.is_training:
        lines += _doing(state, columns)
    lines += _in_columns([_training(state, _half(columns)), _evaluation(state, _half(columns))], columns)
    lines += _in_columns([_speed(state, _half(columns)), _memory(state, _half(columns))], columns)
    lines += _in_columns(_places(state, _half(columns)), columns)
    lines.append(_stopping(state, columns))
    return lines if len(lines) <= rows else [*lines[: rows - 1], lines[-1]]


def summary(state: AttemptState, columns: int, rows: int) -> list[Text]:
    """What stays on the screen at the end; nothing where no step was trained."""
    if not state.losses.points():
        return []
    lines = [*_head(state, columns), _steps(state, columns)]
    lines += _in_columns([_training(state, _half(columns)), _evaluation(state, _half(columns))], columns)
    lines += _in_columns([_speed(state, _half(columns)), _memory(state, _half(columns))], columns)
    return lines[:rows]


def _half(columns: int) -> int:
    """The width of a row where two stand side by side."""
    return columns if columns < _TWO_COLUMNS_FROM else columns // 2 - 1


def _in_columns(found: Sequence[Text | None], columns: int) -> list[Text]:
    """Rows that there are, two to a line where there is room."""
    rows = [row for row in found if row is not None]
    if columns < _TWO_COLUMNS_FROM or len(rows) < 2:
        return rows
    left, right = rows
    left.append(" " * (columns // 2 + 1 - left.cell_len))
    return [left.append_text(right)]


def _head(state: AttemptState, columns: int) -> list[Text]:
    """A line across the terminal with the names in it, and what is trained how."""
    begin = state.begin
    name, run_id = _printable(begin["run_name"]), begin["run_id"]
    line = Text().append("── ", "dim").append(name or run_id, "bold")
    if name not in ("", run_id):
        line.append(f"  {run_id}")
    if begin["attempt"] > 1:
        line.append(f"  attempt {begin['attempt']}")
    line.truncate(columns, overflow="ellipsis")
    workers = f"{format_workers(begin['num_workers'])} worker{'' if begin['num_workers'] == 1 else 's'}"
    precision = "fp32" if begin["mixed_precision"] == "no" else begin["mixed_precision"]
    facts = [
        _printable(begin["task"]),
        f"{workers} × {state.device}" if state.device else workers,
        f"ZeRO {begin['zero_stage']}",
        precision,
    ]
    how = " · ".join(facts)
    if line.cell_len + len(how) + 8 <= columns:
        return [_ruled(line.append(f"  {how}"), columns)]
    return [_ruled(line, columns), _row("", facts, columns, " · ")]


def _ruled(line: Text, columns: int) -> Text:
    room = columns - line.cell_len - 1
    return line.append(f" {'─' * room}", "dim") if room > 0 else line


def _steps(state: AttemptState, columns: int) -> Text:
    share = min(1.0, state.step / state.total_steps)
    before = step_of(state).removeprefix("step ")
    # Padded, so that the bar keeps its length while the times change theirs.
    after = [f"{int(100 * share):3}%", format_duration(state.elapsed_s).rjust(7)]
    if state.ended_s is None:
        after.append(time_left(state).ljust(len("ETA 59m 59s")))
    line = _label("step").append(before, "bold")
    while len(after) > 1 and columns - line.cell_len - len("  ".join(after)) - 4 < 8:
        after.pop()
    room = columns - line.cell_len - len("  ".join(after)) - 4
    if room >= 4:
        line.append("  ").append_text(_bar(share, room, _bar_style(state)))
    line.append(f"  {'  '.join(after)}")
    return _cut(line, columns)


def _bar_style(state: AttemptState) -> str:
    if state.result is None:
        return "cyan"
    return {ExitCode.SUCCEEDED: "green", ExitCode.CANCELLED: "yellow", ExitCode.PREEMPTED: "yellow"}.get(
        state.result["exit_code"], "red"
    )


def _bar(share: float, width: int, style: str) -> Text:
    done = int(share * width)
    return Text().append("━" * done, style).append("─" * (width - done), "dim")


def _doing(state: AttemptState, columns: int) -> list[Text]:
    """The phase, and how far the data is."""
    now_s = state.clock()
    seconds = format_duration(now_s - state.phase_began_s) if state.phase else ""
    message = _printable(state.message.partition("\n")[0]) or "starting"
    spinner = _SPINNER[int(now_s / _REFRESH_INTERVAL_S) % len(_SPINNER)]
    lines = [_cut(Text().append(f"{spinner} ", "cyan").append(message).append(f"  {seconds}", "dim"), columns)]
    if (preparation := state.preparation) is not None:
        line = Text(f"  {_printable(preparation.stage)}")
        if preparation.share is not None:
            line.truncate(max(8, columns - 20), overflow="ellipsis")
            room = min(60, columns - line.cell_len - 8)
            line.append("  ").append_text(_bar(preparation.share, max(0, room), "cyan"))
            line.append(f"  {preparation.share:.0%}")
        lines.append(_cut(line, columns))
        if preparation.amounts:
            lines.append(_cut(Text(f"  {_joined(preparation.amounts, columns - 2)}"), columns))
    return lines


def _training(state: AttemptState, columns: int) -> Text | None:
    if not (told := measures(state.values, "train/loss")):
        return None
    line = _label("train").append(told[0], _loss_style(state, "train/loss"))
    others = "".join(f"  {other}" for other in measures(state.values, "learning_rate", "grad_norm"))
    if line.cell_len + len(others) + 2 + _MIN_SPARKLINE <= columns:
        line.append(others)
    room = min(_MAX_SPARKLINE, columns - line.cell_len - 2)
    if room >= _MIN_SPARKLINE:
        line.append("  ").append(sparkline(state.losses.points(), room), "cyan")
    return _cut(line, columns)


def _evaluation(state: AttemptState, columns: int) -> Text | None:
    if not (told := measures(state.values, "eval/loss")):
        return None
    line = _label("eval").append(told[0], _loss_style(state, "eval/loss"))
    others = [*measures(state.values, *EVALUATION_METRICS), f"at step {state.evaluated_step}"]
    return _with(line, others, columns)


def _loss_style(state: AttemptState, name: str) -> str:
    return "bold" if math.isfinite(state.values[name]) else "bold red"


def _speed(state: AttemptState, columns: int) -> Text | None:
    names = ("throughput/tokens_per_s", "throughput/samples_per_s", "throughput/device/mfu", "time/step_s")
    told = measures(state.values, *names)
    return _row("speed", told, columns) if told else None


def _memory(state: AttemptState, columns: int) -> Text | None:
    told = measures(state.values, "memory/peak_gib")
    if state.saved_step is not None:
        told.append(f"saved at step {state.saved_step}")
    return _row("memory", told, columns) if told else None


def _places(state: AttemptState, columns: int) -> list[Text]:
    curves, log = _printable(state.begin["tracking"] or ""), _printable(shown_path(state.begin["log"]))
    return [_row(label, [place], columns) for label, place in (("curves", curves), ("log", log)) if place]


def _stopping(state: AttemptState, columns: int) -> Text:
    if state.stopping:
        return _cut(Text(_printable(state.stopping.partition("\n")[0]), "yellow bold"), columns)
    return _row("Ctrl-C", ["finish the step, save, stop" if state.is_training else "stop"], columns)


def _row(label: str, parts: Sequence[str], columns: int, separator: str = "  ") -> Text:
    line = _label(label)
    return _cut(line.append(_joined(parts, columns - _LABEL_COLUMNS, separator)), columns)


def _label(name: str) -> Text:
    return Text().append(name.ljust(_LABEL_COLUMNS), "dim")


def _with(line: Text, parts: Sequence[str], columns: int) -> Text:
    more = _joined(parts, columns - line.cell_len - 2)
    return _cut(line.append(f"  {more}"), columns)


def _joined(parts: Sequence[str], columns: int, separator: str = "  ") -> str:
    """As many of the parts as there is room for, at least one."""
    shown = list(parts)
    while len(shown) > 1 and cell_len(separator.join(shown)) > columns - (2 if len(shown) < len(parts) else 0):
        shown.pop()
    return separator.join(shown) + (" …" if len(shown) < len(parts) else "")


def _cut(line: Text, columns: int) -> Text:
    line.truncate(max(1, columns), overflow="ellipsis")
    return line


def sparkline(points: Sequence[float], width: int) -> str:
    """The course of a curve in at most `width` characters; blank where it is not finite."""
    count = min(width, len(points))
    means = [finite_mean(points[i * len(points) // count : (i + 1) * len(points) // count]) for i in range(count)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    return "".join(
        " " if math.isnan(mean) else _LEVELS[round((mean - low) / span * (len(_LEVELS) - 1)) if span else 0]
        for mean in means
    )
