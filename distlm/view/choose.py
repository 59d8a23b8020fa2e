"""Which view a command shows an attempt in:

--json                      JSON lines
DISTLM_VIEW=plain or live   that one, wherever the output goes
otherwise                   live on a terminal that can move its cursor; plain lines in pipes, files, CI and on
                            dumb terminals
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TextIO

from distlm.errors import InputError, Problem
from distlm.view import View
from distlm.view.plain import JsonView, PlainView

VIEW_VARIABLE = "DISTLM_VIEW"


def make_view(as_json: bool) -> View:
    """A view on standard output. Raises InputError where DISTLM_VIEW names none."""
    stream = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed by whoever started us
    if isinstance(stream, TextIOWrapper):  # a character that the locale has not is no reason to lose a line
        stream.reconfigure(encoding="utf-8" if as_json else None, errors="replace")
    if as_json:
        return JsonView(stream)
    wanted = check_view()
    if wanted == "live" or (not wanted and _suits_live(stream)):
        from distlm.view.live import LiveView  # rich takes 0.1 s to import

        return LiveView(stream)
    return PlainView(stream)


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
