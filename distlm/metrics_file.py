"""The lines of attempts/NNN/metrics.jsonl: what is written, and how a file is read from either end.

One JSON object a line, each with a `kind`:

    metrics   step, incarnation, timestamp_ms, values   what rank 0 measured; `step` is the optimizer step
    system    the same                                  what one node measured; `step` counts sampling intervals
    restore   step, incarnation, timestamp_ms           this incarnation began from the checkpoint of this step
    params, tags, dataset, artifact, status             what a tracker gets besides points (see tracking/delivery.py)
    event, failure, ...                                 whatever else was reported; kept for tools

NaN and infinities are written as the strings "NaN", "Infinity" and "-Infinity", because JSON has no such numbers. The
file is append-only, so a step that was trained again after a restore is in it twice; tracking/records.py tells which
one counts.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distlm.redact import redacted

_log = logging.getLogger(__name__)

POINT_KINDS = ("metrics", "system")

_BLOCK_BYTES = 64 * 2**10


def encode_line(message: Mapping[str, Any]) -> bytes:
    if message["kind"] not in (*POINT_KINDS, "artifact"):
        message = redacted(message)
    text = json.dumps(finite(message), ensure_ascii=False, separators=(",", ":"), default=str)
    return f"{text}\n".encode(errors="backslashreplace")  # names of files may hold anything


def finite(value: Any) -> Any:
    """`value` with every non-finite number in it written as a string that float() reads back."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
    return value


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The messages of a metrics.jsonl from byte `start` on, each with the offset of its line's end.

    A file that does not exist has none. A last line without its newline is still being written, or its writer was
    killed: it is left out. A damaged line elsewhere is left out with a warning.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        end = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                message = _decoded(line)
            except _DAMAGES:
                _log.warning("%s: the line that ends at byte %d is damaged and left out", path, end)
                continue
            yield end, message


_DAMAGES = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _decoded(line: bytes) -> dict[str, Any]:
    """Raises one of _DAMAGES."""
    message: dict[str, Any] = json.loads(line)
    if message["kind"] in POINT_KINDS:
        message["values"] = {key: float(value) for key, value in message["values"].items()}
    return message


def read_backwards(path: Path, *needles: bytes) -> Iterator[dict[str, Any]]:
    """The messages of a metrics.jsonl, the last one first, whose line holds one of `needles`.

    As far as they are asked for, and no further: how long this takes does not depend on the size of the file. Lines
    that are damaged or still being written are left out, as `read_lines` does.
    """
    for line in _lines_backwards(path):
        if any(needle in line for needle in needles):
            try:
                yield _decoded(line)
            except _DAMAGES:
                continue


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """All whole lines, the last one first."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        position = file.seek(0, os.SEEK_END)
        rest = b""  # of the line that begins before what has been read
        is_end = True
        while position:
            size = min(_BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            if is_end and lines:  # what follows the last newline
                lines.pop()
                is_end = False
            yield from reversed(lines)
        if not is_end:
            yield rest


def cut_torn_line(path: Path) -> None:
    """Remove a last line without newline, left by a controller that was killed, or found no room, while writing."""
    try:
        with open(path, "rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)
    except FileNotFoundError:
        return
