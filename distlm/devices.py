"""What this machine computes on, found without torch. Standard library only."""

from __future__ import annotations

import glob
import os


def visible_gpu_count() -> int | None:
    """NVIDIA GPUs that a process started here would see; None: the machine has AMD GPUs, which only torch can count."""
    if os.path.exists("/dev/kfd"):
        return None
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = min(devices, len([item for item in visible.split(",") if item.strip() not in ("", "-1")]))
    return devices
