"""What this machine computes on, and how a process is made ready to compute; without torch. Standard library only."""

from __future__ import annotations

import ctypes
import gc
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_GIVEN_BACK_FROM_BYTES = 5 * 2**20
"""Size of the blocks that go back to the system when freed. From 2 MiB on, small models lose a tenth of their speed."""
_KEPT_BYTES = 256 * 2**20
"""Of smaller blocks, what is kept to be used again. glibc keeps 128 KiB, and most of each operation is page faults."""


def visible_gpu_count() -> int | None:
    """NVIDIA GPUs that a process started here would see; None: the machine has AMD GPUs, which only torch can count."""
    if os.path.exists("/dev/kfd"):
        return None
    devices = nvidia_gpu_count()
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = min(devices, len([item for item in visible.split(",") if item.strip() not in ("", "-1")]))
    return devices


def nvidia_gpu_count() -> int:
    """Of the machine, or container."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def prepare_process_for_torch(num_threads: int) -> None:
    """Set up this process, before it imports torch, for a worker that computes with `num_threads`.

    Large tensors on the CPU lie in huge pages, which are filled three times as fast as others, and their memory goes
    back to the system as soon as they are freed; else the peak is a fifth higher at BERT-base. THP_MEM_ALLOC_ENABLE,
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment go before.
    """
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value, variable in (
            (_M_MMAP_THRESHOLD, _GIVEN_BACK_FROM_BYTES, "MALLOC_MMAP_THRESHOLD_"),
            (_M_TRIM_THRESHOLD, _KEPT_BYTES, "MALLOC_TRIM_THRESHOLD_"),
        ):
            if variable not in os.environ:
                libc.mallopt(parameter, value)


@contextmanager
def garbage_collector_at_rest() -> Iterator[None]:
    """For imports of many modules: the collector looks through all that they have made again and again, a seventh
    of their time. From then on it leaves that alone."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
