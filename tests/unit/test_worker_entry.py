"""What a worker waits for before it commits a checkpoint, and what it does when nobody is there any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from distlm.errors import InfrastructureError
from distlm.worker import entry, stop
from distlm.worker.stop import StopFlag


class Mailbox:
    """Answers `is_recorded` with these, one after the other; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.told: list[dict[str, Any]] = []
        self._answers = iter(answers)
        self.push = SimpleNamespace(remote=self.told.append)
        self.is_recorded = SimpleNamespace(remote=lambda step: next(self._answers))
        self.is_stop_wanted = SimpleNamespace(remote=lambda: next(self._answers))


@pytest.fixture(autouse=True)
def answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any, timeout: float | None = None) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(entry, "_CONFIRMATION_INTERVAL_S", 0.001)
    monkeypatch.setattr(stop, "_POLL_INTERVAL_S", 0.001)


def test_a_checkpoint_waits_until_what_came_before_it_is_recorded() -> None:
    mailbox = Mailbox(False, False, True)
    entry._wait_until_recorded(mailbox, 20)
    assert mailbox.told == [{"kind": "saving", "step": 20}]
    assert next(mailbox._answers, "none left") == "none left"


def test_without_a_controller_nothing_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfrastructureError, match="the controller is gone; step 20 is not committed"):
        entry._wait_until_recorded(Mailbox(False, ray.exceptions.ActorDiedError()), 20)
    monkeypatch.setattr(entry, "_CONFIRMATION_TIMEOUT_S", 0.01)
    with pytest.raises(InfrastructureError, match="has not confirmed step 20; it is not committed"):
        entry._wait_until_recorded(Mailbox(*[False] * 10_000), 20)


def test_a_mailbox_that_is_gone_ends_the_training() -> None:
    unavailable = ray.exceptions.ActorUnavailableError("for the moment", b"1" * 16)
    wanted = StopFlag(Mailbox(False, unavailable, True))
    wanted._thread.join(10)
    assert wanted.is_set()
    lost = StopFlag(Mailbox(False, ray.exceptions.ActorDiedError()))
    lost._thread.join(10)
    with pytest.raises(InfrastructureError, match="the recorder's mailbox is gone"):
        lost.is_set()
