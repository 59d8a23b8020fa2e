"""Show a recorded attempt again, in the view that this terminal gets: to demonstrate and to look at the views.

    distlm submit CONFIG --json > events.jsonl
    python benchmarks/replay_view.py events.jsonl [--speed 10] [--json]

Without a file: an attempt that is made up. Its numbers are those of no run.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from distlm.view import Event, View, decode_event
from distlm.view.choose import make_view

RUN_ID = "20260131-235959-3fa9c1"


def replay(events: Iterable[Event], view: View, speed: float) -> None:
    """Show the events at the pace of their times, `speed` times as fast; with infinity without any wait."""
    previous: datetime | None = None
    for event in events:
        now = datetime.fromisoformat(event["time"])
        if previous is not None:
            time.sleep(max(0.0, (now - previous).total_seconds()) / speed)
        previous = now
        view.show(event)


def made_up_attempt(total_steps: int = 600, step_s: float = 0.25, run_name: str = "bert-small-peps") -> Iterator[Event]:
    """The events of an attempt such as two GPUs would have."""
    now = datetime.fromisoformat("2026-01-31T23:59:59+00:00")
    noise = random.Random(0)

    def event(kind: str, after_s: float = 0.0, **fields: Any) -> dict[str, Any]:
        nonlocal now
        now += timedelta(seconds=after_s)
        return {"event": kind, "time": now.isoformat(timespec="milliseconds"), **fields}

    folder = f"runs/{RUN_ID}"
    yield event(
        "begin", run_id=RUN_ID, run_name=run_name, attempt=2, folder=folder, log=f"{folder}/attempts/002/logs",
        task="masked-lm", num_workers=2, zero_stage=2, mixed_precision="bf16",
        tracking="distlm ui --runs-dir runs",
    )  # fmt: skip
    yield event("phase", 0.1, phase="ray", message="starting Ray")
    yield event("phase", 6, phase="prepare", message="preparing data, tokenizer and initial weights")
    for second in range(16):
        done = second * 28_000_000
        yield event(
            "preparation", 1, stage="tokenizing", bytes_done=done, bytes_total=420_000_000,
            num_documents=done // 5_200, num_tokens=done // 4,
        )  # fmt: skip
    yield event("note", 0.5, message="data: peps: 71.2% of the samples, 1.02 passes per epoch")
    yield event("note", message="data: 105,000,000 tokens in 820,312 samples; model: 28,763,648 parameters")
    yield event("training", 0, step=100, total_steps=total_steps, device="cuda")
    yield event("phase", phase="workers", message="starting 2 workers on cuda")
    yield event("warning", 5, message="MLflow does not answer (timed out); metrics are kept in the run's folder")
    for step in range(110, total_steps + 1, 10):
        loss = 2.1 + 7.8 * math.exp(-(step - 100) / 90) + noise.gauss(0, 0.04)
        speed = 182_000 + noise.gauss(0, 2_500)
        values = {
            "train/loss": loss, "learning_rate": 5e-4 * min(1, step / 150) * (1 - step / total_steps / 1.1),
            "grad_norm": abs(noise.gauss(0.9, 0.1)), "throughput/tokens_per_s": speed,
            "throughput/samples_per_s": speed / 128, "throughput/device/mfu": speed / 440_000,
            "time/step_s": step_s, "memory/peak_gib": 31.42, "epoch": step / 3204,
        }  # fmt: skip
        yield event("metrics", 10 * step_s, step=step, total_steps=total_steps, values=values)
        if step % 100 == 0:
            held_out = {"eval/loss": loss + 0.1, "eval/perplexity": math.exp(loss + 0.1), "eval/accuracy": 0.8 / loss}
            yield event("metrics", 1.5, step=step, total_steps=total_steps, values=held_out)
            yield event("metrics", 0.4, step=step, total_steps=total_steps, values={"time/checkpoint_s": 0.9})
    yield event("phase", 0.5, phase="export", message="writing the model")
    yield event("phase", 3, phase="upload", message="uploading the model to MLflow")
    yield event("result", 3, state="succeeded", exit_code=0, message="", problems=[], log=f"{folder}/attempts/002/logs")


def read_events(path: Path) -> Iterator[Event]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield decode_event(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path, nargs="?", help="JSON lines of distlm submit --json")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stops = 0

    def stop(*_: int | FrameType | None) -> None:
        nonlocal stops
        stops += 1
        view.stop_requested(stops)
        if stops == 3:
            raise SystemExit(130)

    with closing(make_view(options.json)) as view:
        signal.signal(signal.SIGINT, stop)
        replay(read_events(options.events) if options.events else made_up_attempt(), view, options.speed)


if __name__ == "__main__":
    main()
