"""What a worker's process sets up before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import re
from distlm.devices import prepare_process_for_torch
prepare_process_for_torch(1)
import torch

def mib(kind):
    return int(re.search(kind + ": +([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1]) // 1024

torch.ones(7 * 2**20)  # the C library would keep the memory of whatever is smaller than what was freed once
tensors = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each
huge_mib = mib("AnonHugePages")
before_mib = mib("Rss")
kept = [torch.ones(2**14) for _ in range(20)]  # 64 KiB each, behind the large ones
del tensors
print(torch.get_num_threads(), huge_mib, before_mib - mib("Rss"))
"""


def measure(**chosen: str) -> tuple[int, int, int]:
    """Threads, MiB of 128 that lie in huge pages, and MiB of these that are given back when they are freed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("THP_", "MALLOC_"))} | chosen
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    num_threads, huge_mib, freed_mib = map(int, done.stdout.split())
    return num_threads, huge_mib, freed_mib


def test_freed_tensors_go_back_to_the_system() -> None:
    num_threads, _, freed_mib = measure()
    assert num_threads == 1
    assert freed_mib > 100
    assert measure(MALLOC_MMAP_THRESHOLD_=str(32 * 2**20))[2] < 50, "the user's own choice, and the difference it makes"


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="no huge pages for those who ask"
)
def test_large_tensors_lie_in_huge_pages_unless_the_user_says_no() -> None:
    assert measure()[1] > 64
    assert measure(THP_MEM_ALLOC_ENABLE="0")[1] < 32
