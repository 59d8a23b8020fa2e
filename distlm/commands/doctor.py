"""`distlm doctor`: what this machine has and lacks for training.

`--json` prints an array of objects with verdict (ok, warning, missing), subject, found and advice.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from distlm.console import printable, say
from distlm.doctor.hardware import check_hardware
from distlm.doctor.software import check_software
from distlm.doctor.surroundings import check_surroundings
from distlm.errors import ExitCode

_SUBJECT_WIDTH = 21


def doctor(options: argparse.Namespace) -> int:
    findings = []
    for checks in (check_software(), check_hardware(), check_surroundings(options.runs_dir)):
        for one in checks:
            findings.append(one)
            if not options.json:
                say(f"{one.verdict:<8} {one.subject:<{_SUBJECT_WIDTH}} {printable(one.found)}")
                if one.advice:
                    say(f"{'':<8} {'':<{_SUBJECT_WIDTH}} -> {printable(one.advice)}")
    missing = sum(one.verdict == "missing" for one in findings)
    warnings = sum(one.verdict == "warning" for one in findings)
    if options.json:
        say(json.dumps([asdict(one) for one in findings], indent=2))
    elif missing:
        say(f"\n{missing} missing, {warnings} warnings: nothing can train here yet")
    else:
        say(f"\nall that training needs is here; {warnings} warnings")
    return ExitCode.INFRASTRUCTURE if missing else ExitCode.SUCCEEDED
