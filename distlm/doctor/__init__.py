"""What a machine has, and lacks, for training: `distlm doctor`.

Looks only: nothing is installed, changed or left behind. Works in the base install; torch alone is imported, in a child
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "missing"]
"""missing: no run can train here; warning: some cannot, or it will be slower, or less is recorded."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""
    """What to do; empty: nothing."""
