"""`distlm list` and `distlm status`: what runs there are, and how one is doing. The words for states are those of
distlm.run_status, and where a job waits for its turn, submitted or pending.

`--json` prints these keys; null: not known. Numbers are numbers, but NaN and infinities are strings, as in
metrics.jsonl. Times are UTC in ISO 8601.

    list: an array, newest first, of
        run_id, name, state, folder
        step, total_steps, loss     the last step that is done, and train/loss as it was reported last
        started_at, duration_s      of the first attempt; of all attempts together
        attempts                    how many
        damaged                     what could not be read, in words; empty: nothing

    status: the same, but `attempts` is an array, oldest first, of
            number, state, target, num_workers, zero_stage, started_at, ended_at, duration_s, exit_code, cause, message,
            log, retries; num_workers is [MIN, MAX] of an elastic run; retries are the failures that it went on after,
            each with incarnation, cause, rank, host, message, step, from_step, failed_at
        and further
        task, model                 its type; where it comes from
        metrics                     {"train": {"step", "values"}, "eval": ...}; each null before its first point
        checkpoints                 steps, newest first, of those that are whole as far as sizes tell
        last_good_step              the checkpoint that a resume continues
        log, model_folder           files; model_folder is null before there is one
        tracking_uri, mlflow_run_id without secrets; null: not recorded in MLflow, or nothing was sent yet
        job                         of a target with a queue: {"target", "id", "state", "target_state", "reason",
                                    "restarts"}; null: the newest attempt has none. The state is one of
                                    distlm.launchers.base.JobState, and null where the files tell enough without it
        next                        commands that may be wanted now, the likeliest first
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

from distlm.checkpoint.listing import list_checkpoints
from distlm.checkpoint.store import CheckpointStore
from distlm.commands.find import find_run
from distlm.config.load import expanded
from distlm.console import printable, say, shown_path
from distlm.errors import DistlmError, ExitCode, InputError
from distlm.launchers.base import Job, JobState, JobStatus
from distlm.launchers.jobs import KnownJob, end_if_final, find_job, tell_target_of_end
from distlm.metrics_file import finite, read_backwards
from distlm.mlflow_store import choose_tracking_uri, mlflow_run_id
from distlm.outcome import Retry, on_rank
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder, runs_in
from distlm.run_status import AttemptStatus, RunStatus, run_status, value_at
from distlm.view.ending import command, next_steps, what_happened
from distlm.view.state import EVALUATION_METRICS, format_duration, format_workers
from distlm.view.table import Column, table

_MAX_RETRIES = 5
"""Of an attempt, that people see."""


def list_runs(options: argparse.Namespace) -> int:
    found = runs_in(options.runs_dir)
    wanted = found[: options.limit] if options.limit else found
    shown = [_with_job(run_status(run, with_evaluation=False))[0] for run in wanted]
    if options.json:
        say(json.dumps(finite([_summary(one) for one in shown]), indent=2))
    elif not shown:
        say(f"no runs in {options.runs_dir}; use --runs-dir for another folder")
    else:
        say("\n".join(_table_of_runs(shown)))
        if len(shown) < len(found):
            say(f"and {len(found) - len(shown)} older runs (-n 0 lists all)")
    return ExitCode.SUCCEEDED


def status(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    one, job = _with_job(run_status(run))
    tell_target_of_end(run)
    details = _details(one, job)
    if options.json:
        say(json.dumps(finite(details), indent=2))
    else:
        say("\n".join(_page(details, _what_happened(one))))
    return ExitCode.SUCCEEDED


def _with_job(one: RunStatus) -> tuple[RunStatus, KnownJob | None]:
    """The status with what a target with a queue says about the run's job, which is asked where the files alone do not
    tell."""
    if one.state not in ("starting", "lost", "preempted", "infrastructure"):
        return one, None
    try:
        job = find_job(one.run)
    except DistlmError as error:
        return replace(one, damaged=[*one.damaged, str(error)]), None
    if job is None:
        return one, None
    if not job.is_alive:  # if it has left no result, there is one now
        return run_status(one.run) if one.state in ("starting", "lost") else one, job
    if job.job.is_elsewhere(one.run) and end_if_final(one.run, job):
        return run_status(one.run), job
    state = str(job.status.state)
    if job.status.state == JobState.RUNNING and not job.job.is_elsewhere(one.run):
        state = "starting"
    attempts = one.attempts
    if attempts and not attempts[-1].result:
        attempts = [*attempts[:-1], replace(attempts[-1], state=state)]
    return replace(one, state=state, attempts=attempts), job


# --- what is known ---------------------------------------------------------------------------------------------------


def _summary(one: RunStatus) -> dict[str, Any]:
    return {
        "run_id": one.run.run_id,
        "name": one.name,
        "state": one.state,
        "step": one.step,
        "total_steps": one.total_steps,
        "loss": one.metrics.train.get("train/loss"),
        "started_at": _iso(one.started_s),
        "duration_s": one.duration_s,
        "attempts": len(one.attempts),
        "folder": str(one.run.path),
        "damaged": one.damaged,
    }


def _details(one: RunStatus, job: KnownJob | None) -> dict[str, Any]:
    run, damaged = one.run, list(one.damaged)
    checkpoints, last_good_step = _checkpoints(run, damaged)
    uri, mlflow_id = _tracking(one, damaged)
    metrics = one.metrics
    return {
        **_summary(one),
        "task": value_at(one.tree, "task", "type"),
        "model": _model(one.tree),
        "metrics": {
            "train": _point(metrics.train_step, metrics.train),
            "eval": _point(metrics.eval_step, metrics.eval),
        },
        "attempts": [_attempt(run, attempt) for attempt in one.attempts],
        "checkpoints": checkpoints,
        "last_good_step": last_good_step,
        "log": str(one.attempts[-1].log) if one.attempts else None,
        "model_folder": str(run.model) if run.model.is_dir() else None,
        "tracking_uri": uri,
        "mlflow_run_id": mlflow_id,
        "job": _job(one.run, job),
        "next": _next(one),
        "damaged": damaged,
    }


def _job(run: RunFolder, known: KnownJob | None) -> dict[str, Any] | None:
    """The handle of the newest attempt, and what its target says where it was asked."""
    with suppress(DistlmError):
        attempts = run.attempts()
        if (job := known.job if known else Job.read(attempts[-1]) if attempts else None) is not None:
            status = known.status if known else None
            return {
                "target": job.target,
                "id": job.id,
                "state": status.state if status else None,
                "target_state": status.target_state if status else None,
                "reason": status.reason if status else None,
                "restarts": job.num_restarts,
            }
    return None


def _attempt(run: RunFolder, attempt: AttemptStatus) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "state": attempt.state,
        "target": attempt.target,
        "num_workers": attempt.num_workers,
        "zero_stage": attempt.zero_stage,
        "started_at": _iso(attempt.started_s),
        "ended_at": _iso(attempt.ended_s),
        "duration_s": attempt.duration_s,
        "exit_code": attempt.exit_code,
        "cause": attempt.cause,
        "message": attempt.message,
        "log": str(attempt.log) if attempt.log else None,
        "retries": _retries(run, attempt),
    }


def _retries(run: RunFolder, attempt: AttemptStatus) -> list[dict[str, Any]]:
    """The failures that it went on after, in their order. Of one without a result they stand in its metrics.jsonl."""
    told = attempt.result.get("retries")
    if not attempt.result:
        told = []
        with suppress(OSError):  # the metrics are in the same file, and have named the damage
            (folder,) = (folder for folder in run.attempts() if folder.number == attempt.number)
            told = [m for m in read_backwards(folder.metrics_jsonl, b'"retry"') if m.get("event") == "retry"][::-1]
    names, known = [field.name for field in fields(Retry)], []
    for retry in told if isinstance(told, list) else []:
        with suppress(KeyError, TypeError, ValueError, OverflowError):  # a part of it is damaged
            datetime.fromisoformat(retry["failed_at"]).astimezone()
            known.append({name: retry[name] for name in names})
    return known


def _point(step: int | None, values: Mapping[str, float]) -> dict[str, Any] | None:
    return {"step": step, "values": dict(values)} if values else None


def _checkpoints(run: RunFolder, damaged: list[str]) -> tuple[list[int], int | None]:
    """The steps of whole checkpoints, newest first, and the one that a resume continues."""
    try:
        listed = list_checkpoints(CheckpointStore(run.checkpoints), None)
    except DistlmError as error:
        damaged.append(str(error))
        return [], None
    damaged += [f"checkpoint {one.path.name}: {one.reason}" for one in listed if one.state in ("damaged", "unknown")]
    steps = [one.step for one in listed if one.state == "committed" and one.step is not None]
    return steps, next((one.step for one in listed if one.is_resumed), None)


def _tracking(one: RunStatus, damaged: list[str]) -> tuple[str | None, str | None]:
    """The tracking URI without secrets, and the id of the MLflow run."""
    if not _is_in_mlflow(one):
        return None, None
    uri, mlflow_id = value_at(one.tree, "tracking", "tracking_uri"), None
    if uri is None and one.attempts and one.attempts[-1].target == "kubernetes":
        uri = value_at(one.tree, "kubernetes", "env", "MLFLOW_TRACKING_URI")
    with suppress(InputError):  # a variable that is not set here
        uri = choose_tracking_uri(expanded(uri, "tracking.tracking_uri"), one.run.runs_dir)
    try:
        mlflow_id = mlflow_run_id(one.run)
    except (DistlmError, OSError) as error:
        damaged.append(str(error))
    return redact_uri(str(uri)), mlflow_id


def _is_in_mlflow(one: RunStatus) -> bool:
    report_to = value_at(one.tree, "tracking", "report_to")
    return isinstance(report_to, list) and "mlflow" in report_to


def _what_happened(one: RunStatus) -> list[str]:
    """How the newest attempt has ended, as the command that waited for it said it."""
    newest = one.attempts[-1] if one.attempts else None
    if newest is None or newest.state in ("succeeded", "unknown") or not newest.result:
        return []
    try:
        lines = what_happened(newest.result)
    except (KeyError, TypeError, ValueError, AttributeError):  # a part of it is damaged
        lines = [newest.message]
    return "\n".join(lines).splitlines()


def _model(tree: Mapping[str, Any]) -> str | None:
    if name := value_at(tree, "model", "name_or_path"):
        return str(name)
    kind = value_at(tree, "model", "config", "model_type")
    return f"{kind} from scratch" if kind else None


def _next(one: RunStatus) -> list[str]:
    """Commands, the likeliest first."""
    ui = [command(one.run, "ui")] if _is_in_mlflow(one) else []
    if one.metrics.step is None and one.state not in ("running", "succeeded"):
        ui = []  # there is nothing to see
    match one.state:
        case "starting" | "running" | "submitted" | "pending":
            return [command(one.run, "logs", "-f"), *ui]
        case "lost":  # MLflow may show it as running
            return [command(one.run, "resume"), *([command(one.run, "sync")] if ui else [])]
        case "unknown":  # a resume is refused
            return ui
    steps = [what for _, what in next_steps(one.run, one.attempts[-1].result)]
    return [*ui, *steps] if one.state == "succeeded" else [*steps, *ui]


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# --- what people see -------------------------------------------------------------------------------------------------


def _table_of_runs(shown: list[RunStatus]) -> list[str]:
    columns = [
        Column("run"), Column("name", gives_way=True), Column("state"), Column("step", "right"),
        Column("loss", "right"), Column("started", "right", may_go=True), Column("took", "right", may_go=True),
    ]  # fmt: skip
    rows = [
        (
            one.run.run_id, one.name, one.state,
            _of_total(one.step, one.total_steps), _number(one.metrics.train.get("train/loss")), _age(one.started_s),
            _duration(one.duration_s),
        )
        for one in shown
    ]  # fmt: skip
    lines = table(columns, rows)
    return lines + [f"{one.run.run_id} is damaged: {printable(text)}" for one in shown for text in one.damaged]


def _page(details: dict[str, Any], ending: list[str]) -> list[str]:
    step = f"step {_of_total(details['step'], details['total_steps'])}" if details["step"] is not None else ""
    parts = (details["state"], step, f"took {_duration(details['duration_s'])}")
    lines = [f"run {details['run_id']}: {', '.join(filter(None, parts))}"]
    facts = {
        "name": details["name"],
        "task": details["task"],
        "model": details["model"],
        "started": _local(details["started_at"]),
        "training": _values(details["metrics"]["train"]),
        "evaluation": _values(details["metrics"]["eval"]),
        "checkpoints": _steps(details["checkpoints"], details["last_good_step"]),
        "folder": shown_path(details["folder"]),
        "job": _job_text(details["job"]),
        "log": shown_path(details["log"]) if details["log"] else None,
        "trained model": shown_path(details["model_folder"]) if details["model_folder"] else None,
        "MLflow": _mlflow(details),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    lines += [f"  {name:<14}{printable(value)}" for name, value in known.items()]
    lines += ["", *_table_of_attempts(details["attempts"])] if details["attempts"] else ["  no attempt was begun"]
    for attempt in details["attempts"]:
        if retries := attempt["retries"]:
            several = "" if len(retries) == 1 else f" {len(retries)} failures, at last"
            lines += ["", f"attempt {attempt['number']} went on after{several}:"]
            lines += [f"  {printable(_retry(retry))}" for retry in retries[-_MAX_RETRIES:]]
        why = f" ({attempt['cause']})" if attempt["cause"] else ""
        told = ending if ending and attempt is details["attempts"][-1] else attempt["message"].splitlines()
        if told:
            lines += ["", f"attempt {attempt['number']}, {attempt['state']}{why}:"]
            lines += [f"  {printable(line)}" for line in told]
    lines += ["", *(f"damaged: {printable(text)}" for text in details["damaged"])] if details["damaged"] else []
    return [*lines, "", *(f"next: {command}" for command in details["next"])]


def _job_text(job: dict[str, Any] | None) -> str | None:
    if job is None:
        return None
    status = JobStatus(job["state"], job["target_state"], job["reason"]) if job["state"] else ""
    return f"{job['target']} job {job['id']}{f': {status}' if status else ''}"


def _retry(retry: Mapping[str, Any]) -> str:
    where = on_rank(retry["rank"], retry["host"])
    return f"{_local(retry['failed_at'])}  {retry['cause']}{where}: {retry['message']}; from step {retry['from_step']}"


def _table_of_attempts(attempts: list[dict[str, Any]]) -> list[str]:
    columns = [
        Column("attempt", "right"), Column("state"), Column("target"), Column("workers", "right"),
        Column("ZeRO", "right"), Column("started"), Column("took", "right"), Column("exit code", "right"),
    ]  # fmt: skip
    rows = [
        (
            one["number"], one["state"], one["target"],
            None if one["num_workers"] is None else format_workers(one["num_workers"]), one["zero_stage"],
            _local(one["started_at"]), _duration(one["duration_s"]), one["exit_code"],
        )
        for one in attempts
    ]  # fmt: skip
    return table(columns, rows)


def _values(point: dict[str, Any] | None) -> str | None:
    if point is None:
        return None
    names = ("train/loss", "eval/loss", *EVALUATION_METRICS, "learning_rate", "throughput/tokens_per_s")
    shown = [f"{name.rpartition('/')[2]} {_number(point['values'][name])}" for name in names if name in point["values"]]
    return f"step {point['step']}: {', '.join(shown)}"


def _steps(steps: list[int], last_good: int | None) -> str | None:
    if not steps:
        return None
    return f"{', '.join(map(str, steps))}" + (f" (a resume continues {last_good})" if last_good is not None else "")


def _mlflow(details: dict[str, Any]) -> str | None:
    if details["tracking_uri"] is None:
        return None
    run_id = details["mlflow_run_id"]
    return f"{details['tracking_uri']} ({f'run {run_id}' if run_id else 'has nothing of this run yet'})"


def _of_total(step: int | None, total: int | None) -> str:
    return f"{'-' if step is None else step}/{'?' if total is None else total}" if step or total else "-"


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)


def _age(seconds: float | None) -> str:
    """Of something that began then, such as "3 h ago"."""
    if seconds is None:
        return "-"
    age = max(0.0, time.time() - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= size:
            return f"{age / size:.0f} {unit} ago"
    return "now"


def _local(iso: str | None) -> str | None:
    return f"{datetime.fromisoformat(iso).astimezone():%Y-%m-%d %H:%M:%S}" if iso else None
