"""What is known of an attempt from the events so far, and what follows from it: speed and time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distlm.view import Event


@dataclass
class AttemptState:
    """Updated by every event; all views show this."""

    clock: Callable[[], float] = time.monotonic
    phase: str = ""
    step: int = 0
    """The last step that was reported."""
    total_steps: int = 0
    values: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric."""
    losses: list[float] = field(default_factory=list)
    """Every train/loss so far, oldest first."""
    evaluated_step: int | None = None
    saved_step: int | None = None
    preparation: str = ""
    """How far the data is, in one line; empty when it is not being prepared."""
    preparation_began_s: float = 0.0
    _pace: _PreparationPace = field(default_factory=lambda: _PreparationPace())
    _first: tuple[int, float] | None = None

    def update(self, event: Event) -> None:
        match event["event"]:
            case "phase":
                self.phase, self.preparation = event["phase"], ""
            case "preparation":
                if not self.preparation:
                    self.preparation_began_s = self.clock()
                self.preparation = self._pace.describe(event, self.clock())
            case "training":
                self.step, self.total_steps, self._first = event["step"], event["total_steps"], None
            case "metrics":
                self._measured(event["step"], event["values"])

    def _measured(self, step: int, values: dict[str, float]) -> None:
        self.values.update(values)
        if "train/loss" in values:
            self.step = step
            self.losses.append(values["train/loss"])
            self._first = self._first or (step, self.clock())
        if "eval/loss" in values:
            self.evaluated_step = step
        if "time/checkpoint_s" in values:
            self.saved_step = step

    @property
    def remaining_s(self) -> float | None:
        """Time left at the pace so far, evaluation and saving included; None: not known yet."""
        if self._first is None or self.step == self._first[0]:
            return None
        first_step, began_s = self._first
        return (self.clock() - began_s) / (self.step - first_step) * (self.total_steps - self.step)


class _PreparationPace:
    """Speed and time left of the stage that the preparation of the data is in."""

    def __init__(self) -> None:
        self._stage = ""
        self._first: tuple[int, float] = (0, 0.0)
        self._seen = -1
        self._bytes_per_s = 0.0

    def describe(self, told: Event, now: float) -> str:
        done, total = told["bytes_done"], told["bytes_total"]
        if told["stage"] != self._stage:
            self._stage, self._first, self._seen, self._bytes_per_s = told["stage"], (done, now), -1, 0.0
        elif done != self._seen and now > self._first[1]:  # else the same report is read again
            self._bytes_per_s = (done - self._first[0]) / (now - self._first[1])
        self._seen = done
        parts = []
        if total:
            share = min(1.0, done / total)
            parts += [f"{share:4.0%} {bar(share)} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"]
        elif done:
            parts += [f"{done / 1e6:,.0f} MB"]
        if told["num_documents"]:
            parts += [f"{told['num_documents']:,} documents"]
        if told["num_tokens"]:
            parts += [f"{told['num_tokens']:,} tokens"]
        if self._bytes_per_s:
            parts += [f"{self._bytes_per_s / 1e6:.1f} MB/s"]
            if total:
                parts += [f"ETA {format_duration(max(0.0, (total - done) / self._bytes_per_s))}"]
        return f"{self._stage}: {', '.join(parts)}" if parts else self._stage


def bar(share: float, width: int = 20) -> str:
    """0.25 -> "#####..............." """
    return ("#" * round(share * width)).ljust(width, ".")


def format_duration(seconds: float) -> str:
    """75 -> "1m 15s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def training_line(state: AttemptState, values: dict[str, Any]) -> str:
    """The newest point of the training metrics in one line."""
    parts = [step_of(state), f"loss {values['train/loss']:.4f}"]
    if (tokens_per_s := values.get("throughput/tokens_per_s")) is not None:
        parts.append(f"{tokens_per_s:,.0f} tokens/s")
    if (mfu := values.get("throughput/device/mfu")) is not None:
        parts.append(f"MFU {mfu:.1%}")
    if (peak := values.get("memory/peak_gib")) is not None:
        parts.append(f"{peak:.2f} GiB")
    left = state.remaining_s
    parts.append(f"ETA {'-' if left is None else format_duration(left)}")
    return "  ".join(parts)


def evaluation_line(state: AttemptState, values: dict[str, Any]) -> str:
    return "  ".join(
        (
            step_of(state, state.evaluated_step),
            f"eval loss {values['eval/loss']:.4f}",
            f"perplexity {values['eval/perplexity']:.1f}",
            f"accuracy {values['eval/accuracy']:.3f}",
        )
    )


def step_of(state: AttemptState, step: int | None = None) -> str:
    """ "step  20/200"."""
    return f"step {state.step if step is None else step:>{len(str(state.total_steps))}}/{state.total_steps}"


def stop_message(count: int) -> str:
    """What the user is told at once who asks to stop for the `count`th time."""
    if count == 1:
        return "stopping: the step under way is finished and saved; Ctrl-C again stops now"
    return "stopping now" if count == 2 else "killing"
