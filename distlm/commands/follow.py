"""`distlm logs`, and what `distlm submit` shows of a run that goes on elsewhere: its log, as it grows.

A run's log is output.log of each of its attempts; which have their own where a job was put back into the queue and went
on. All is read from the run's folder, so from any machine that sees it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from distlm.commands.find import find_run
from distlm.config.attempt import load_attempt
from distlm.console import say
from distlm.errors import ExitCode, InfrastructureError, InputError
from distlm.launchers.base import Job, JobState
from distlm.launchers.carried import RESULT_PREFIX
from distlm.launchers.jobs import KnownJob, end_if_final, find_job, job_output, tell_target_of_end
from distlm.launchers.supervise import ending_lines, say_ending
from distlm.launchers.targets import queue_launcher
from distlm.run_folder import AttemptFolder, RunFolder, is_there, read_json
from distlm.run_status import run_status
from distlm.view import View, make_event
from distlm.view.ending import command
from distlm.view.plain import PlainView

_LOOK_INTERVAL_S, _ASK_INTERVAL_S, _ASK_JOB_INTERVAL_S = 0.5, 1.0, 5.0
_LAST_LINES_TIMEOUT_S = 3.0


def logs(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    if not (attempts := run.attempts()):
        raise InputError(f"run {run.run_id} has no attempt, and no log")
    if options.follow and options.rank is None:
        return follow(run, PlainView(sys.stdout), shows_ending=True)
    chosen = _chosen(run, attempts, options.attempt)
    path = chosen.output_log if options.rank is None else chosen.worker_log(options.rank)
    if options.rank is not None and (lines := _logs_elsewhere(chosen, options)) is not None:
        for text in lines:
            say(text, end="")
        return ExitCode.SUCCEEDED
    if options.follow:
        return _follow_file(run, chosen, path)
    if path.exists():
        _Tail(path).copy()
    elif options.rank is None and (job := Job.read(chosen)) is not None and (text := job_output(run, job)):
        say("".join(line for line in text.splitlines(keepends=True) if not line.startswith(RESULT_PREFIX)), end="")
    else:
        raise InputError(_what_there_is(run, chosen, path))
    return ExitCode.SUCCEEDED


def _logs_elsewhere(attempt: AttemptFolder, options: argparse.Namespace) -> Iterator[str] | None:
    """Of a rank, from where the run's folder is; None: that is here, or not to be asked."""
    job = Job.read(attempt)
    if job is None or is_there(attempt.handle_json) or (launcher := queue_launcher(job.target)) is None:
        return None
    if attempt.number != attempt.run.attempts()[-1].number:
        raise InputError("of a run whose folder is elsewhere, only the newest attempt can be asked for from here")
    return launcher.logs_there(job, [f"--rank={options.rank}", *(["-f"] if options.follow else [])])


def _chosen(run: RunFolder, attempts: list[AttemptFolder], number: int | None) -> AttemptFolder:
    if number is None:
        return attempts[-1]
    for attempt in attempts:
        if attempt.number == number:
            return attempt
    raise InputError(f"run {run.run_id} has no attempt {number}; it has {attempts[0].number} to {attempts[-1].number}")


def _what_there_is(run: RunFolder, attempt: AttemptFolder, path: Path) -> str:
    names = ", ".join(sorted(log.name for log in attempt.logs.glob("*.log"))) or "nothing yet"
    return f"attempt {attempt.number} of run {run.run_id} has no {path.name}; in {attempt.logs} there is {names}"


def follow(run: RunFolder, view: View, *, shows_ending: bool) -> int:
    """Show the log of a run from its newest attempt on, until it has ended; its exit code. Ctrl-C leaves the run
    alone. Raises InfrastructureError where nothing is left that could end it."""
    try:
        return _Follower(run, view).follow(shows_ending)
    except KeyboardInterrupt:
        how = f"follow: {command(run, 'logs', '-f')}; end: {command(run, 'cancel')}"
        say(f"distlm: run {run.run_id} goes on; {how}", file=sys.stderr)
        return ExitCode.CANCELLED


class _Follower:
    def __init__(self, run: RunFolder, view: View) -> None:
        self._run, self._view = run, view
        self._attempt = run.attempts()[-1]
        self._tail = _Tail(self._attempt.output_log)
        self._job_tail: _JobTail | None = None
        self._next_ask_s = 0.0
        self._said = ""
        self._seen: set[str] = set()

    def follow(self, shows_ending: bool) -> int:
        while True:
            self._show_new_lines()
            attempts = self._run.attempts()
            if later := [attempt for attempt in attempts if attempt.number > self._attempt.number]:
                self._show_new_lines()
                self._attempt = later[0]
                self._tail, self._job_tail, self._seen = _Tail(self._attempt.output_log), None, set()
                continue
            if time.monotonic() >= self._next_ask_s and (code := self._look(shows_ending)) is not None:
                return code
            time.sleep(_LOOK_INTERVAL_S)

    def _look(self, shows_ending: bool) -> int | None:
        """The exit code, if the run has ended. A target is not asked all the time."""
        has_log = is_there(self._attempt.output_log)
        job = find_job(self._run)  # which keeps in that log what a job that has ended has printed
        self._next_ask_s = time.monotonic() + (_ASK_JOB_INTERVAL_S if job else _ASK_INTERVAL_S)
        is_over = False
        if has_log:
            self._job_tail = None  # it may have shown what the job printed before there was a log of the run
        elif job is not None:  # its folder is elsewhere, or it has made none yet
            self._job_tail = self._job_tail or _JobTail(self._run, job.job)
            self._show(self._job_tail.new_lines())
            is_over = end_if_final(self._run, job, self._job_tail.lines)
        if job is not None and job.is_alive and not is_over:
            self._say_what_it_waits_for(job)
            return None
        if is_there(self._attempt.result_json):
            return self._end(shows_ending)
        if job is None and run_status(self._run, with_evaluation=False).state == "lost":
            raise InfrastructureError(
                f"run {self._run.run_id} is lost: no controller holds it, and it has left no result; "
                f"next: {command(self._run, 'resume')}"
            )
        return None

    def _say_what_it_waits_for(self, job: KnownJob) -> None:
        text = str(job)
        if job.status.state == JobState.RUNNING:  # and may say for how long by now
            problem = f"; {job.status.problem}" if job.status.problem else ""
            text = f"{job.job.target} job {job.job.id} runs{problem}"
        if text != self._said:
            self._said = text
            self._view.show(make_event("note", message=text))

    def _end(self, shows_ending: bool) -> int:
        result = read_json(self._attempt.result_json)
        lines = ending_lines(self._run, load_attempt(self._run, self._attempt).config, result)
        deadline = time.monotonic() + _LAST_LINES_TIMEOUT_S
        while not (is_told := self._has_seen(lines[0])) and time.monotonic() < deadline:
            time.sleep(_LOOK_INTERVAL_S)
            self._show_new_lines()
        self._view.show(make_event("result", **result))
        tell_target_of_end(self._run)
        if shows_ending and not is_told:
            say_ending(lines, result["exit_code"])
        self._view.close()
        return int(result["exit_code"])

    def _has_seen(self, ending: str) -> bool:
        """Whether the log has told the end itself: paths in it may be other ones, from another folder."""
        how = ending.removeprefix("distlm: ").partition(":")[0]
        return any(line.removeprefix("distlm: ").startswith(how) for line in self._seen)

    def _show_new_lines(self) -> None:
        if not (self._job_tail and self._job_tail.has_shown):  # which are the same
            self._show(self._tail.new_lines())

    def _show(self, lines: list[str]) -> None:
        for line in lines:
            self._seen.add(line)
            self._view.show(make_event("note", message=line))


def _follow_file(run: RunFolder, attempt: AttemptFolder, path: Path) -> int:
    """One file of an attempt, until the attempt has ended."""
    tail = _Tail(path)
    try:
        while not is_there(attempt.result_json):
            tail.copy()
            if run_status(run, with_evaluation=False).state == "lost" and find_job(run) is None:
                break
            time.sleep(_LOOK_INTERVAL_S)
    except KeyboardInterrupt:
        return ExitCode.CANCELLED
    tail.copy()
    return ExitCode.SUCCEEDED


class _Tail:
    """Reads what a file has got since it was read last. It may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._part = b""

    def new_lines(self) -> list[str]:
        """Those that are whole."""
        *lines, self._part = (self._part + self._read()).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def copy(self) -> None:
        """To standard output, as it is."""
        say(self._read().decode(errors="replace"), end="")

    def _read(self) -> bytes:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._position)
                content = file.read()
        except FileNotFoundError:
            return b""
        self._position += len(content)
        return content


class _JobTail:
    """Reads what a job has printed since it was asked last, where its target tells that. A job that begins again may
    begin with nothing printed."""

    def __init__(self, run: RunFolder, job: Job) -> None:
        self._run, self._job = run, job
        self._shown: list[str] = []

    @property
    def has_shown(self) -> bool:
        return bool(self._shown)

    @property
    def lines(self) -> list[str]:
        """All that are whole, as they were when it was asked last."""
        return self._shown

    def new_lines(self) -> list[str]:
        """Those that are whole, but for what is meant for programs."""
        whole, _, _ = job_output(self._run, self._job).rpartition("\n")
        lines, num_shown = whole.splitlines(), len(self._shown)
        if not lines:  # also where it could not be asked
            return []
        new = lines[num_shown:] if lines[:num_shown] == self._shown else lines
        self._shown = lines
        return [line for line in new if not line.startswith(RESULT_PREFIX)]
