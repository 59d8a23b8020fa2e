"""The job of a run on a target with a queue: what is made of what the target says, and what is kept of an attempt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import end, held_lease, make_attempt, make_run

from distlm.errors import ExitCode, InputError
from distlm.launchers import jobs, targets
from distlm.launchers.base import Job, JobState, JobStatus, Request
from distlm.launchers.carried import RESULT_PREFIX
from distlm.launchers.jobs import KnownJob, find_job, job_output
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_json
from distlm.view import make_event
from distlm.view.kept import KeptView
from distlm.view.plain import PlainView

JOB = Job("fake", "17", 2, 30)
ALIVE = [state for state in JobState if state.is_alive]
ENDS = {
    JobState.SUCCEEDED: (ExitCode.INFRASTRUCTURE, "infrastructure"),  # it would have left a result
    JobState.FAILED: (ExitCode.INFRASTRUCTURE, "infrastructure"),
    JobState.CANCELLED: (ExitCode.CANCELLED, "cancellation"),
    JobState.PREEMPTED: (ExitCode.PREEMPTED, "preemption"),
}


class FakeTarget:
    """Says about every job what a test has told it."""

    def __init__(self) -> None:
        self.says = JobStatus(JobState.RUNNING, "GOING")
        self.asked: list[Job] = []
        self.printed = ""

    def check(self, _: Any) -> Iterator[Any]:
        yield from ()

    check_here = check

    def build(self, *_: Any) -> Request:
        return Request(())

    render = build

    def submit(self, *_: Any) -> Job:
        return JOB

    def status(self, job: Job) -> JobStatus:
        self.asked.append(job)
        return self.says

    def output(self, *_: Any) -> str:
        return self.printed

    def cancel(self, _: Job, *, saves: bool) -> None:
        return

    def no_more_starts(self, _: Job) -> None:
        return

    def logs_there(self, *_: Any) -> None:
        return


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> FakeTarget:
    fake = FakeTarget()
    monkeypatch.setitem(targets._WITH_QUEUE, "fake", lambda: fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs")


@pytest.fixture
def attempt(run: RunFolder) -> AttemptFolder:
    """One that was given to the fake target."""
    folder = make_attempt(run)
    JOB.write(folder)
    return folder


# --- which job -------------------------------------------------------------------------------------------------------


def test_a_run_without_a_job_asks_nobody(run: RunFolder, target: FakeTarget) -> None:
    assert find_job(run) is None
    JOB.write(make_attempt(run))
    end(run.attempts()[-1], ExitCode.PREEMPTED)
    make_attempt(run)  # on this machine
    assert find_job(run) is None
    Job("other", "17").write(make_attempt(run))
    assert find_job(run) is None, "a target of a newer distlm"
    assert target.asked == []


@pytest.mark.parametrize("state", ALIVE)
def test_a_job_that_is_alive_is_only_told(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, state: JobState
) -> None:
    target.says = JobStatus(state, "GOING", "it is night")
    known = find_job(run)
    assert known == KnownJob(JOB, target.says) and known.is_alive
    assert str(known) == f"fake job 17: {state} (GOING): it is night"
    assert target.asked == [JOB] and not attempt.result_json.exists()


@pytest.mark.parametrize("code", list(ExitCode))
def test_after_a_result_only_a_job_that_may_go_on_is_asked_for(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, code: ExitCode
) -> None:
    end(attempt, code, "as it was")
    for state in (JobState.PENDING, JobState.CANCELLED, JobState.UNKNOWN):
        target.says = JobStatus(state)
        may_go_on = code in (ExitCode.PREEMPTED, ExitCode.INFRASTRUCTURE)
        assert find_job(run) == (KnownJob(JOB, target.says) if may_go_on else None)
    assert len(target.asked) == (3 if may_go_on else 0)
    result = read_json(attempt.result_json)
    assert (result["exit_code"], result["message"]) == (code, "as it was")


@pytest.mark.parametrize("name", ["job_json", "result_json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"target": "fake"}'])
def test_a_damaged_file_raises_nothing_but_an_input_error(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, name: str, content: str
) -> None:
    path: Path = getattr(attempt, name)
    path.write_text(content)
    try:
        known = find_job(run)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert known is None


def test_a_job_reads_as_it_was_written(run: RunFolder, attempt: AttemptFolder) -> None:
    assert Job.read(attempt) == JOB
    write_json(attempt.job_json, {"target": "fake", "id": "5", "of_a_newer_distlm": 1})
    assert Job.read(attempt) == Job("fake", "5")
    attempt.job_json.unlink()
    assert Job.read(attempt) is None


# --- a job that has ended --------------------------------------------------------------------------------------------


def test_there_is_an_end_for_every_state_that_is_none() -> None:
    assert set(ENDS) | set(ALIVE) | {JobState.UNKNOWN} == set(JobState)


@pytest.mark.parametrize("state", ENDS)
def test_a_job_that_could_not_say_how_it_ended_gets_a_result(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, state: JobState
) -> None:
    target.says = JobStatus(state, "GONE", "exit code 1")
    left = attempt.path / ".metrics.json.reserve"
    left.touch()
    known = find_job(run)
    assert known is not None and not known.is_alive
    result = read_json(attempt.result_json)
    assert (result["exit_code"], result["cause"]) == ENDS[state]
    how = f"({state} (GONE): exit code 1); nothing that it has printed can be read here"
    assert result["message"] == f"the fake job 17 has ended without a result {how}"
    assert not left.exists()
    target.says = JobStatus(JobState.FAILED)
    find_job(run)
    assert read_json(attempt.result_json) == result, "it is written once"


def test_the_result_ends_with_what_the_job_printed_last(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget
) -> None:
    target.says = JobStatus(JobState.FAILED, "FAILED")
    target.printed = "".join(f"  line {number}  \n" for number in range(1, 8)) + "\nline 8"
    assert job_output(run, JOB) == target.printed
    assert job_output(run, Job("other", "17")) == "", "a target that has no queue"
    find_job(run)
    message = read_json(attempt.result_json)["message"]
    assert message.endswith("result (failed); line 5; line 6; line 7; line 8")


@pytest.mark.parametrize("state", ENDS)
def test_a_result_that_the_job_has_printed_is_the_result(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, state: JobState
) -> None:
    target.says = JobStatus(state)
    results = [{"exit_code": 3, "message": "once"}, {"exit_code": 0, "message": "then"}]
    target.printed = "".join(f"a line\n{RESULT_PREFIX}{json.dumps(result)}\n" for result in results) + "the end\n"
    known = find_job(run)
    assert known is not None and known.status == target.says
    assert read_json(attempt.result_json) == results[1], "the newest one"
    assert find_job(run) is None, "it has succeeded"


@pytest.mark.parametrize("content", ['{"exit_code": 0, "mess', "[]", "null", ""])
def test_a_result_of_which_a_part_was_printed_is_none(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, content: str
) -> None:
    target.says, target.printed = JobStatus(JobState.FAILED), f"{RESULT_PREFIX}{content}"
    find_job(run)
    assert read_json(attempt.result_json)["exit_code"] == ExitCode.INFRASTRUCTURE


def test_of_a_job_that_the_target_does_not_know_nothing_is_written(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget
) -> None:
    target.says = JobStatus(JobState.UNKNOWN, reason="it does not answer")
    known = find_job(run)
    assert known is not None and not known.is_alive
    assert str(known) == "fake job 17: unknown: it does not answer"
    assert not attempt.result_json.exists()


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_as_long_as_a_controller_has_the_run_nothing_is_written(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, state: JobState
) -> None:
    target.says = JobStatus(state)
    with held_lease(run):
        known = find_job(run)
        assert known is not None and known.status.state == state
        assert not attempt.result_json.exists()
    find_job(run)
    assert attempt.result_json.exists(), "it has gone"


def test_who_may_only_read_the_run_is_told_of_its_job(
    run: RunFolder, attempt: AttemptFolder, target: FakeTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`distlm status` and `distlm list` in a folder of a colleague's runs."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(attempt.result_json))

    monkeypatch.setattr(jobs, "end_abandoned", refuse)
    target.says = JobStatus(JobState.FAILED, "FAILED")
    assert find_job(run) == KnownJob(JOB, target.says)


# --- what is kept of an attempt --------------------------------------------------------------------------------------


def begin(folder: Path) -> dict[str, Any]:
    return make_event(
        "begin", run_id="20260131-235959-3fa9c1", run_name="tiny", attempt=1, folder=str(folder.parent),
        log=str(folder), task="masked-lm", num_workers=2, zero_stage=2, mixed_precision="no", tracking="",
    )  # fmt: skip


def note(text: str) -> dict[str, Any]:
    return make_event("note", message=text)


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[tuple[PlainView, Path]]:
    """A view, and the file that it writes to."""
    path = tmp_path / "shown"
    with open(path, "w", encoding="utf-8") as file:
        yield PlainView(file), path


def test_all_that_is_shown_is_kept_in_the_log_of_its_attempt(tmp_path: Path, shown: tuple[PlainView, Path]) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    view = KeptView(shown[0])
    view.show(note("before all attempts"))
    view.keep("to nobody")
    view.show(begin(first))
    view.show(note("é of the first"))
    view.stop_requested(1)
    view.show(begin(second))
    view.show(make_event("warning", message="of the second"))
    view.close()
    view.keep("after the end\nin two lines")
    kept = [(folder / "output.log").read_text(encoding="utf-8") for folder in (first, second)]
    assert "é of the first\n" in kept[0] and "of the second" not in kept[0]
    assert kept[1].endswith("of the second\nafter the end\nin two lines\n") and "first" not in kept[1]
    before, text = "before all attempts\n", shown[1].read_text(encoding="utf-8")
    assert text == before + (kept[0] + kept[1]).removesuffix("after the end\nin two lines\n")
    assert kept[0].count("\n") >= 3, "the beginning, the note, and what the stop means"


def test_it_keeps_also_without_a_view_and_adds_to_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "output.log").write_text("of the background\n")
    view = KeptView(None)
    view.show(begin(tmp_path))
    view.show(note("here"))
    view.stop_requested(1)
    view.close()
    lines = (tmp_path / "output.log").read_text().splitlines()
    assert lines[0] == "of the background" and "here" in lines and len(lines) > 3


@pytest.mark.parametrize("fault", ["no folder", "a folder of that name", "full"])
def test_where_nothing_can_be_kept_all_is_shown(tmp_path: Path, shown: tuple[PlainView, Path], fault: str) -> None:
    folder, good = tmp_path / "logs", tmp_path / "good"
    good.mkdir()
    if fault == "a folder of that name":
        (folder / "output.log").mkdir(parents=True)
    elif fault == "full":
        folder.mkdir()
        (folder / "output.log").symlink_to("/dev/full")
    view = KeptView(shown[0])
    view.show(begin(good))
    view.show(begin(folder))
    view.show(note("shown"))
    view.stop_requested(1)
    view.keep("to nobody")
    view.show(begin(good))
    view.keep("kept again")
    view.close()
    assert "\nshown\n" in shown[1].read_text()
    kept = (good / "output.log").read_text()
    assert kept.endswith("\nkept again\n") and "shown" not in kept and "to nobody" not in kept
