"""What commands print for people and programs."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def say(text: str = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print, at once. A reader that has gone (`| head`) loses the rest, which changes neither what the command does nor
    its exit code."""
    stream = file or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
