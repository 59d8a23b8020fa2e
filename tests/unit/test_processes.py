"""No process outlives the command that has started it, whoever its parent was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distlm.processes import OomKills, count_oom_kills, end_processes, kill_processes
from distlm.temporary import temporary_root

# Starts a process before the block, and in it a child that leaves an orphan behind and is gone, as a killed controller.
_COMMAND = """
import subprocess, sys
from distlm.processes import no_descendants_left

sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
kept = subprocess.Popen(sleeper, stdout=subprocess.DEVNULL)
quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
orphan = "import subprocess, sys; print(subprocess.Popen({sleeper}, " + quiet + ").pid)"
with no_descendants_left(timeout_s=0.2):
    told = subprocess.run(
        [sys.executable, "-c", orphan.format(sleeper=sleeper)], start_new_session=True, capture_output=True, text=True
    )
print(kept.pid, kept.poll(), told.stdout.strip())
kept.kill()
"""


def test_orphans_of_the_block_are_ended_and_what_was_there_before_is_not() -> None:
    run = subprocess.run([sys.executable, "-c", _COMMAND], capture_output=True, text=True, timeout=60, check=True)
    kept_pid, kept_code, orphan_pid = run.stdout.split()
    assert kept_code == "None" and int(kept_pid) > 0
    assert not psutil.pid_exists(int(orphan_pid))


def test_who_is_killed_and_not_collected_by_its_parent_is_not_waited_for() -> None:
    """As Ray's workers, whose parent is killed too: they fall to a process that collects them later."""
    careless = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", careless], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        started_s = time.monotonic()
        kill_processes([child], timeout_s=60.0)
        assert time.monotonic() - started_s < 30
        assert child.status() == psutil.STATUS_ZOMBIE
        end_processes([child, psutil.Process(parent.pid)], timeout_s=0.2)
        assert not psutil.pid_exists(parent.pid)


def test_a_signal_can_be_ignored_from_any_thread() -> None:
    code = (
        "import os, signal, threading; from distlm.processes import ignore_signal\n"
        "thread = threading.Thread(target=ignore_signal, args=(signal.SIGUSR2,)); thread.start(); thread.join()\n"
        "os.kill(os.getpid(), signal.SIGUSR2); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.parametrize(
    ("cgroup", "told_in", "text"),
    [
        ("0::/job/7\n", "groups/job/7/memory.events", "oom 9\noom_kill 3\n"),
        ("0::/job/7\n", "groups/memory.events", "oom_kill 3\n"),  # in a container
        ("9:name=systemd:/\n4:cpu,memory:/job\n", "groups/memory/job/memory.oom_control", "oom_kill 3\n"),
        ("0::/\n", "proc/vmstat", "nr_free_pages 5\noom_kill 3\n"),
    ],
)
def test_kills_for_want_of_memory_are_counted(cgroup: str, told_in: str, text: str, tmp_path: Path) -> None:
    assert count_oom_kills(tmp_path / "proc", tmp_path / "groups") is None
    for name, content in {"proc/self/cgroup": cgroup, told_in: text}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert count_oom_kills(tmp_path / "proc", tmp_path / "groups") == 3


def test_a_kill_of_long_ago_explains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, count = 0.0, 5
    monkeypatch.setattr("distlm.processes.count_oom_kills", lambda: count)
    kills = OomKills(lambda: now_s)
    now_s, count = 10.0, 6
    assert kills.happened_lately()
    for now_s in range(11, 60):  # noqa: B007 - the clock reads it
        kills.sample()
    assert not kills.happened_lately()
    count = 7
    assert kills.happened_lately()


class TestTemporaryRoot:
    @pytest.fixture(autouse=True)
    def base(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """Of a short path: those of Ray's sockets have to be."""
        base = Path(tempfile.mkdtemp(prefix="d", dir="/tmp"))
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        yield base
        shutil.rmtree(base)

    def test_it_is_gone_afterwards(self, base: Path) -> None:
        with temporary_root() as root:
            assert [path.name for path in base.iterdir()] == [root.name]
        assert not list(base.iterdir())

    def test_what_killed_controllers_left_goes_and_what_is_in_use_or_young_stays(self, base: Path) -> None:
        old = time.time() - 3600
        stale, young, users = base / "distlm-stale", base / "distlm-young", base / "distlm-main"
        for folder in (stale, young, users):
            (folder / "ray").mkdir(parents=True)
        for folder in (stale, young):
            (folder / ".made-by-distlm").touch()
        os.utime(stale, (old, old))
        os.utime(users, (old, old))
        with temporary_root() as in_use:
            os.utime(in_use, (old, old))
            with temporary_root():
                assert in_use.exists() and young.exists() and users.exists()
                assert not stale.exists()
