"""The folder for Ray's sockets and logs: where it is made, and which ones killed runs have left."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "distlm-"
_LONGEST_BASE = 24  # characters: the paths of Ray's sockets below it end at 107 bytes
_NEW_S = 60.0
"""A folder of that age may belong to a run whose Ray is still to start."""


def make_temporary_root() -> Path:
    """A new folder for Ray's sockets and logs, which has to be short. Raises OSError."""
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=temporary_base()))


def temporary_base() -> str:
    """Where it is made: the folder for temporary files, or /tmp where that one's path is too long."""
    base = tempfile.gettempdir()
    return base if len(base) <= _LONGEST_BASE else "/tmp"


def stale_temporary_roots() -> Iterator[Path]:
    """Those of ours that no process uses any more. Ray's processes name theirs on their command lines."""
    commands = b"\n".join(_command_lines())
    for path in sorted(Path(temporary_base()).glob(f"{_PREFIX}*")):
        try:
            about = path.lstat()
        except OSError:
            continue
        is_ours = path.is_dir() and not path.is_symlink() and about.st_uid == os.getuid()
        if is_ours and time.time() - about.st_mtime > _NEW_S and os.fsencode(path) not in commands:
            yield path


def _command_lines() -> Iterator[bytes]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
