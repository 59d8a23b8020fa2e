"""Plain progress for people: one line for what happens, one for each point of the metrics, and a bar for the data."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from distlm.data.notes import PreparationProgress

_QUIET_S = 5.0
"""Work that takes less shows no bar."""
_LOG_INTERVAL_S = 10.0
_BAR_CHARACTERS = 20


class Progress:
    """Writes lines to `stream`. A closed stream (the terminal has gone) does not disturb the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total_steps = 0
        self._first: tuple[int, float] | None = None
        self._preparation = _PreparationPace()
        self._has_bar = False
        self._next_log_s = 0.0

    def say(self, text: str) -> None:
        self._write(f"{self._clear_bar()}{text}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            return

    def preparation(self, progress: PreparationProgress) -> None:
        """How far the data is: on a terminal one line that is written over, else a line every 10 s."""
        now = time.monotonic()
        text = self._preparation.describe(progress, now)
        if now - self._preparation.began_s < _QUIET_S:
            return
        if self._stream.isatty():
            columns = shutil.get_terminal_size().columns
            self._write(f"{self._clear_bar()}{text[: columns - 1]}")
            self._has_bar = True
        elif now >= self._next_log_s:
            self._next_log_s = now + _LOG_INTERVAL_S
            self.say(text)

    def end_preparation(self) -> None:
        self._write(self._clear_bar())

    def _clear_bar(self) -> str:
        """What removes the bar; nothing where there is none."""
        had_bar, self._has_bar = self._has_bar, False
        return "\r\x1b[K" if had_bar else ""

    def begin(self, total_steps: int) -> None:
        """An incarnation begins; training goes up to `total_steps`."""
        self._total_steps = total_steps
        self._first = None

    def metrics(self, step: int, values: dict[str, float]) -> None:
        head = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        if "train/loss" in values:
            self.say(
                f"{head}  loss {values['train/loss']:.4f}  {values['throughput/tokens_per_s']:,.0f} tokens/s  "
                f"ETA {self._eta(step)}"
            )
        elif "eval/loss" in values:
            self.say(
                f"{head}  eval loss {values['eval/loss']:.4f}  perplexity {values['eval/perplexity']:.1f}  "
                f"accuracy {values['eval/accuracy']:.3f}"
            )

    def _eta(self, step: int) -> str:
        """Time left at the pace so far, evaluation and saving included."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, started = self._first
        if step == first_step:
            return "-"
        return format_duration((now - started) / (step - first_step) * (self._total_steps - step))


class _PreparationPace:
    """Speed and time left of the stage that the preparation of the data is in."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self._stage = ""
        self._first: tuple[int, float] = (0, 0.0)
        self._seen = -1
        self._bytes_per_s = 0.0

    def describe(self, progress: PreparationProgress, now: float) -> str:
        if not self._stage:
            self.began_s = now
        if progress.stage != self._stage:
            self._stage, self._first, self._seen, self._bytes_per_s = (
                progress.stage,
                (progress.bytes_done, now),
                -1,
                0.0,
            )
        elif progress.bytes_done != self._seen and now > self._first[1]:  # else the same report is read again
            self._bytes_per_s = (progress.bytes_done - self._first[0]) / (now - self._first[1])
        self._seen = progress.bytes_done
        parts = []
        if progress.bytes_total:
            share = min(1.0, progress.bytes_done / progress.bytes_total)
            bar = ("#" * round(share * _BAR_CHARACTERS)).ljust(_BAR_CHARACTERS, ".")
            parts += [f"{share:4.0%} {bar} {progress.bytes_done / 1e6:,.0f} of {progress.bytes_total / 1e6:,.0f} MB"]
        elif progress.bytes_done:
            parts += [f"{progress.bytes_done / 1e6:,.0f} MB"]
        if progress.num_documents:
            parts += [f"{progress.num_documents:,} documents"]
        if progress.num_tokens:
            parts += [f"{progress.num_tokens:,} tokens"]
        if self._bytes_per_s:
            parts += [f"{self._bytes_per_s / 1e6:.1f} MB/s"]
            if progress.bytes_total:
                left = (progress.bytes_total - progress.bytes_done) / self._bytes_per_s
                parts += [f"ETA {format_duration(max(0.0, left))}"]
        return f"{progress.stage}: {', '.join(parts)}" if parts else progress.stage


def format_duration(seconds: float) -> str:
    """75 -> "1m 15s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
