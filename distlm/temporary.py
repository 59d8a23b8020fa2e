"""The folder for Ray's sockets and logs: where it is made, and which ones killed runs have left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "distlm-"
_MARK = ".made-by-distlm"
"""A file in ours: users have folders of such names, too."""
_LONGEST_BASE = 24  # characters: the paths of Ray's sockets below it end at 107 bytes
_NEW_S = 10.0
"""A folder of that age may not be locked yet."""


@contextmanager
def temporary_root() -> Iterator[Path]:
    """A new folder, which has to be short. A lock on it says that its owner is alive; those of ours without one, which
    killed controllers have left, are removed. Raises OSError."""
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=temporary_base()))
    try:
        (path / _MARK).touch()
        with _lock_folder(path):
            for stale in stale_temporary_roots():
                shutil.rmtree(stale, ignore_errors=True)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def temporary_base() -> str:
    """Where it is made: the folder for temporary files, or /tmp where that one's path is too long."""
    base = tempfile.gettempdir()
    return base if len(base) <= _LONGEST_BASE else "/tmp"


def stale_temporary_roots() -> Iterator[Path]:
    """Those of ours whose owner has gone."""
    for path in sorted(Path(temporary_base()).glob(f"{_PREFIX}*")):
        try:
            about = path.lstat()
            is_ours = not path.is_symlink() and about.st_uid == os.getuid() and (path / _MARK).is_file()
            if is_ours and time.time() - about.st_mtime > _NEW_S:
                with _lock_folder(path):
                    yield path
        except OSError:  # in use, or just removed by another
            continue


@contextmanager
def _lock_folder(path: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process has the lock."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
