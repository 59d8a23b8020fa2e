"""Files in the safetensors format, written in one pass with their hash and read in ranges, in bounded memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, little endian; the
header, which maps each tensor's name to its dtype, shape and place; then the tensors' bytes. `safetensors.safe_open`
reads these files, too. The library itself serves neither need here: it hashes nothing, so that a file would be read
again after it was written, and it maps whole files into memory.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distlm.errors import CheckpointError, UnreadableError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Size of one element, by safetensors' name of the dtype."""
CHUNK_BYTES = 16 * 2**20
"""What is hashed, written or read in one go."""
_MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors itself sets
_MAX_DIMENSIONS = 64  # as in torch


class TensorInfo(NamedTuple):
    """One tensor of a file. `begin` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensor_file(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], content: Iterable[memoryview]
) -> tuple[int, str]:
    """Write a new file durably, and return its size in bytes and its SHA-256 in hex.

    Args:
        tensors: name -> (dtype, shape), in the order of the content.
        content: the bytes of all tensors one after the other, in contiguous pieces of any size.

    Raises:
        OSError: the storage failed; the file is then incomplete.
        ValueError: the content has more or fewer bytes than the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors writes them
    start = len(text).to_bytes(8, "little") + text

    digest = hashlib.sha256()
    size_bytes = 0
    with open(path, "xb", buffering=0) as file:
        for chunk in itertools.chain([memoryview(start)], _chunks(content)):
            digest.update(chunk)
            size_bytes += len(chunk)
            while chunk:
                chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    if size_bytes != len(start) + end:
        raise ValueError(f"{path} got {size_bytes - len(start)} bytes for tensors of {end}")
    return size_bytes, digest.hexdigest()


def _chunks(content: Iterable[memoryview]) -> Iterator[memoryview]:
    for piece in content:
        flat = piece.cast("B")
        for start in range(0, len(flat), CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES]


def one_line(error: Exception) -> str:
    """What an error says, fit for a terminal: it may quote a damaged file, at any length."""
    text = str(error)[:1000]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def read_error(path: Path, error: OSError) -> CheckpointError:
    """A file is missing, or the storage does not give it."""
    is_missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return (CheckpointError if is_missing else UnreadableError)(f"{path} cannot be read: {error.strerror}")


def require_regular_file(path: Path, *, follow_links: bool = True) -> int:
    """The size in bytes. Raises CheckpointError for what cannot simply be read: opening a named pipe would wait."""
    try:
        status = path.stat(follow_symlinks=follow_links)
    except OSError as error:
        raise read_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    return status.st_size


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """The header of a file, read and checked; `read_into` reads elements. Holds no descriptor between calls.

    Raises:
        CheckpointError: the file cannot be read, or is not in the safetensors format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size_bytes = require_regular_file(path)
        try:
            with open(path, "rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
                    raise ValueError("its header is longer than the file")
                self.tensors = _parse_header(json.loads(file.read(header_bytes)), 8 + header_bytes, size_bytes)
        except OSError as error:
            raise read_error(path, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is no safetensors file: {type(error).__name__}: {one_line(error)}"
            ) from error

    def read_into(self, destination: memoryview, name: str, first_element: int = 0) -> None:
        """Fill the contiguous `destination` with a tensor's bytes, from its element `first_element` on.

        Raises:
            CheckpointError: the tensor is not there, is too short, or cannot be read.
        """
        info = self.tensors.get(name)
        target = destination.cast("B")
        position = info.begin + first_element * ITEM_BYTES[info.dtype] if info else 0
        if info is None or first_element < 0 or position + len(target) > info.end:
            raise CheckpointError(f"{self.path} has no {len(target)} bytes from element {first_element} of {name}")
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(position)
                while target:
                    count = file.readinto(target[:CHUNK_BYTES])
                    if not count:
                        raise CheckpointError(f"{self.path} was truncated while it was read")
                    target = target[count:]
        except OSError as error:
            raise read_error(self.path, error) from error


def _parse_header(header: dict[str, Any], data_begin: int, size_bytes: int) -> dict[str, TensorInfo]:
    """The tensors in the order of their places, which must follow each other from the header to the file's end."""
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= size_bytes for n in numbers):
            raise ValueError(f"the place of {name} is not given in whole numbers within the file")
        if end - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError(f"the place of {name} does not fit its shape")
        tensors[name] = TensorInfo(entry["dtype"], shape, data_begin + begin, data_begin + end)
    position = data_begin
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for name, info in ordered:
        if info.begin != position:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        position = info.end
    if position != size_bytes:
        raise ValueError(f"its tensors end at byte {position} of {size_bytes}")
    return dict(ordered)
