"""GPUs, cores, memory, and the kernel's limits."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distlm.devices import nvidia_gpu_count, visible_gpu_count
from distlm.doctor import Finding, findings
from distlm.limits import cpu_quota, memory_limit_bytes

_TORCH_TIMEOUT_S = 120.0
_NVIDIA_SMI_TIMEOUT_S = 15.0
_LEAST_MEMORY_GIB = 4.0  # Ray, the controller and two workers with their libraries
_LEAST_SHM_GIB = 0.25  # Ray's object store takes 100 MB, NCCL some for each pair of GPUs
_FEW_FILES = 4096
_BF16 = ("avx512_bf16", "amx_bf16")
_OTHERS = ("avx2", "avx512f", "avx512_vnni", "asimd", "bf16")

_ASK_TORCH = """
import json, torch
count = torch.cuda.device_count()
print(json.dumps({
    "cuda": torch.version.cuda or (torch.version.hip and "ROCm " + torch.version.hip),
    "devices": [torch.cuda.get_device_name(number) for number in range(count)] if torch.cuda.is_available() else [],
    "bf16": bool(count) and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
}))
"""


def check_hardware() -> Iterator[Finding]:
    gpu_count = visible_gpu_count()
    yield from findings(
        {
            "GPUs": lambda: _check_gpus(gpu_count),
            "CPU": lambda: _check_cores(gpu_count),
            "memory": _check_memory,
            "/dev/shm": _check_shared_memory,
            "open files": _check_open_files,
        }
    )


def _check_gpus(count: int | None) -> Iterator[Finding]:
    """`count`: None: AMD GPUs, which only torch can count."""
    driver = _nvidia_smi()
    hidden = " (CUDA_VISIBLE_DEVICES hides some)" if count is not None and count < nvidia_gpu_count() else ""
    if count == 0:
        yield Finding("ok", "GPUs", f"none; workers compute on the CPU{hidden}")
    else:
        yield Finding("ok", "GPUs", driver or f"{'AMD' if count is None else count}{hidden}")
    if find_spec("torch") is None:
        return
    torch, problem = _ask_torch()
    if torch is None:
        advice = (
            "reinstall it alone: pip install --force-reinstall torch (for GPUs with the --index-url of a CUDA build)"
        )
        yield Finding("missing", "torch on this machine", f"cannot be imported: {problem}", advice)
    elif count == 0:
        build = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build"
        yield Finding("ok", "torch on this machine", build)
    elif not torch["cuda"]:
        advice = "install a CUDA build of torch (pytorch.org says which), else workers compute on the CPU"
        yield Finding("warning", "torch on this machine", "a CPU build, which cannot use the GPUs", advice)
    elif not torch["devices"]:
        advice = "make the driver fit that version: nvidia-smi tells the newest CUDA that it knows"
        yield Finding("warning", "torch on this machine", f"CUDA {torch['cuda']} finds no GPU that it can use", advice)
    else:
        bf16 = "bf16" if torch["bf16"] else "no bf16: set training.mixed_precision to fp16 or no"
        found = f"CUDA {torch['cuda']}, {len(torch['devices'])} x {torch['devices'][0]}, {bf16}"
        yield Finding("ok" if torch["bf16"] else "warning", "torch on this machine", found)


def _nvidia_smi() -> str:
    """Such as "2 x NVIDIA H100, 80 GiB, driver 550.54"; empty: it is not here, or does not answer."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_NVIDIA_SMI_TIMEOUT_S)
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        name, memory_mib, driver = rows[0]
        return f"{len(rows)} x {name}, {int(memory_mib) / 1024:.0f} GiB, driver {driver}"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return ""


def _ask_torch() -> tuple[dict[str, Any] | None, str]:
    """What torch knows of CUDA, and why it is not known."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, errors="replace",
            timeout=_TORCH_TIMEOUT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer, ""
    except subprocess.TimeoutExpired:
        return None, f"no answer in {_TORCH_TIMEOUT_S:.0f} s"
    except OSError as error:
        return None, error.strerror or str(error)
    except (ValueError, IndexError):
        return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _check_cores(gpu_count: int | None) -> Finding:
    cores, machine = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    found = f"{cores} cores" + (f" of {machine}" if machine > cores else "")
    quota = cpu_quota()
    if quota is not None and quota < cores:
        return Finding(
            "warning", "CPU", f"{found}, of which the container may use {quota:g}",
            f"set resources.cpus_per_worker, so that the workers together use {max(1, int(quota))}",
        )  # fmt: skip
    flags = _cpu_flags()
    known = [flag for flag in (*_BF16, *_OTHERS) if flag in flags]
    found += f", {', '.join(known)}" if known else ""
    if gpu_count == 0 and not {*_BF16, "bf16"} & flags:
        advice = "training.mixed_precision: no is faster here"
        return Finding("warning", "CPU", f"{found}; computes bf16 in software", advice)
    return Finding("ok", "CPU", found)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def _check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit_bytes()
    is_limited = limit is not None and limit < total
    gib = (limit if limit is not None and is_limited else total) / 2**30
    found = f"{gib:.1f} GiB" + (f" (the container's limit; the machine has {total / 2**30:.1f})" if is_limited else "")
    if gib < _LEAST_MEMORY_GIB:
        return Finding("warning", "memory", found, f"two workers and Ray need about {_LEAST_MEMORY_GIB:.0f} GiB")
    return Finding("ok", "memory", found)


def _check_shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding("warning", "/dev/shm", "not there", "mount a tmpfs there, else Ray uses the disk, and is slow")
    found = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f}"
    if usage.free < _LEAST_SHM_GIB * 2**30:
        return Finding("warning", "/dev/shm", found, "make it larger; for a container: docker run --shm-size=1g")
    return Finding("ok", "/dev/shm", found)


def _check_open_files() -> Finding:
    """Ray raises the soft limit to the hard one."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = ("unlimited" if limit == resource.RLIM_INFINITY else limit for limit in limits)
    found = f"{soft}, can be raised to {hard}" if soft != hard else f"{soft}"
    if isinstance(hard, int) and hard < _FEW_FILES:
        advice = f"Ray wants {_FEW_FILES} or more: raise the hard limit (ulimit -Hn, /etc/security/limits.conf)"
        return Finding("warning", "open files", found, advice)
    return Finding("ok", "open files", found)
