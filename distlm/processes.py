"""How a process that `multiprocessing` has started goes when the one that started it has gone."""

from __future__ import annotations

import multiprocessing
import os
import threading


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
