"""What this machine computes on, found without torch. Standard library only."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping


def visible_gpu_count() -> int | None:
    """NVIDIA GPUs that a process started here would see; None: the machine has AMD GPUs, which only torch can count."""
    if os.path.exists("/dev/kfd"):
        return None
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = min(devices, len([item for item in visible.split(",") if item.strip() not in ("", "-1")]))
    return devices


def torch_environment(num_threads: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torch reads from the environment when it is imported, for a worker that computes with `num_threads`.

    Large tensors on the CPU lie in huge pages where the kernel has them: a fresh one is filled three times as fast.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "THP_MEM_ALLOC_ENABLE": environ.get("THP_MEM_ALLOC_ENABLE", "1"),
    }
