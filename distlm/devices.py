"""What this machine computes on, found without torch. Standard library only."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def visible_gpu_count() -> int | None:
    """NVIDIA GPUs that a process started here would see; None: the machine has AMD GPUs, which only torch can count."""
    if os.path.exists("/dev/kfd"):
        return None
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = min(devices, len([item for item in visible.split(",") if item.strip() not in ("", "-1")]))
    return devices


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products. Without them torch is many times slower in bf16 than in fp32.

    True where that cannot be told.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    flags = {flag for line in cpuinfo.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return not flags or bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})
