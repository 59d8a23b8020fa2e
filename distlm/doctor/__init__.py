"""What a machine has, and lacks, for training: `distlm doctor`.

Looks only: nothing is installed, changed or left behind. Works in the base install; torch alone is imported, in a child
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


Checks = Mapping[str, Callable[[], Finding | Iterator[Finding]]]
"""By their subject."""


def findings(checks: Checks) -> Iterator[Finding]:
    """What the checks find; of one that the operating system does not let look, just that."""
    for subject, check in checks.items():
        try:
            found = check()
            yield from (found,) if isinstance(found, Finding) else found
        except OSError as error:
            text = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
            yield Finding("warning", subject, f"cannot be checked: {text}")
