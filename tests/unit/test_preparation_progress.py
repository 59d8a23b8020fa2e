"""The bar that shows how far the preparation of the data is."""

from __future__ import annotations

import io

import pytest

from distlm.controller import progress
from distlm.controller.progress import Progress
from distlm.data.notes import PreparationProgress


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tokenize(shown: Progress, clock: Clock, seconds: int) -> None:
    """A second of work is 1 MB of 100 MB; the controller looks twice a second."""
    for half_second in range(2 * seconds):
        clock.now_s = 100 + half_second / 2
        done = half_second // 2
        shown.preparation(PreparationProgress("tokenizing", done * 10**6, 10**8, done * 1000, done * 250_000))


def test_a_log_gets_a_line_every_ten_seconds_and_none_for_short_work(clock: Clock) -> None:
    log = io.StringIO()
    shown = Progress(log)
    tokenize(shown, clock, 5)
    assert log.getvalue() == ""
    tokenize(shown, clock, 26)
    assert log.getvalue() == (
        "tokenizing:   5% #................... 5 of 100 MB, 5,000 documents, 1,250,000 tokens, 1.0 MB/s, ETA 1m 35s\n"
        "tokenizing:  15% ###................. 15 of 100 MB, 15,000 documents, 3,750,000 tokens, 1.0 MB/s, ETA 1m 25s\n"
        "tokenizing:  25% #####............... 25 of 100 MB, 25,000 documents, 6,250,000 tokens, 1.0 MB/s, ETA 1m 15s\n"
    )


def test_a_terminal_has_one_line_that_is_written_over_and_gone_at_the_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    shown = Progress(terminal)
    tokenize(shown, clock, 8)
    shown.end_preparation()
    shown.say("data: done")
    lines = terminal.getvalue().split("\r\x1b[K")
    assert lines[0] == "tokenizing:   5% #................... 5 of 100 MB, 5,000 do"
    assert len(lines) == 7 and lines[-1] == "data: done\n" and "\n" not in "".join(lines[:-1])


def test_what_has_no_size_shows_what_it_has(clock: Clock) -> None:
    log = io.StringIO()
    shown = Progress(log)
    for clock.now_s in (100, 110, 130):
        done = int(clock.now_s - 100)
        shown.preparation(PreparationProgress("copying a/b/train", done * 10**6, 0, done))
    shown.preparation(PreparationProgress("training the tokenizer"))
    clock.now_s = 150
    shown.preparation(PreparationProgress("training the tokenizer"))
    assert log.getvalue() == (
        "copying a/b/train: 10 MB, 10 documents, 1.0 MB/s\n"
        "copying a/b/train: 30 MB, 30 documents, 1.0 MB/s\n"
        "training the tokenizer\n"
    )
