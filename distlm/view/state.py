"""What is known of an attempt from the events so far, what follows from it (speed, time left), and how it reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distlm.console import shown_path
from distlm.view import Event

_MAX_POINTS = 512


@dataclass
class AttemptState:
    """Updated by every event; all views show this. Times are those of `clock`."""

    clock: Callable[[], float] = time.monotonic
    begin: Event = field(default_factory=dict)
    """The event of that name; empty before it."""
    began_s: float = 0.0
    device: str = ""
    """cpu or cuda; empty until it is known."""
    phase: str = ""
    message: str = ""
    """What is being done in this phase."""
    phase_began_s: float = 0.0
    is_training: bool = False
    """Steps are reported, and no other phase has begun since."""
    step: int = 0
    """The last step that was reported."""
    total_steps: int = 0
    values: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric."""
    losses: Curve = field(default_factory=lambda: Curve())
    """Every train/loss so far."""
    evaluated_step: int | None = None
    saved_step: int | None = None
    preparation: Preparation | None = None
    """How far the data is; None when it is not being prepared."""
    preparation_began_s: float = 0.0
    stopping: str = ""
    """What happens now that somebody has asked to stop; empty: nobody has."""
    result: Event | None = None
    ended_s: float | None = None
    _pace: _PreparationPace = field(default_factory=lambda: _PreparationPace())
    _first: tuple[int, float] | None = None
    _last: tuple[int, float] = (0, 0.0)

    def update(self, event: Event) -> None:
        now = self.clock()
        self.device = event.get("device", self.device)
        match event["event"]:
            case "begin":
                self.begin, self.began_s = event, now
            case "phase":
                self.phase, self.message, self.phase_began_s = event["phase"], event["message"], now
                self.preparation, self.is_training = None, False
            case "preparation":
                if self.preparation is None:
                    self.preparation_began_s = now
                self.preparation = self._pace.describe(event, now)
            case "training":
                self.step, self.total_steps, self._first = event["step"], event["total_steps"], None
                self.is_training = False
            case "metrics":
                self._measured(event["step"], event["values"], now)
            case "stopping":
                self.stopping = self.stopping or event["message"]
            case "result":
                self.result, self.ended_s = event, now

    def _measured(self, step: int, values: Mapping[str, float], now: float) -> None:
        self.values.update(values)
        if "train/loss" in values:
            self.step, self.is_training = step, True
            self.losses.add(values["train/loss"])
            self._last = (step, now)
            self._first = self._first or self._last
        if "eval/loss" in values:
            self.evaluated_step = step
        if "time/checkpoint_s" in values:
            self.saved_step = step

    @property
    def elapsed_s(self) -> float:
        """Since the attempt began, up to its end."""
        return (self.clock() if self.ended_s is None else self.ended_s) - self.began_s

    @property
    def remaining_s(self) -> float | None:
        """Time left at the pace so far, evaluation and saving included; None: not known yet."""
        if self._first is None or self._last[0] == self._first[0]:
            return None
        (first_step, first_s), (last_step, last_s) = self._first, self._last
        pace_s = (last_s - first_s) / (last_step - first_step)
        return max(0.0, pace_s * (self.total_steps - last_step) - (self.clock() - last_s))


class Curve:
    """A series of numbers of any length, kept as a limited number of means of equally many numbers each."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._per_mean = 1
        self._pending: list[float] = []

    def add(self, number: float) -> None:
        self._pending.append(number)
        if len(self._pending) == self._per_mean:
            self._means.append(finite_mean(self._pending))
            self._pending = []
        if len(self._means) == _MAX_POINTS:
            self._means = [finite_mean(self._means[i : i + 2]) for i in range(0, _MAX_POINTS, 2)]
            self._per_mean *= 2

    def points(self) -> list[float]:
        """Oldest first. NaN: where no number was finite."""
        return self._means + ([finite_mean(self._pending)] if self._pending else [])


def finite_mean(numbers: Sequence[float]) -> float:
    """Of those that are finite; NaN: none is."""
    finite = [number for number in numbers if math.isfinite(number)]
    return sum(finite) / len(finite) if finite else math.nan


@dataclass(frozen=True)
class Preparation:
    """How far the preparation of the data is."""

    stage: str
    share: float | None
    """What is done of the stage, from 0 to 1; None: not known."""
    amounts: tuple[str, ...]
    """What is done and how fast, such as "5 of 100 MB"."""

    def line(self) -> str:
        done = "" if self.share is None else f"{self.share:4.0%} {bar(self.share)} "
        return f"{self.stage}: {done}{', '.join(self.amounts)}" if self.amounts else self.stage


class _PreparationPace:
    """Speed and time left of the stage that the preparation of the data is in."""

    def __init__(self) -> None:
        self._stage = ""
        self._first: tuple[int, float] = (0, 0.0)
        self._seen = -1
        self._bytes_per_s = 0.0

    def describe(self, told: Event, now: float) -> Preparation:
        done, total = told["bytes_done"], told["bytes_total"]
        if told["stage"] != self._stage:
            self._stage, self._first, self._seen, self._bytes_per_s = told["stage"], (done, now), -1, 0.0
        elif done != self._seen and now > self._first[1]:  # else the same report is read again
            self._bytes_per_s = (done - self._first[0]) / (now - self._first[1])
        self._seen = done
        amounts = []
        if total:
            amounts += [f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"]
        elif done:
            amounts += [f"{done / 1e6:,.0f} MB"]
        if told["num_documents"]:
            amounts += [f"{told['num_documents']:,} documents"]
        if told["num_tokens"]:
            amounts += [f"{told['num_tokens']:,} tokens"]
        if self._bytes_per_s:
            amounts += [f"{self._bytes_per_s / 1e6:.1f} MB/s"]
            if total:
                amounts += [f"ETA {format_duration(max(0.0, (total - done) / self._bytes_per_s))}"]
        return Preparation(self._stage, min(1.0, done / total) if total else None, tuple(amounts))


# --- how it reads ----------------------------------------------------------------------------------------------------

_FORMATS = {
    "train/loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad norm {:.3g}",
    "throughput/tokens_per_s": "{:,.0f} tokens/s",
    "throughput/samples_per_s": "{:,.1f} samples/s",
    "throughput/device/mfu": "MFU {:.1%}",
    "time/step_s": "{:.3g} s/step",
    "memory/peak_gib": "{:.2f} GiB",
    "eval/loss": "loss {:.4f}",
    "eval/perplexity": "perplexity {:.1f}",
    "eval/accuracy": "accuracy {:.3f}",
    "eval/f1": "F1 {:.4f}",
    "eval/f1_micro": "micro F1 {:.4f}",
    "eval/pearson": "Pearson {:.4f}",
    "eval/mse": "MSE {:.4g}",
}

EVALUATION_METRICS = tuple(name for name in _FORMATS if name.startswith("eval/") and name != "eval/loss")
"""What is shown of an evaluation besides the loss, as far as the task has it."""


def measures(values: Mapping[str, float], *names: str) -> list[str]:
    """ "1,234 tokens/s" and so on: those of the named metrics that there are."""
    return [_FORMATS[name].format(values[name]) for name in names if name in values]


def lines_of(state: AttemptState, event: Event) -> list[str]:
    """What an event adds to the log, in every view."""
    match event["event"]:
        case "begin":
            attempt = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
            return [f"run {event['run_id']} in {shown_path(event['folder'])}{attempt}"]
        case "phase" | "note":
            return [event["message"]]
        case "stopping":  # not news to who has asked here
            return [event["message"]] if state.stopping == event["message"] else []
        case "warning":
            return [f"warning: {event['message']}"]
        case "metrics" if "eval/loss" in event["values"]:
            return [evaluation_line(state, event["values"])]
    return []


def training_line(state: AttemptState, values: Mapping[str, float]) -> str:
    """The newest point of the training metrics in one line."""
    names = ("train/loss", "throughput/tokens_per_s", "throughput/device/mfu", "memory/peak_gib")
    return "  ".join((step_of(state), *measures(values, *names), time_left(state)))


def evaluation_line(state: AttemptState, values: Mapping[str, float]) -> str:
    told = measures(values, "eval/loss", *EVALUATION_METRICS)
    return f"{step_of(state, state.evaluated_step)}  eval {'  '.join(told)}"


def step_of(state: AttemptState, step: int | None = None) -> str:
    """ "step  20/200"."""
    return f"step {state.step if step is None else step:>{len(str(state.total_steps))}}/{state.total_steps}"


def time_left(state: AttemptState) -> str:
    """ "ETA 1m 15s"."""
    left = state.remaining_s
    return f"ETA {'-' if left is None else format_duration(left)}"


def stop_message(count: int, is_training: bool) -> str:
    """What the user is told at once who asks to stop for the `count`th time."""
    if count == 1 and not is_training:
        return "stopping"
    if count == 1:
        return "stopping: the step under way is finished and saved; Ctrl-C again stops now"
    return "stopping now" if count == 2 else "killing"


def bar(share: float, width: int = 20) -> str:
    """0.25 -> "#####..............." """
    return ("#" * round(share * width)).ljust(width, ".")


def format_workers(num_workers: int | Sequence[int]) -> str:
    """4 -> "4", and [1, 4] of an elastic run -> "1-4"."""
    return str(num_workers) if isinstance(num_workers, int) else "-".join(map(str, num_workers))


def format_duration(seconds: float) -> str:
    """75 -> "1m 15s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
