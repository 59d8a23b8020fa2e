"""Plain progress for people: one line for what happens, one for each point of the metrics."""

from __future__ import annotations

import time
from typing import TextIO


class Progress:
    """Writes lines to `stream`. A closed stream (the terminal has gone) does not disturb the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total_steps = 0
        self._first: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        try:
            print(text, file=self._stream, flush=True)
        except OSError:
            return

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


def format_duration(seconds: float) -> str:
    """75 -> "1m 15s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
