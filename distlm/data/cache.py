"""Folders of the cache that are made once, whatever happens: by one process at a time, and going on after a kill.

CACHE/NAME-FINGERPRINT/           whole
CACHE/NAME-FINGERPRINT.partial/   in the making, locked by the process that makes it
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from distlm.errors import InputError

logger = logging.getLogger(__name__)

LOCK = "lock"
"""A file that is in a folder in the making, and for a moment, or after a kill, in a whole one."""
_LOCK_INTERVAL_S = 0.2


def fingerprint(*parts: Any) -> str:
    """20 characters that stand for a JSON value."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def make_folder(folder: Path, write: Callable[[Path], object]) -> bool:
    """Have `write` fill the folder unless it exists; it appears whole or not at all. Whether `write` was called.

    `write` is given the folder under its partial name. It finds there what a process that was killed has left, and may
    go on with that. Where it raises InputError, nothing is left. While another process makes the folder, this waits.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    while not folder.is_dir():
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(partial / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
        except FileNotFoundError:  # renamed by another process just now
            continue
        with lock:
            _wait_for(lock, folder)
            if not _is_at(partial / LOCK, lock):
                continue  # the folder is whole by now, or was removed
            if folder.is_dir():  # it became whole just before this partial one was made
                shutil.rmtree(partial, ignore_errors=True)
                return False
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            try:
                write(partial)
            except InputError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(folder)
            # Not before: without it another process would begin anew.
            (folder / LOCK).unlink()
            return True
    return False


def _wait_for(lock: IO[str], folder: Path) -> None:
    """Until the lock is ours. The kernel releases it when its owner ends, however that comes about."""
    has_said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not has_said:
                lock.seek(0)
                logger.warning("waiting for %s, which is making %s", lock.read().strip(), folder)
                has_said = True
            time.sleep(_LOCK_INTERVAL_S)
        else:
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
