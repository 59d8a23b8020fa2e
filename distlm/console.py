"""What commands print for people and programs, and how they end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import TextIO

from distlm.errors import DistlmError, ExitCode
from distlm.redact import redact_uri


def make_printable() -> None:
    """From now on everything can be printed: letters that stdout has not become "?", and nobody reads what is closed.

    What is meant for programs is ASCII.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif name == "stdout" and isinstance(stream, TextIOWrapper):  # stderr writes such letters as \uXXXX
            stream.reconfigure(errors="replace")


def say(text: str = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print, at once. A reader that has gone (`| head`, a terminal that hung up) loses the rest, which changes neither
    what the command does nor its exit code."""
    stream = file or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        discard(stream)


def discard(stream: TextIO) -> None:
    """Let go what `stream` still holds and what is written to it from now on: at exit Python would try to write it
    again, fail, and end with code 120."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def printable(value: object) -> str:
    """Text in one line without control characters: names of files and runs may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as it is typed in the current folder; one that is far from there, in full."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; an error ends as text on stderr, without a traceback.

    Mistakes of ours are raised.
    """
    make_printable()
    try:
        return int(command())
    except DistlmError as error:
        text, code = str(error), error.exit_code
    except ModuleNotFoundError as error:
        text, code = f"{error.name} is not installed here; run: pip install 'distlm[train]'", ExitCode.BAD_INPUT
    except OSError as error:
        text = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        code = ExitCode.INFRASTRUCTURE
    except KeyboardInterrupt:
        return int(ExitCode.CANCELLED)
    for line in text.splitlines():
        say(f"distlm: {redact_uri(line)}", file=sys.stderr)
    return int(code)
