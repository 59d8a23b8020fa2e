"""A map of a step: how its time divides into phases on each worker, and what share of the device's peak it reaches.

Times are wall-clock. On a GPU each phase of a profiled step waits for the device, so that its time is the device's
own; phases then do not overlap, and the steps take longer than others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

PHASES = {
    "data": "waiting for the batch",
    "forward": "forward pass without the head",
    "head": "prediction head and loss",
    "backward": "backward pass without communication",
    "reduction": "gradients and weights between workers",
    "optimizer": "clipping and AdamW without communication",
    "other": "host work between the phases",
}

_MARK = "distlm."
_COMMUNICATION = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")


@dataclass(frozen=True)
class StepMap:
    """Mean seconds of each of PHASES in the profiled steps, on one worker."""

    rank: int
    step_s: float
    phases_s: dict[str, float]


class StepProfiler:
    """Profiles the steps `steps` of a worker; outside of them its contexts do nothing.

    with profiler.step(s):
        with profiler.phase("data"): ...
        with profiler.phase("forward"): ...      # the head counts apart, from when `head` is called
        engine.backward(...); engine.step()      # are measured by themselves
    """

    def __init__(self, steps: range, engine: DeepSpeedEngine, head: nn.Module | None, device: torch.device) -> None:
        self.steps = steps
        self._engine, self._head, self._device = engine, head, device
        self._profile: profile | None = None
        self._open_head: record_function | None = None
        self._undo: list[Callable[[], None]] = []
        self._in_step = False

    @property
    def is_done(self) -> bool:
        """The last of the steps has just been profiled; ask for `result` then."""
        return self._profile is not None and not self._undo

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        if step not in self.steps:
            yield
            return
        if self._profile is None:
            self._begin()
        self._in_step = True
        with self._marked("step"):
            yield
        self._in_step = False
        if step == self.steps[-1]:
            self._end()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._marked(name) if self._in_step else nullcontext()

    @contextmanager
    def _marked(self, name: str) -> Iterator[None]:
        with record_function(_MARK + name):
            yield
            self._wait_for_device()
            if self._open_head:
                self._open_head.__exit__(None, None, None)
                self._open_head = None

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(self) -> None:
        gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._profile.__enter__()
        for name, mark in (("backward", "backward"), ("step", "optimizer")):
            self._undo.append(self._measure_method(name, mark))
        if self._head is not None:
            self._undo.append(self._head.register_forward_pre_hook(self._head_begins, prepend=True).remove)

    def _measure_method(self, name: str, mark: str) -> Callable[[], None]:
        method = getattr(self._engine, name)

        def measured(*arguments: Any, **keywords: Any) -> Any:
            with self.phase(mark):
                return method(*arguments, **keywords)

        setattr(self._engine, name, measured)
        return lambda: delattr(self._engine, name)

    def _head_begins(self, *_: Any) -> None:
        if not self._in_step:  # evaluation between two profiled steps
            return
        self._wait_for_device()
        self._open_head = record_function(_MARK + "head")
        self._open_head.__enter__()

    def _end(self) -> None:
        assert self._profile is not None
        self._profile.__exit__(None, None, None)
        while self._undo:
            self._undo.pop()()

    def result(self, trace: Path) -> StepMap:
        """The map of this worker's steps; also writes them as a trace for chrome://tracing or Perfetto."""
        assert self._profile is not None
        trace.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(trace))
        spans = _spans(self._profile)
        self._profile = None
        return step_map(dist.get_rank(), spans, len(self.steps))


Span = tuple[float, float]
"""Begin and end in seconds."""


def _spans(measured: profile) -> dict[str, list[Span]]:
    """The spans of our own marks by their names, and those of the communication."""
    spans: dict[str, list[Span]] = {"communication": []}
    for event in measured.events() or []:
        span = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if event.name.startswith(_MARK):
            if event.device_type.name == "CPU":
                spans.setdefault(event.name.removeprefix(_MARK), []).append(span)
        elif event.name.startswith(_COMMUNICATION):
            spans["communication"].append(span)
    return spans


def step_map(rank: int, spans: dict[str, list[Span]], num_steps: int) -> StepMap:
    """The map that follows from the spans of the phases, "step" and "communication" of `num_steps` steps."""

    def seconds(name: str) -> float:
        return sum(end - begin for begin, end in spans.get(name, []))

    communication = _union(spans.get("communication", []))
    reduction = {name: _overlap(_union(spans.get(name, [])), communication) for name in ("backward", "optimizer")}
    totals = {
        "data": seconds("data"),
        "forward": seconds("forward") - seconds("head"),
        "head": seconds("head"),
        "backward": seconds("backward") - reduction["backward"],
        "reduction": sum(reduction.values()),
        "optimizer": seconds("optimizer") - reduction["optimizer"],
    }
    totals["other"] = seconds("step") - sum(totals.values())
    return StepMap(rank, seconds("step") / num_steps, {name: total / num_steps for name, total in totals.items()})


def _union(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _overlap(some: list[Span], others: list[Span]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)


def describe(maps: list[StepMap], steps: range, flops_per_step: float, peak_flops: float) -> str:
    """The maps of all workers as Markdown. `flops_per_step`: of one worker, forward and backward; `peak_flops`: what
    its device reaches in large matrix products, per second."""
    slowest = max(maps, key=lambda worker: worker.step_s)
    lines = [
        f"# Steps {steps[0]} to {steps[-1]}",
        "",
        f"{slowest.step_s:.4f} s per step on the slowest worker, rank {slowest.rank}. Model FLOPs utilisation: "
        f"{flops_per_step / slowest.step_s / peak_flops:.1%} of {peak_flops / 1e12:.3g} TFLOP/s, measured on this "
        "device in large matrix products. Profiled steps are slower than others.",
        "",
        "| phase | mean ms | share | fastest worker, ms | slowest worker, ms | |",
        "|---|---|---|---|---|---|",
    ]
    mean_step_s = sum(worker.step_s for worker in maps) / len(maps)
    for name, meaning in PHASES.items():
        times_s = [worker.phases_s[name] for worker in maps]
        mean_s = sum(times_s) / len(times_s)
        lines.append(
            f"| {name} | {1e3 * mean_s:.1f} | {mean_s / mean_step_s:.1%} | {1e3 * min(times_s):.1f} | "
            f"{1e3 * max(times_s):.1f} | {meaning} |"
        )
    lines.append(f"| all | {1e3 * mean_step_s:.1f} | | | {1e3 * slowest.step_s:.1f} | |")
    return "\n".join(lines) + "\n"
