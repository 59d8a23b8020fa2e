"""To which class of causes an exception belongs that nobody has raised on purpose. Standard library only."""

from __future__ import annotations

import errno

from distlm.errors import Cause, DistlmError, ExitCode

_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG)

# How libraries say it that raise plain RuntimeErrors, lower-case.
_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "bad allocation",
    "cublas_status_alloc_failed",
    "malloc of size",
)
_STORAGE_SIGNS = ("no space left on device", "disk quota exceeded", "read-only file system", "input/output error")
_HANG_SIGNS = ("timed out waiting", "watchdog caught collective operation timeout", "ran for longer than")
_HANG_TYPES = ("NCCLHangError", "WorkerHealthCheckTimeoutError", "BroadcastCollectiveTimeoutError")
"""Ray Train's."""

# What a rank says when another one is gone: the consequence of a failure, not its cause.
_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection refused",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "Timed out waiting",
    "ProcessGroupGloo",
    "ProcessGroupNCCL",
)


def cause_of(error: BaseException) -> Cause:
    """The class of an exception."""
    if isinstance(error, DistlmError):
        return error.cause
    text = str(error).lower()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Cause.OUT_OF_MEMORY
    if _has_errno(error, errno.ENOMEM) or any(sign in text for sign in _MEMORY_SIGNS):
        return Cause.OUT_OF_MEMORY
    if _has_errno(error, *_STORAGE_ERRORS) or any(sign in text for sign in _STORAGE_SIGNS):
        return Cause.STORAGE
    if type(error).__name__ in _HANG_TYPES or any(sign in text for sign in _HANG_SIGNS):
        return Cause.HANG
    if isinstance(error, UnicodeError):
        return Cause.USER_DATA
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "ray":
        return Cause.INFRASTRUCTURE
    return Cause.CODE


def exit_code_of_cause(cause: Cause) -> ExitCode:
    """Whether the same again would fail again (1), or perhaps not (3)."""
    again = {Cause.STORAGE, Cause.INFRASTRUCTURE, Cause.NODE_LOST, Cause.HANG}
    return ExitCode.INFRASTRUCTURE if cause in again else ExitCode.FAILED


def is_consequence(message: str) -> bool:
    """Whether it is what a worker says when another one has gone."""
    return any(sign in message for sign in _CONSEQUENCES)


def _has_errno(error: BaseException, *numbers: int) -> bool:
    return isinstance(error, OSError) and error.errno in numbers
