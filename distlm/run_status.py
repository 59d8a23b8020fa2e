"""The state of a run and of its attempts, from the files of its folder alone.

    starting        begun less than a minute ago; the controller has not taken the lease yet
    running         a controller holds the lease
    succeeded, failed, bad_input, infrastructure, preempted, cancelled      what result.json says (see distlm.errors)
    lost            no result, and nobody holds the lease: the controller was killed, or never came up
    unknown         result.json is damaged

A folder may be half made, or damaged: what is known is told, and what is not is named in `damaged`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from distlm.config.attempt import Attempt
from distlm.config.load import with_overrides
from distlm.errors import DistlmError, ExitCode
from distlm.metrics_file import read_backwards
from distlm.run_folder import AttemptFolder, RunFolder, lease_holder, process_name, read_json, read_yaml

_STARTING_S = 60.0
"""An attempt that has no controller after that long gets none any more."""
_ENDED_STATES = {code.name.lower() for code in ExitCode}

_T = TypeVar("_T")


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt. None: not known."""

    number: int
    state: str
    target: str | None = None
    num_workers: int | list[int] | None = None
    """[MIN, MAX] of an elastic run."""
    zero_stage: int | None = None
    started_s: float | None = None
    """Seconds since the epoch."""
    ended_s: float | None = None
    """None while it lasts; of a lost attempt, its last sign of life."""
    exit_code: int | None = None
    cause: str | None = None
    """Its class, in the words of distlm.errors.Cause."""
    message: str = ""
    """The first failure."""
    log: Path | None = None
    result: dict[str, Any] = field(default_factory=dict)
    """What result.json holds; empty: nothing, or it is damaged."""

    @property
    def duration_s(self) -> float | None:
        if self.started_s is None:
            return None
        return max(0.0, (time.time() if self.ended_s is None else self.ended_s) - self.started_s)


@dataclass(frozen=True)
class NewestMetrics:
    """The last point of the training metrics, and of the evaluation's, that no restore has superseded."""

    step: int | None = None
    """The last step that is known to be done."""
    train: dict[str, float] = field(default_factory=dict)
    train_step: int | None = None
    eval: dict[str, float] = field(default_factory=dict)
    eval_step: int | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run. None: not known."""

    run: RunFolder
    state: str
    attempts: list[AttemptStatus]
    tree: dict[str, Any]
    """run.yaml as the newest attempt has changed it, `${VAR}` unexpanded; empty where it is damaged."""
    metrics: NewestMetrics
    total_steps: int | None
    damaged: list[str]

    @property
    def name(self) -> str | None:
        return _text(self.tree.get("name"))

    @property
    def step(self) -> int | None:
        return self.total_steps or self.metrics.step if self.state == "succeeded" else self.metrics.step

    @property
    def started_s(self) -> float | None:
        return self.attempts[0].started_s if self.attempts else self.run.created_s

    @property
    def duration_s(self) -> float | None:
        """Of all attempts together, without what lies between them."""
        known = [attempt.duration_s for attempt in self.attempts if attempt.duration_s is not None]
        return sum(known) if known else None


def run_status(run: RunFolder, *, with_evaluation: bool = True) -> RunStatus:
    """What the files of a run say now. Raises nothing for damaged ones.

    Args:
        with_evaluation: look for the newest evaluation, which may lie far back in a large file.
    """
    reader = _Reader(run)
    tree = reader.get(lambda: _mapping(read_yaml(run.run_yaml)), _nothing())
    folders = run.attempts()
    attempts = [_attempt_status(reader, folder, tree, is_newest=folder == folders[-1]) for folder in folders]
    state = attempts[-1].state if attempts else _state_without_attempt(run)
    for folder, status in zip(reversed(folders), reversed(attempts), strict=True):
        if status.state != "bad_input" and (attempt := reader.read_attempt(folder)) is not None:
            tree = reader.changed(tree, attempt.changes)
            break
    metrics = reader.get(lambda: newest_metrics(folders, with_evaluation=with_evaluation), NewestMetrics())
    total = reader.get(lambda: _total_steps(run, tree), None)
    return RunStatus(run, state, attempts, tree, metrics, total, list(dict.fromkeys(reader.damaged)))


class _Reader:
    """Reads what is there, and notes what is damaged."""

    def __init__(self, run: RunFolder) -> None:
        self.damaged: list[str] = []
        self._run = run
        self._attempts: dict[AttemptFolder, Attempt | None] = {}

    def get(self, read: Callable[[], _T], default: _T) -> _T:
        try:
            return read()
        except (DistlmError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            text = " ".join(str(error).split()) if isinstance(error, (DistlmError, OSError)) else repr(error)
            self.damaged.append(text.replace(f"{self._run.path}/", ""))
            return default

    def read_attempt(self, folder: AttemptFolder) -> Attempt | None:
        if folder not in self._attempts:
            self._attempts[folder] = self.get(lambda: Attempt.read(folder), None)
        return self._attempts[folder]

    def changed(self, tree: dict[str, Any], changes: list[str]) -> dict[str, Any]:
        return self.get(lambda: _mapping(with_overrides(tree, changes)), tree) if tree else {}


def _attempt_status(reader: _Reader, folder: AttemptFolder, tree: dict[str, Any], *, is_newest: bool) -> AttemptStatus:
    attempt = reader.read_attempt(folder)
    of_attempt = reader.changed(tree, attempt.changes) if attempt is not None else {}
    begun_s = _modified_s(folder.attempt_yaml, folder.path)
    has_result = folder.result_json.exists()
    result = reader.get(lambda: _mapping(read_json(folder.result_json)), _nothing()) if has_result else {}
    if has_result:
        told = _text(result.get("state"))
        state = told if told in _ENDED_STATES and told else "unknown"
        if result and state == "unknown":
            reader.damaged.append(f"{folder.result_json.relative_to(folder.path.parents[1])} names no known state")
    elif is_newest:
        state = _state_without_result(reader, folder, begun_s)
        if state == "lost" and folder.result_json.exists():  # it has ended in the meantime
            return _attempt_status(reader, folder, tree, is_newest=is_newest)
    else:
        state = "lost"
    ended_s = _seconds(result.get("ended_at"))
    if ended_s is None and state not in ("starting", "running"):
        ended_s = _modified_s(*((folder.result_json,) if has_result else (folder.metrics_jsonl, folder.controller_log)))
    return AttemptStatus(
        number=folder.number,
        state=state,
        target=_text(attempt.target) if attempt else None,
        num_workers=_workers(value_at(of_attempt, "resources", "num_workers")),
        zero_stage=_whole(value_at(of_attempt, "deepspeed", "zero_stage")),
        started_s=_seconds(result.get("started_at")) or begun_s,
        ended_s=ended_s,
        exit_code=_whole(result.get("exit_code")),
        cause=_text(result.get("cause")),
        message=_text(result.get("message")) or "",
        log=Path(log) if (log := _text(result.get("log"))) else folder.controller_log,
        result=result,
    )


def _state_without_result(reader: _Reader, folder: AttemptFolder, begun_s: float | None) -> str:
    run = RunFolder(folder.path.parents[1])
    holder = reader.get(lambda: lease_holder(run), None)
    handle = reader.get(lambda: _mapping(read_json(folder.handle_json) or {}), _nothing())
    controller = process_name(handle.get("pid", 0), str(handle.get("host", "")))
    # `distlm sync` holds the lease too. And a controller gives it back a moment before it writes its result.
    if (holder and (not handle or holder in (controller, "another process"))) or _is_alive(handle):
        return "running"
    is_young = begun_s is not None and time.time() - begun_s < _STARTING_S
    return "starting" if is_young and not handle else "lost"


def _state_without_attempt(run: RunFolder) -> str:
    begun_s = _modified_s(run.run_yaml, run.path)
    return "starting" if begun_s is not None and time.time() - begun_s < _STARTING_S else "lost"


def _is_alive(handle: dict[str, Any]) -> bool:
    """Whether the controller that wrote a handle.json runs on this machine."""
    if handle.get("host") != socket.gethostname():
        return False
    try:
        return b"distlm.controller" in Path(f"/proc/{int(handle['pid'])}/cmdline").read_bytes()
    except (OSError, ValueError, TypeError, KeyError):
        return False


def newest_metrics(attempts: Sequence[AttemptFolder], *, with_evaluation: bool = True) -> NewestMetrics:
    """Read from the end of the newest attempt's metrics.jsonl on, as far back as needed. Raises OSError."""
    step: int | None = None
    found: dict[str, tuple[int, dict[str, float]]] = {}
    wanted = ["train", "eval"] if with_evaluation else ["train"]
    last_valid: float = float("inf")
    needles = (b'"restore"', *(f'"{which}/loss"'.encode() for which in wanted))
    for folder in reversed(attempts):
        for message in read_backwards(folder.metrics_jsonl, *needles):
            if message["kind"] not in ("metrics", "restore") or not isinstance(message.get("step"), int):
                continue
            if message["kind"] == "metrics" and message["step"] > last_valid:
                continue  # trained again after a restore
            step = message["step"] if step is None else max(step, message["step"])
            if message["kind"] == "restore":
                last_valid = min(last_valid, message["step"])
                continue
            for which in wanted:
                if f"{which}/loss" in message["values"]:
                    found.setdefault(which, (message["step"], message["values"]))
            if len(found) == len(wanted):
                break
        if len(found) == len(wanted) or last_valid == 0:
            break
    train_step, train = found.get("train", (None, {}))
    eval_step, evaluation = found.get("eval", (None, {}))
    return NewestMetrics(step, train, train_step, evaluation, eval_step)


def _total_steps(run: RunFolder, tree: dict[str, Any]) -> int | None:
    if (max_steps := _whole(value_at(tree, "training", "max_steps"))) is not None:
        return max_steps
    prepared = read_json(run.init / "prepared.json")
    return _whole(prepared["total_steps"]) if prepared is not None else None


def _nothing() -> dict[str, Any]:
    return {}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a mapping is needed, not {type(value).__name__}")
    return value


def value_at(tree: Any, *keys: str) -> Any:
    """What stands in a tree, which may be damaged, under these keys; None: nothing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _workers(value: Any) -> int | list[int] | None:
    """A number of workers, or the two of an elastic run."""
    is_range = isinstance(value, list) and len(value) == 2 and None not in map(_whole, value)
    return value if is_range else _whole(value)


def _seconds(value: Any) -> float | None:
    """Seconds since the epoch of a time in ISO 8601."""
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _modified_s(*paths: Path) -> float | None:
    """When the first of them that is there was written last."""
    for path in paths:
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return None
