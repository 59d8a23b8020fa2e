"""Folders, ports and services that a run uses."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from distlm.doctor import Finding, findings
from distlm.redact import redact_uri
from distlm.temporary import stale_temporary_roots, temporary_base

_SERVICE_TIMEOUT_S = 3.0
_UI_PORT = 5000
_LITTLE_GIB = 5.0
_LITTLE_TEMPORARY_GIB = 1.0
_SCHEMES = {"http": 80, "https": 443}


def check_surroundings(runs_dir: Path) -> Iterator[Finding]:
    return findings(
        {
            "runs folder": lambda: _check_runs_dir(runs_dir.absolute()),
            "temporary files": _check_temporary_folder,
            "loopback network": _check_loopback,
            f"port {_UI_PORT}": _check_ui_port,
            "RAY_ADDRESS": _check_ray_address,
            "MLFLOW_TRACKING_URI": _check_tracking_uri,
        }
    )


def _check_runs_dir(runs_dir: Path) -> Iterator[Finding]:
    subject = "runs folder"
    try:
        nearest = next(path for path in (runs_dir, *runs_dir.parents) if path.exists())
    except OSError as error:  # a parent that cannot be read, or a name that cannot be one
        yield Finding("missing", subject, f"{runs_dir}: {error.strerror}", "choose another one: runs_dir in the config")
        return
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        advice = "choose another one: runs_dir in the config"
        yield Finding("missing", subject, f"nothing can be written to {nearest}", advice)
        return
    advice = "each checkpoint takes 12 bytes per parameter, and the cache about as much as the data"
    yield _room(subject, nearest, _LITTLE_GIB, advice)
    if runs_dir.is_dir():
        try:
            with tempfile.TemporaryFile(dir=runs_dir) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = "runs are kept apart by it: use another file system, or mount this one with locks"
            yield Finding("missing", "file locks", f"flock does not work in {runs_dir}: {error.strerror}", advice)


def _check_temporary_folder() -> Iterator[Finding]:
    subject = "temporary files"
    try:
        base = Path(temporary_base())
    except OSError as error:
        yield Finding("missing", subject, f"no folder can be written to: {error}", "set TMPDIR to one that can")
        return
    if not (base.is_dir() and os.access(base, os.W_OK | os.X_OK)):
        why = f"TMPDIR ({tempfile.gettempdir()}) is too long for Ray's sockets, and nothing can be written to {base}"
        yield Finding("missing", subject, why, "set TMPDIR to a folder of 24 characters or fewer")
        return
    yield _room(subject, base, _LITTLE_TEMPORARY_GIB, "Ray's logs go there; set TMPDIR to a folder with more")
    stale = list(stale_temporary_roots())
    if stale:
        remove = shlex.join(["rm", "-r", *map(str, stale)])
        yield Finding("warning", "killed runs", f"{len(stale)} folders of their Ray are left", remove)


def _room(subject: str, folder: Path, little_gib: float, advice: str) -> Finding:
    free_gib = shutil.disk_usage(folder).free / 2**30
    is_little = free_gib < little_gib
    return Finding(
        "warning" if is_little else "ok", subject, f"{free_gib:.1f} GiB free in {folder}", advice if is_little else ""
    )


def _check_loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), _SERVICE_TIMEOUT_S).close()
        return Finding("ok", "loopback network", "127.0.0.1 answers")
    except OSError as error:
        advice = "bring it up: ip link set lo up; Ray and the workers talk over it"
        return Finding("missing", "loopback network", f"127.0.0.1 does not answer: {error.strerror or error}", advice)


def _check_ui_port() -> Finding:
    subject = f"port {_UI_PORT}"
    try:
        socket.create_server(("127.0.0.1", _UI_PORT)).close()
        return Finding("ok", subject, "free, for distlm ui")
    except OSError as error:
        return Finding("warning", subject, error.strerror or str(error), f"distlm ui --port {_UI_PORT + 1}")


def _check_ray_address() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return
    shown = f"{redact_uri(address)} (runs train on that cluster)"
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdecimal()):
        yield Finding("ok", "RAY_ADDRESS", f"{shown}; it names no host and port, so it was not tried")
    elif problem := _unreachable(host.strip("[]"), int(port)):
        yield Finding("missing", "RAY_ADDRESS", f"{shown}: {problem}", "start the cluster, or unset RAY_ADDRESS")
    else:
        yield Finding("ok", "RAY_ADDRESS", f"{shown}, answers")


def _check_tracking_uri() -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return
    shown, advice = redact_uri(uri), "start the server; what it misses, `distlm sync RUN` sends later"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port or _SCHEMES.get(parts.scheme)
    except ValueError as error:
        yield Finding("warning", "MLFLOW_TRACKING_URI", f"{shown}: {error}", "correct it, or unset it")
        return
    if not (host and port):
        yield Finding("ok", "MLFLOW_TRACKING_URI", f"{shown}; no server, so it was not tried")
    elif problem := _unreachable(host, port):
        yield Finding("warning", "MLFLOW_TRACKING_URI", f"{shown}: {problem}", advice)
    else:
        yield Finding("ok", "MLFLOW_TRACKING_URI", f"{shown}, answers")


def _unreachable(host: str, port: int) -> str:
    """Why nothing listens there; empty: something does."""
    try:
        socket.create_connection((host, port), _SERVICE_TIMEOUT_S).close()
        return ""
    except (OSError, OverflowError, UnicodeError) as error:
        return f"does not answer ({getattr(error, 'strerror', None) or error})"
