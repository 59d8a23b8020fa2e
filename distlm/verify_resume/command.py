"""Runs the straight run and the run in pieces, and tells the user how they compare.

Each piece is an attempt like any other: the first is what `distlm submit` does, the others are what `distlm resume`
does, with a worker that is killed in all but the last.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from distlm.config.attempt import begin_attempt, changed_config, create_run
from distlm.config.load import LoadedConfig, load_config
from distlm.config.resolve import legal_world_sizes, possible_world_sizes
from distlm.config.schema import RunConfig
from distlm.console import say
from distlm.devices import visible_gpu_count
from distlm.errors import (
    Cancelled,
    DistlmError,
    ExitCode,
    InfrastructureError,
    InputError,
    Problem,
    TrainingError,
)
from distlm.launchers.local import LocalLauncher, require_packages
from distlm.limits import available_cpus
from distlm.run_folder import RunFolder, new_run_id
from distlm.stop_count import interrupted_by_signals
from distlm.verify_resume.compare import Piece, Verdict, compare
from distlm.verify_resume.evidence import compare_states, read_device, read_piece, was_killed
from distlm.verify_resume.report import table, verdict_text
from distlm.view.plain import PlainView

_MAX_EVAL_SAMPLES = 256


@dataclass(frozen=True)
class PlannedPiece:
    """One attempt: it continues after the checkpoint of step `first_step` - 1."""

    workers: int
    first_step: int
    last_step: int
    """Trained to its end."""
    is_killed: bool
    """In the step after the last one; otherwise it reaches the end of the run."""


@dataclass(frozen=True)
class Plan:
    """Piece i (from 0) begins after checkpoint i, and is killed when checkpoint i + 2 would be next: as many steps as
    possible are lost and trained again."""

    steps: int
    save_steps: int
    pieces: tuple[PlannedPiece, ...]

    @property
    def straight(self) -> PlannedPiece:
        return PlannedPiece(self.pieces[0].workers, 1, self.steps, is_killed=False)


def make_plan(steps: int, sizes: Sequence[int]) -> Plan:
    """Raises InputError where there are too few pieces, or too few steps for them."""
    count = len(sizes)
    if count < 2:
        raise InputError(Problem("a resume takes two sizes or more, such as 2,2,1", "--workers"))
    if steps < 2 * count:
        raise InputError(Problem(f"{count} pieces take {2 * count} steps or more", "--steps", str(steps)))
    save_steps = max(2, steps // (count + 1))
    pieces = [
        PlannedPiece(size, number * save_steps + 1, (number + 2) * save_steps - 1, is_killed=True)
        for number, size in enumerate(sizes[:-1])
    ]
    last = PlannedPiece(sizes[-1], (count - 1) * save_steps + 1, steps, is_killed=False)
    return Plan(steps, save_steps, (*pieces, last))


def verify_resume(config: Path, overrides: list[str], steps: int, sizes: list[int] | None, keep: bool) -> ExitCode:
    """Run and compare both, and print the verdict: SUCCEEDED if the resume is correct, FAILED if not.

    Raises:
        DistlmError: a run failed for another reason.
    """
    launcher = LocalLauncher()
    users = load_config(config, overrides, launcher.check_here).config
    is_given, sizes = sizes is not None, sizes or default_sizes(users)
    plan = make_plan(steps, sizes)
    require_packages()
    with folder_for_runs(Path(users.runs_dir), keep) as folder:
        overrides = [*overrides, *rehearsal_overrides(users, plan, folder.path)]
        for size in sorted(set(sizes)):  # what can be told from here is refused here, and not after the other runs
            load_config(config, [*overrides, f"resources.num_workers={size}"], launcher.check_here)
        loaded = load_config(config, [*overrides, f"resources.num_workers={sizes[0]}"], launcher.check_here)
        say(
            f"verify-resume: {steps} steps straight on {sizes[0]} workers, then in {len(sizes)} pieces on "
            f"{_joined(sizes)} workers",
        )
        if len(set(sizes)) == 1 and not is_given:
            say(f"another number of workers is not tried: {_why_one_size(users)}")
        verdict = _rehearse(launcher, loaded, plan, folder.path)
        say()
        for line in table(verdict):
            say(line)
        say(verdict_text(verdict))
        folder.keep |= not verdict.is_correct
    return ExitCode.SUCCEEDED if verdict.is_correct else ExitCode.FAILED


# --- what to run -----------------------------------------------------------------------------------------------------


def default_sizes(config: RunConfig) -> list[int]:
    """The config's number of workers twice (of a range the largest that this machine has room for), then another legal
    one that there is room for: the next smaller one, else the next larger one."""
    possible, room = possible_world_sizes(config), _room(config)
    workers = max((size for size in possible if size <= room), default=possible[0])
    sizes = _legal_sizes(config)
    smaller = [size for size in sizes if size < workers]
    larger = [size for size in sizes if workers < size <= room]
    return [workers, workers, *(smaller[-1:] or larger[:1])]


def _legal_sizes(config: RunConfig) -> list[int]:
    return legal_world_sizes(config.training.global_train_batch_size // config.training.per_device_train_batch_size)


def _room(config: RunConfig) -> int:
    """Workers that there is a device for, as far as can be told from here: of another cluster nothing is known."""
    if os.environ.get("RAY_ADDRESS"):
        return 0
    gpus = visible_gpu_count()
    if config.resources.device == "cpu" or gpus == 0:
        return available_cpus() // (config.resources.cpus_per_worker or 1)
    return gpus or 0


def _why_one_size(config: RunConfig) -> str:
    sizes = _legal_sizes(config)
    room = f"this machine has room for {_room(config)}"
    if os.environ.get("RAY_ADDRESS"):
        room = "how many the Ray cluster has room for is not known here (--workers)"
    return f"the micro batches of a step divide over {_joined(sizes)}, and {room}"


def rehearsal_overrides(config: RunConfig, plan: Plan, runs_dir: Path) -> list[str]:
    """What both runs have otherwise than the user's config: their length, their records, and no trackers."""
    training = config.training
    overrides = {
        "runs_dir": str(runs_dir),
        "resources.target": "local",
        "tracking.report_to": [],
        "tracking.log_model": False,
        "tracking.registered_model_name": None,
        "training.max_steps": plan.steps,
        "training.num_train_epochs": None,
        "training.logging_steps": 1,
        "training.save_steps": plan.save_steps,
        "training.save_total_limit": None,
        "training.eval_steps": None,
        "training.max_eval_samples": min(training.max_eval_samples or _MAX_EVAL_SAMPLES, _MAX_EVAL_SAMPLES),
    }
    if training.warmup_steps > plan.steps:
        overrides["training.warmup_steps"] = plan.steps // 2  # so that the rate both rises and falls
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]


# --- running ---------------------------------------------------------------------------------------------------------


def _rehearse(launcher: LocalLauncher, loaded: LoadedConfig, plan: Plan, runs_dir: Path) -> Verdict:
    """Both runs, then the comparison of what they have left."""
    count = len(plan.pieces) + 1
    straight_run, run = RunFolder(runs_dir / new_run_id()), RunFolder(runs_dir / new_run_id())
    say(f"\n[1/{count}] straight: steps 1 to {plan.steps} on {plan.straight.workers} workers")
    create_run(loaded, straight_run)
    straight = _attempt(launcher, loaded, straight_run, plan.straight)
    create_run(loaded, run)
    pieces = []
    for number, planned in enumerate(plan.pieces, 1):
        end = f"killed in step {planned.last_step + 1}" if planned.is_killed else f"to step {planned.last_step}"
        say(
            f"\n[{number + 1}/{count}] piece {number}: from step {planned.first_step} on {planned.workers} workers, "
            f"{end}",
        )
        pieces.append(_attempt(launcher, loaded, run, planned))
    is_deterministic = read_device(straight_run.attempts()[-1]) == "cpu"
    states = compare_states(straight_run, run)
    return compare(straight, pieces, states, loaded.config.training.mixed_precision, is_deterministic)


def _attempt(launcher: LocalLauncher, loaded: LoadedConfig, run: RunFolder, planned: PlannedPiece) -> Piece:
    """Submit or resume the run, wait for its end, and read what it has left."""
    changes: list[str] = []
    overrides = [f"resources.num_workers={planned.workers}"]
    if run.attempts():
        loaded, changes = changed_config(run, overrides, launcher.check_here)
    kill_in_step = planned.last_step + 1 if planned.is_killed else None
    attempt = begin_attempt(loaded, run, overrides, changes=changes, record_samples=True, kill_in_step=kill_in_step)
    result = launcher.run(launcher.build(loaded.config, run), attempt, PlainView(sys.stdout))
    code = ExitCode(result["exit_code"])
    if code == ExitCode.INFRASTRUCTURE and planned.is_killed and was_killed(attempt):
        say(f"a worker was killed in step {kill_in_step}, as planned")
    elif code != ExitCode.SUCCEEDED:
        raise_failure(result)
    elif planned.is_killed:
        raise InfrastructureError(f"no worker was killed in step {kill_in_step}; see {attempt.path}")
    return read_piece(attempt, planned.workers, planned.first_step, planned.last_step)


_FAILURES: dict[ExitCode, Callable[[str], DistlmError]] = {
    ExitCode.FAILED: TrainingError,
    ExitCode.BAD_INPUT: InputError,
    ExitCode.INFRASTRUCTURE: InfrastructureError,
}


def raise_failure(result: Mapping[str, Any]) -> NoReturn:
    """Pass on how an attempt ended otherwise than planned: `result` is the content of its result.json."""
    code = ExitCode(result["exit_code"])
    if result["problems"]:
        raise InputError(*map(Problem.from_json, result["problems"]))
    if code in (ExitCode.CANCELLED, ExitCode.PREEMPTED):
        raise Cancelled("stopped on request; resume was not verified")
    raise _FAILURES[code](f"resume was not verified, because a run failed: {result['message']}; see {result['log']}")


# --- where -----------------------------------------------------------------------------------------------------------


@dataclass
class _Folder:
    path: Path
    keep: bool


@contextmanager
def folder_for_runs(runs_dir: Path, keep: bool) -> Iterator[_Folder]:
    """A folder in the user's runs_dir that shares its cache, so that the data is tokenised once. It stays, and is
    named, if it is to be kept or if a run has failed in it; it goes if the user stops it all or if the input is bad,
    unless that comes out when runs are through already."""
    folder = _Folder(runs_dir.absolute() / f"verify-resume-{new_run_id()}", keep)
    cache = RunFolder(runs_dir.absolute() / "any").cache
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder.path.mkdir()
        RunFolder(folder.path / "any").cache.symlink_to(cache)
    except OSError as error:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise InputError(
            Problem(f"cannot make a folder for runs: {error.strerror}", "runs_dir", str(runs_dir))
        ) from None
    try:
        with interrupted_by_signals():
            yield folder
    except (Cancelled, KeyboardInterrupt):
        raise
    except InputError:
        folder.keep |= any(folder.path.glob("*/attempts/*/result.json"))
        raise
    except BaseException:
        folder.keep = True
        raise
    finally:
        if folder.keep:
            say(f"the runs are in {os.path.relpath(folder.path)}")
        else:
            shutil.rmtree(folder.path, ignore_errors=True)


def _joined(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
