"""Processes that must not outlive those that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distlm.limits import cgroups

if TYPE_CHECKING:
    import psutil

_LATELY_S = 30.0
_LOOK_INTERVAL_S = 0.02
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def end_with_parent() -> None:
    """From now on this process ends at once when its parent has ended, even by SIGKILL, which runs no clean-up.

    The parent is who asked for the process, also where a fork server has made it. Raises RuntimeError where
    `multiprocessing` did not start this process.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this process was not started by multiprocessing")

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


@contextmanager
def no_descendants_left(timeout_s: float = 5.0) -> Iterator[None]:
    """At the end of the block, end all processes that began in it and are descended from this one.

    Meanwhile the kernel makes those whose parent dies children of this process, so that none gets lost.
    """
    import psutil

    here = psutil.Process()
    others = set(here.children())
    adopt_orphans()
    try:
        yield
    finally:
        for _ in range(3):  # what is killed may leave children of its own
            if left := [child for child in here.children() if child not in others]:
                end_processes([*left, *(below for child in left for below in descendants(child))], timeout_s)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def adopt_orphans() -> None:
    """From now on the kernel makes processes descended from this one, whose parent dies, children of this one."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(process: psutil.Process, *, recursive: bool = True) -> list[psutil.Process]:
    """Those of a process that may have ended by now; not recursive: its children alone."""
    import psutil

    try:
        found: list[psutil.Process] = process.children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []
    return found


def end_processes(processes: list[psutil.Process], timeout_s: float = 5.0) -> None:
    """Wait for processes that are about to end, and kill those that do not."""
    kill_processes(_wait(processes, timeout_s), timeout_s)


def kill_processes(processes: list[psutil.Process], timeout_s: float = 5.0) -> None:
    """Kill processes, and wait until they are gone."""
    import psutil

    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _wait(processes, timeout_s)


def _wait(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended within the time. What waits for its parent to collect it has ended."""
    import psutil

    def has_ended(process: psutil.Process) -> bool:
        try:
            return bool(process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    deadline = time.monotonic() + timeout_s
    while True:
        _, alive = psutil.wait_procs(processes, timeout=0)  # collects children of this process
        if not (alive := [process for process in alive if not has_ended(process)]) or time.monotonic() >= deadline:
            return alive
        time.sleep(_LOOK_INTERVAL_S)


def ignore_signal(number: int) -> None:
    """As `signal.signal` does, which only the main thread may call."""
    ignore = ctypes.c_void_p(1)  # SIG_IGN of signal.h
    ctypes.CDLL(None).signal(number, ignore)


class OomKills:
    """Tells whether the kernel has killed a process for want of memory lately: in this process's control group where
    that can be told, else on this machine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int | None]] = deque()
        self.sample()

    def sample(self) -> None:
        """To be called again and again; what is older than the samples of the last while is not lately."""
        now_s = self._clock()
        self._samples.append((now_s, count_oom_kills()))
        while len(self._samples) > 2 and self._samples[1][0] < now_s - _LATELY_S:
            self._samples.popleft()

    def happened_lately(self) -> bool:
        self.sample()
        (_, before), (_, after) = self._samples[0], self._samples[-1]
        return before is not None and after is not None and after > before


def count_oom_kills(proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes the kernel has killed for want of memory; None: not known."""
    names = ("memory.events", "memory.oom_control")  # of versions 2 and 1
    told_in = (folder / name for folder in cgroups("memory", proc, mount) for name in names)
    for path in (*told_in, proc / "vmstat"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        if found := next((line for line in lines if line.startswith("oom_kill ")), None):
            return int(found.split()[1])
    return None


def _prctl(option: int, value: int) -> None:
    """Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
