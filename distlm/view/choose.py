"""Which view a command shows an attempt in:

--json                      JSON lines
DISTLM_VIEW=plain or live   that one, wherever the output goes
otherwise                   live on a terminal that can move its cursor; plain lines in pipes, files, CI and on
                            dumb terminals
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from distlm.errors import InputError, Problem
from distlm.view import View
from distlm.view.plain import JsonView, PlainView

VIEW_VARIABLE = "DISTLM_VIEW"


def make_view(as_json: bool) -> View:
    """A view on standard output. Raises InputError where DISTLM_VIEW names none."""
    if as_json:
        return JsonView(sys.stdout)
    wanted = check_view()
    if wanted == "live" or (not wanted and _suits_live(sys.stdout)):
        from distlm.view.live import LiveView  # rich takes 0.1 s to import

        return LiveView(sys.stdout)
    return PlainView(sys.stdout)


def check_view() -> str:
    """Which view DISTLM_VIEW asks for; empty: none. Raises InputError."""
    wanted = os.environ.get(VIEW_VARIABLE, "")
    if wanted not in ("", "plain", "live"):
        raise InputError(Problem("allowed are plain and live; unset it to let distlm choose", VIEW_VARIABLE, wanted))
    return wanted


def _suits_live(stream: TextIO) -> bool:
    if not stream.isatty() or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        return False
    return os.environ.get("CI", "").lower() not in ("1", "true")
