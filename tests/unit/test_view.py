"""The views of an attempt: plain lines, JSON lines, and the live lines of a terminal, on real pseudo-terminals."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from distlm.view import Event, View, decode_event, make_event
from distlm.view.live import panel, sparkline, summary
from distlm.view.plain import JsonView, PlainView
from distlm.view.state import AttemptState, Curve, format_duration, stop_message

ROOT = Path(__file__).parents[2]
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
TIMEOUT_S = 30.0

TRAINED = {
    "train/loss": 7.5, "learning_rate": 5e-4, "grad_norm": 0.912, "throughput/tokens_per_s": 1234.5,
    "throughput/samples_per_s": 9.64, "throughput/device/mfu": 0.412, "time/step_s": 1.5, "memory/peak_gib": 12.3,
}  # fmt: skip
EVALUATED = {"eval/loss": 7.0, "eval/perplexity": 1096.6, "eval/accuracy": 0.05}


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def begin(**fields: Any) -> Event:
    return make_event(
        "begin",
        **{
            "run_id": "20260131-235959-3fa9c1", "run_name": "small", "attempt": 2,
            "folder": "runs/20260131-235959-3fa9c1",
            "log": "runs/20260131-235959-3fa9c1/attempts/002/logs", "task": "masked-lm", "num_workers": 2,
            "zero_stage": 3, "mixed_precision": "bf16", "tracking": "distlm ui --runs-dir runs",
        } | fields,
    )  # fmt: skip


def metrics(step: int, values: dict[str, float]) -> Event:
    return make_event("metrics", step=step, total_steps=200, values=values)


def prepared(stage: str, done: int, total: int = 0, documents: int = 0, tokens: int = 0) -> Event:
    counts = {"bytes_done": done, "bytes_total": total, "num_documents": documents, "num_tokens": tokens}
    return make_event("preparation", stage=stage, **counts)


# --- plain lines and JSON --------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(log: io.StringIO, clock: Clock) -> PlainView:
    view = PlainView(log)
    view.state.clock = clock
    return view


def tokenize(view: View, clock: Clock, seconds: int) -> None:
    """A second of work is 1 MB of 100 MB; the controller looks twice a second."""
    for half_second in range(2 * seconds):
        clock.now_s = 100 + half_second / 2
        done = half_second // 2
        view.show(prepared("tokenizing", done * 10**6, 10**8, done * 1000, done * 250_000))


def test_preparation_adds_a_line_every_ten_seconds_and_none_for_short_work(
    plain: PlainView, clock: Clock, log: io.StringIO
) -> None:
    tokenize(plain, clock, 5)
    assert log.getvalue() == ""
    tokenize(plain, clock, 26)
    assert log.getvalue() == (
        "tokenizing:   5% #................... 5 of 100 MB, 5,000 documents, 1,250,000 tokens, 1.0 MB/s, ETA 1m 35s\n"
        "tokenizing:  15% ###................. 15 of 100 MB, 15,000 documents, 3,750,000 tokens, 1.0 MB/s, ETA 1m 25s\n"
        "tokenizing:  25% #####............... 25 of 100 MB, 25,000 documents, 6,250,000 tokens, 1.0 MB/s, ETA 1m 15s\n"
    )


def test_what_has_no_size_shows_what_it_has(plain: PlainView, clock: Clock, log: io.StringIO) -> None:
    for clock.now_s in (100, 110, 130):
        done = int(clock.now_s - 100)
        plain.show(prepared("copying a/b/train", done * 10**6, documents=done))
    plain.show(prepared("training the tokenizer", 0))
    clock.now_s = 150
    plain.show(prepared("training the tokenizer", 0))
    assert log.getvalue() == (
        "copying a/b/train: 10 MB, 10 documents, 1.0 MB/s\n"
        "copying a/b/train: 30 MB, 30 documents, 1.0 MB/s\n"
        "training the tokenizer\n"
    )


def test_lines_say_what_happens_step_loss_speed_and_time_left(plain: PlainView, clock: Clock, log: io.StringIO) -> None:
    plain.show(begin())
    plain.show(make_event("phase", phase="workers", message="starting 2 workers on cpu"))
    plain.show(make_event("warning", message="slow"))
    plain.show(make_event("training", step=0, total_steps=200))
    values = {"train/loss": 7.5, "throughput/tokens_per_s": 1234.5}
    plain.show(metrics(20, values))
    clock.now_s += 30
    plain.show(metrics(50, values | {"throughput/device/mfu": 0.41, "memory/peak_gib": 1.5}))
    plain.show(metrics(50, EVALUATED))
    plain.show(metrics(50, {"time/checkpoint_s": 1.0}))
    assert log.getvalue().splitlines() == [
        "run 20260131-235959-3fa9c1 in runs/20260131-235959-3fa9c1, attempt 2",
        "starting 2 workers on cpu",
        "warning: slow",
        "step  20/200  loss 7.5000  1,234 tokens/s  ETA -",
        "step  50/200  loss 7.5000  1,234 tokens/s  MFU 41.0%  1.50 GiB  ETA 2m 30s",
        "step  50/200  eval loss 7.0000  perplexity 1096.6  accuracy 0.050",
    ]


def test_the_time_left_falls_between_two_reports(clock: Clock) -> None:
    state = AttemptState(clock)
    state.update(make_event("training", step=0, total_steps=200))
    state.update(metrics(20, TRAINED))
    clock.now_s += 30
    state.update(metrics(50, TRAINED))
    assert state.remaining_s == 150
    clock.now_s += 20
    assert state.remaining_s == 130
    clock.now_s += 1000
    assert state.remaining_s == 0


def test_durations_read_well() -> None:
    assert [format_duration(s) for s in (0, 59.6, 75, 3600, 90061)] == ["0s", "1m 00s", "1m 15s", "1h 00m", "25h 01m"]


def test_json_lines_are_the_events_and_valid_where_a_number_is_not() -> None:
    stream = io.StringIO()
    view = JsonView(stream)
    events = [begin(run_name="模型"), metrics(1, {"train/loss": math.nan, "grad_norm": math.inf, "epoch": 0.5})]
    for event in events:
        view.show(event)
    first, second = stream.getvalue().splitlines()
    assert json.loads(first) == events[0]
    told = json.loads(second)["values"]
    assert told == {"train/loss": "NaN", "grad_norm": "Infinity", "epoch": 0.5}, "as in metrics.jsonl"
    assert math.isnan(decode_event(second)["values"]["train/loss"])


# --- the live lines --------------------------------------------------------------------------------------------------


def state_after(*events: Event) -> AttemptState:
    state = AttemptState(Clock())
    for event in events:
        state.update(event)
    return state


def trained(**fields: Any) -> tuple[Event, ...]:
    return (
        begin(**fields),
        make_event("phase", phase="workers", message="starting 2 workers on cuda"),
        make_event("training", step=0, total_steps=200, device="cuda"),
        *(metrics(step, TRAINED | {"train/loss": 10 - step / 20}) for step in range(10, 160, 10)),
        metrics(150, EVALUATED),
        metrics(140, {"time/checkpoint_s": 1.0}),
    )


PREPARING = (
    begin(),
    make_event("phase", phase="prepare", message="preparing data, tokenizer and initial weights"),
    prepared("tokenizing", 45 * 10**6, 10**8, 45_000, 11_250_000),
)
STATES = {
    "before anything": (),
    "begun": (begin(),),
    "preparing": PREPARING,
    "copying": (*PREPARING, prepared("copying a/very/long/name/of/a/data/set/train " * 3, 10**6)),
    "starting": trained()[:3],
    "training": trained(),
    "stopping": (*trained(), make_event("stopping", message=stop_message(1, is_training=True) + "\n" + "x" * 300)),
    "exporting": (*trained(), make_event("phase", phase="export", message="writing the model")),
    "not finite": (*trained(), metrics(160, dict.fromkeys(TRAINED, math.nan) | dict.fromkeys(EVALUATED, math.inf))),
    "wide": trained(run_name="中文预训练模型" * 20, task="掩码语言模型" * 20, tracking="http://例子/" + "路" * 90),
    "no names": trained(run_name="", tracking="", attempt=1, num_workers=1),
    "succeeded": (*trained(), make_event("result", state="succeeded", exit_code=0)),
}


def rendered(lines: list[Text], columns: int) -> list[str]:
    """As a terminal shows them."""
    stream = io.StringIO()
    console = Console(file=stream, width=columns, height=40, force_terminal=True, color_system=None)
    for line in lines:
        console.print(line)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("columns", [1, 10, 40, 80, 120, 160, 300])
def test_no_line_is_wider_than_the_terminal(name: str, columns: int) -> None:
    state = state_after(*STATES[name])
    for draw in (panel, summary):
        lines = draw(state, columns, 30)
        assert len(lines) <= 12
        assert all(line.cell_len <= columns and "\n" not in line.plain for line in lines), lines
        if columns > 1:
            assert rendered(lines, columns) == [line.plain for line in lines]  # none is broken in two


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_low_terminal_keeps_the_first_lines_and_what_stopping_does(rows: int) -> None:
    lines = panel(state_after(*STATES["stopping"]), 79, rows)
    assert len(lines) == rows and lines[-1].plain.startswith("stopping: the step under way")


def test_80_columns() -> None:
    assert [line.plain.rstrip() for line in panel(state_after(*trained()), 79, 23)] == [
        "── small  20260131-235959-3fa9c1  attempt 2 ───────────────────────────────────",
        "         masked-lm · 2 workers × cuda · ZeRO 3 · bf16",
        "step     150/200  ━━━━━━━━━━━━━━━━━━━━━━━━─────────   75%       0s  ETA 0s",
        "train    loss 2.5000  lr 5.00e-04  grad norm 0.912  █▇▇▇▆▅▅▅▄▃▃▃▂▁▁",
        "eval     loss 7.0000  perplexity 1096.6  accuracy 0.050  at step 150",
        "speed    1,234 tokens/s  9.6 samples/s  MFU 41.2%  1.5 s/step",
        "memory   12.30 GiB  saved at step 140",
        "curves   distlm ui --runs-dir runs",
        "log      runs/20260131-235959-3fa9c1/attempts/002/logs",
        "Ctrl-C   finish the step, save, stop",
    ]


def test_40_columns_show_what_there_is_room_for() -> None:
    lines = [line.plain for line in panel(state_after(*trained()), 39, 23)]
    assert "step     150/200  ━━━━━━━━━━━────   75%" in lines
    assert "train    loss 2.5000  █▇▇▇▆▅▅▅▄▃▃▃▂▁▁" in lines
    assert "speed    1,234 tokens/s …" in lines


def test_160_columns_have_two_rows_in_a_line() -> None:
    lines = [line.plain for line in panel(state_after(*trained()), 159, 39)]
    assert len(lines) == 6
    assert lines[0].startswith("── small  20260131-235959-3fa9c1  attempt 2  masked-lm · 2 workers × cuda · ZeRO 3")
    assert [line.index(word) for line, word in zip(lines[2:5], ("eval", "memory", "log "), strict=True)] == [80] * 3


def test_of_an_elastic_run_the_range_of_workers_is_shown() -> None:
    lines = [line.plain for line in panel(state_after(*trained(num_workers=[1, 4])), 159, 39)]
    assert "masked-lm · 1-4 workers × cuda" in lines[0]


def test_before_training_the_phase_and_the_bar_of_the_data() -> None:
    lines = [line.plain for line in panel(state_after(*PREPARING), 79, 23)]
    assert lines[2].endswith(" preparing data, tokenizer and initial weights  0s")
    assert re.fullmatch(r"  tokenizing  ━{26}─{33}  45%", lines[3])
    assert lines[4] == "  45 of 100 MB  45,000 documents  11,250,000 tokens"


def test_user_text_is_shown_as_written_and_moves_no_cursor() -> None:
    state = state_after(*trained(run_name="[bold]x[/] :smile: \x1b[2J\x1b]0;title\x07\r\x9b1A"))
    head = rendered(panel(state, 79, 23), 79)[0]
    assert head.startswith("── [bold]x[/] :smile: 1A  2026")


def test_at_the_end_the_last_values_stay_and_hints_go() -> None:
    lines = [line.plain for line in summary(state_after(*STATES["succeeded"]), 79, 23)]
    assert [line.split()[0] for line in lines[2:]] == ["step", "train", "eval", "speed", "memory"]
    assert "ETA" not in lines[2]
    assert summary(state_after(*PREPARING), 79, 23) == []


def test_a_curve_of_any_length_is_short_and_even() -> None:
    curve = Curve()
    for number in range(100_000):
        curve.add(float(number))
    points = curve.points()
    assert 256 <= len(points) <= 513
    assert max(abs(b - a - (points[1] - points[0])) for a, b in pairwise(points[:-1])) < 1e-6
    assert sparkline(points, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, math.nan, 3.0, math.inf], 10) == "▁ █ "
    assert sparkline([], 10) == "" and sparkline([2.0, 2.0], 10) == "▁▁"


# --- on a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal: what is written to it, and the size that it tells."""

    def __init__(self, columns: int, rows: int) -> None:
        self.master, self.slave = os.openpty()
        self.resize(columns, rows)
        self.output = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, text: str) -> str:
        """All output so far, once it holds `text`."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.output:
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], (text, self.output)
            self._read()
        return self.output

    def rest(self) -> str:
        while select.select([self.master], [], [], 0)[0]:
            self._read()
        return self.output

    def _read(self) -> None:
        self.output += os.read(self.master, 65536).decode(errors="replace")


@contextmanager
def python(terminal: Terminal, code: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process on the terminal that runs `code`, with a view."""
    prelude = (
        "import signal, sys, time\n"
        "from distlm.console import make_printable\n"
        "from distlm.view import make_event\n"
        "from distlm.view.choose import make_view\n"
        "make_printable()\n"
        "view = make_view(as_json=False)\n"
        "view.show(make_event('begin', run_id='1', run_name='some name', attempt=1, folder='r', log='r/l', task='t',"
        " num_workers=2, zero_stage=2, mixed_precision='no', tracking=''))\n"
        "def note(text): view.show(make_event('note', message=text))\n"
    )
    environment = {**os.environ, "TERM": "xterm-256color", "CI": "", "DISTLM_VIEW": "", "LANG": "C.UTF-8"} | environment
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + code], cwd=ROOT, env=environment,
        stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            os.close(terminal.master)
        os.close(terminal.slave)


WAIT = "sys.stdin.readline()\n"


def test_a_terminal_gets_live_lines_and_its_cursor_back() -> None:
    terminal = Terminal(80, 24)
    with python(terminal, f"note('one\\n  | two |'); {WAIT}view.close(); print('after', file=sys.stderr)") as process:
        output = terminal.read_until("some name")
        assert HIDE_CURSOR in output and "one\r\n  | two |\r\n" in output and "fp32" in output
        os.write(terminal.master, b"\n")
        assert process.wait(TIMEOUT_S) == 0
        output = terminal.rest()
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    assert output.endswith("\r\x1b[J" + SHOW_CURSOR + "after\r\n")  # nothing was trained: nothing stays


def test_the_cursor_comes_back_when_the_process_dies_by_an_exception() -> None:
    terminal = Terminal(80, 24)
    with python(terminal, f"{WAIT}1 / 0") as process:
        terminal.read_until("some name")
        os.write(terminal.master, b"\n")
        assert process.wait(TIMEOUT_S) == 1
        output = terminal.rest()
    screen, _, traceback = output.rpartition(SHOW_CURSOR)
    assert traceback.startswith("Traceback") and traceback.endswith("ZeroDivisionError: division by zero\r\n")
    assert HIDE_CURSOR in screen


def test_a_resized_terminal_gets_lines_of_its_new_width() -> None:
    terminal = Terminal(80, 24)
    with python(terminal, WAIT):
        terminal.read_until("fp32")
        terminal.resize(160, 24)
        terminal.read_until("─" * 100)
        before = len(terminal.output)
        terminal.resize(40, 24)
        terminal.read_until("─" * 21 + "\x1b[0m")
        assert "─" * 40 not in terminal.output[before:]


def test_a_terminal_that_has_gone_is_no_error(tmp_path: Path) -> None:
    terminal = Terminal(80, 24)
    code = (
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from distlm.console import say\n"
        "note('ready')\n"
        "try: sys.stdin.readline()\n"
        "except OSError: pass\n"
        "for _ in range(3): note('x'); time.sleep(0.3)\n"  # several refreshes
        f"view.close(); say('unread'); open({str(tmp_path / 'ended')!r}, 'w').close()\n"
    )
    with python(terminal, code) as process:
        terminal.read_until("ready")
        os.close(terminal.master)
        terminal.master = os.open(os.devnull, os.O_RDONLY)
        assert process.wait(TIMEOUT_S) == 0
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("view", ["plain", "live"])
def test_a_request_to_stop_in_the_middle_of_showing_is_said_and_nothing_is_lost(view: str) -> None:
    terminal = Terminal(100, 24)
    code = (
        "stops = []\n"
        "def stop(*_): stops.append(1); view.stop_requested(len(stops))\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "number = 0\n"
        "note('ready')\n"
        "while len(stops) < 50:\n"
        "    if number < 10_000: note(f'line {number} ends'); number += 1\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "time.sleep(0.6)\n"  # two refreshes
        "view.close(); print(f'{number} lines')"
    )
    with python(terminal, code, DISTLM_VIEW=view) as process:
        terminal.read_until("ready")
        while process.poll() is None and " lines\r\n" not in terminal.output:
            process.send_signal(signal.SIGINT)
            terminal.rest()
            time.sleep(0.002)
        output = terminal.read_until(" lines\r\n")
        assert process.wait(TIMEOUT_S) == 0
    assert "killing" in output
    if view == "plain":
        said = re.sub(r"line \d+ ends\r\n", "", output)
        assert "stopping\r\nstopping now\r\nkilling\r\n" in said
    shown = [int(number) for number in re.findall(r"line (\d+) ends", output)]
    assert shown == list(range(int(re.search(r"(\d+) lines\r\n", output)[1])))  # type: ignore[index]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_reader_that_has_gone_changes_neither_the_course_nor_the_exit_code(as_json: bool, tmp_path: Path) -> None:
    code = (
        "import sys; from distlm.view import make_event; from distlm.view.choose import make_view\n"
        f"view = make_view(as_json={as_json})\n"
        "for _ in range(3): view.show(make_event('note', message='x'))\n"
        "view.stop_requested(1); view.close()\n"
        f"open({str(tmp_path / 'ended')!r}, 'w').close()"
    )
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, b"") and (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "LiveView"),
        ({"TERM": "dumb"}, "PlainView"),
        ({"TERM": ""}, "PlainView"),
        ({"CI": "true"}, "PlainView"),
        ({"CI": "true", "DISTLM_VIEW": "live"}, "LiveView"),
        ({"DISTLM_VIEW": "plain"}, "PlainView"),
        ({"DISTLM_VIEW": "pretty"}, "allowed are plain and live"),
    ],
)
def test_the_view_suits_the_terminal(environment: dict[str, str], expected: str) -> None:
    terminal = Terminal(80, 24)
    with python(terminal, "name = type(view).__name__; view.close(); print(name)", **environment):
        terminal.read_until(expected)


def test_colours_and_characters_are_those_that_the_terminal_has() -> None:
    code = (
        "view.show(make_event('warning', message='w 模')); view.show(make_event('phase', phase='ray', message='m'));"
        + WAIT
    )
    terminal = Terminal(80, 24)
    with python(terminal, code):
        assert "\x1b[33mwarning: w 模\x1b[0m" in terminal.read_until("fp32")
    terminal = Terminal(80, 24)
    with python(terminal, code, NO_COLOR="1"):
        output = terminal.read_until("fp32")
        assert "\x1b[33m" not in output and "\x1b[36m" not in output
    terminal = Terminal(80, 24)
    with python(terminal, code, PYTHONIOENCODING="ascii"):
        output = terminal.read_until("fp32")
        assert output.isascii() and "warning: w ?" in output and "t - 2 workers" in output


def test_a_recorded_attempt_is_shown_again(tmp_path: Path) -> None:
    replay = [sys.executable, "benchmarks/replay_view.py", "--speed", "inf"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def shown(*arguments: str) -> str:
        run = subprocess.run(
            [*replay, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return run.stdout

    recorded = tmp_path / "events.jsonl"
    recorded.write_text(shown("--json"))
    assert len(recorded.read_text().splitlines()) > 60
    assert shown("--json", str(recorded)) == recorded.read_text()
    lines = shown(str(recorded)).splitlines()
    assert lines[0] == "run 20260131-235959-3fa9c1 in runs/20260131-235959-3fa9c1, attempt 2"
    assert any(line.startswith("step 600/600  loss ") for line in lines)
