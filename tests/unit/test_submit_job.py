"""The submitter pod: what it prints and how it ends when connections break and heads vanish."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distlm.errors import InputError
from distlm.kubernetes import submit_job

Fault = Callable[["Head"], None]


class Head:
    """Ray's head: a job's output comes in parts, with pauses and faults between them."""

    def __init__(self, parts: list[str | float | Fault], end: str = "SUCCEEDED") -> None:
        self.parts, self.end = parts, end
        self.jobs: dict[str, str] = {}
        self.num_sent = 0
        self.printed: list[str] = []
        self.is_away = self.is_silent = False

    def _answer(self) -> None:
        if self.is_away:
            raise ConnectionError("refused")
        if self.is_silent:
            threading.Event().wait(60)

    # What the client of Ray asks.

    def list_jobs(self) -> list[Any]:
        self._answer()
        return [SimpleNamespace(submission_id=name) for name in self.jobs]

    def submit_job(self, *, entrypoint: str, submission_id: str) -> None:
        self.jobs[submission_id] = entrypoint
        self.num_sent += 1

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for text in self.printed:
            yield text
        while self.parts:
            part = self.parts.pop(0)
            if isinstance(part, str):
                self.printed.append(part)
                yield part
            elif isinstance(part, float):
                await asyncio.sleep(part)
            else:
                part(self)

    def get_job_status(self, _: str) -> Any:
        self._answer()
        return SimpleNamespace(value="RUNNING" if self.parts else self.end)


def breaks(_: Head) -> None:
    raise RuntimeError("the WebSocket was closed")


def begins_anew(head: Head) -> None:
    head.jobs, head.printed = {}, []
    raise ConnectionError("reset")


def falls_silent(head: Head) -> None:
    head.is_silent = True


def breaks_in_aiohttp(_: Head) -> None:
    class ServerDisconnectedError(Exception):
        """As aiohttp's: neither a ConnectionError nor an OSError."""

    raise ServerDisconnectedError


def goes_away(head: Head) -> None:
    head.is_away = True
    raise ConnectionError("reset")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", "head:8265")
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "distlm-a-x7f2q")
    monkeypatch.setattr(submit_job, "_PAUSE_S", 0.01)
    monkeypatch.setattr(submit_job, "_LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(submit_job, "_ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(submit_job, "_HEAD_TIMEOUT_S", 0.3)


def submit(monkeypatch: pytest.MonkeyPatch, head: Head) -> int:
    module = ModuleType("ray.job_submission")
    addresses: list[str] = []

    def connect(address: str) -> Head:
        addresses.append(address)
        head._answer()
        return head

    module.JobSubmissionClient = connect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)
    code = submit_job.main(["python", "-m", "distlm.ray_job", "/etc/distlm/run.yaml", "name=a b"])
    assert set(addresses) == {"http://head:8265"}
    return code


@pytest.mark.parametrize("end", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_however_the_job_ends_it_has_done_its_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    head = Head(["step 1\n", "step 2\n"], end)
    assert submit(monkeypatch, head) == 0
    entrypoint = "python -m distlm.ray_job /etc/distlm/run.yaml 'name=a b'"
    assert head.jobs == {"distlm-a-x7f2q": entrypoint}
    assert capsys.readouterr().out == f"sent to Ray: {entrypoint}\nstep 1\nstep 2\n"


def test_what_breaks_off_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    head = Head(["step 1\nst", breaks, breaks, "ep 2\n", breaks, "step 3\n"])
    assert submit(monkeypatch, head) == 0
    assert head.num_sent == 1
    assert capsys.readouterr().out.partition("\n")[2] == "step 1\nstep 2\nstep 3\n"


def test_a_submitter_that_begins_again_prints_all_and_sends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Head(["step 2\n"])
    head.jobs, head.printed = {"distlm-a-x7f2q": "..."}, ["step 1\n"]
    assert submit(monkeypatch, head) == 0
    assert head.num_sent == 0 and capsys.readouterr().out == "step 1\nstep 2\n"


def test_a_head_that_comes_back_without_the_job_gets_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Head(["step 1\nstep 2\n", begins_anew, "go on\n"])
    assert submit(monkeypatch, head) == 0
    assert head.num_sent == 2
    assert capsys.readouterr().out.splitlines()[-1] == "go on"


def test_a_connection_may_break_late(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer after its beginning than a head may be away."""
    head = Head(["step 1\n", 0.5, breaks, "step 2\n", 0.5, breaks_in_aiohttp, "step 3\n"])
    assert submit(monkeypatch, head) == 0
    assert head.num_sent == 1
    assert capsys.readouterr().out.partition("\n")[2] == "step 1\nstep 2\nstep 3\n"


def test_a_head_that_is_silent_on_an_open_connection_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Head(["step 1\n", falls_silent, 60.0, 60.0, 60.0, 60.0])
    assert submit(monkeypatch, head) == 0
    assert "has been away for" in capsys.readouterr().out and head.num_sent == 1


def test_a_head_that_stays_away_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    head = Head(["step 1\n", goes_away])
    assert submit(monkeypatch, head) == 0, "KubeRay asks Ray for the job, and does not find it"
    assert "Ray's head at http://head:8265 has been away for 0 s: refused\n" in capsys.readouterr().out


def test_outside_of_a_submitter_pod_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS")
    with pytest.raises(InputError, match="RAY_DASHBOARD_ADDRESS is not set"):
        submit_job.main(["true"])
