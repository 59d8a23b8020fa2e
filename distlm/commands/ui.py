"""`distlm ui`: the MLflow UI, on the embedded store or on where a run is recorded.

A tracking server has its UI already, so its address is printed. For a store without a server one is started, and ended
with this command: it runs in a session of its own, as a child, so that Ctrl-C, SIGTERM or the death of this process
leaves none of its processes behind, and so that what it prints, which no user needs, can be kept until it fails.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from distlm.commands.find import find_run
from distlm.config.attempt import current_tree
from distlm.config.load import expanded
from distlm.console import say
from distlm.errors import ExitCode, InfrastructureError, InputError, Problem
from distlm.mlflow_store import choose_tracking_uri, embedded_store, mlflow_run_id
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder
from distlm.stop_count import interrupted_by_signals
from distlm.view.ending import command

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1  # prctl.h
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


@dataclass(frozen=True)
class _Page:
    """What `--json` prints: one line."""

    url: str
    tracking_uri: str
    """Without secrets."""
    run_id: str | None
    """The run that was asked for; null: none was."""
    mlflow_run_id: str | None
    """null: none was asked for, or MLflow has nothing of it yet, and `url` is that of the UI."""


def ui(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run) if options.run else None
    uri = _tracking_uri(run) if run else embedded_store(options.runs_dir)
    run_id, mlflow_id = (run.run_id, mlflow_run_id(run)) if run else (None, None)
    path = f"/#/runs/{mlflow_id}" if mlflow_id else ""  # leads on to the page in the run's experiment

    def announce(base: str, whose: str) -> None:
        page = _Page(base + path, redact_uri(uri), run_id, mlflow_id)
        if options.json:
            say(json.dumps(asdict(page)))
        else:
            say(f"{whose} {page.url}")
            if run and not mlflow_id:
                say(f"it has nothing of run {run_id} yet ({command(run, 'sync')} sends what is missing)")
        if options.open:
            _open_browser(page.url)

    if uri.startswith(("http://", "https://")):
        announce(_without_secrets(uri), "the tracking server's UI is on")
        return ExitCode.SUCCEEDED
    _require_store(uri, run.runs_dir if run else options.runs_dir)
    _require_free_port(options.host, options.port)
    ended = "" if options.json else " (Ctrl-C ends it)"
    base = f"http://{_for_url(options.host)}:{options.port}"
    with interrupted_by_signals(), _server(uri, options.host, options.port) as (server, output):
        _wait_until_it_answers(server, output, base)
        announce(base, f"MLflow UI{ended} on")
        server.wait()
        raise _failure(server, output)


def _tracking_uri(run: RunFolder) -> str:
    """Where a run is recorded, as its last resume left it. Raises InputError."""
    try:
        tracking = current_tree(run)["tracking"]
        is_in_mlflow, written = "mlflow" in tracking["report_to"], tracking["tracking_uri"]
        if not isinstance(written, (str, type(None))):
            raise TypeError("tracking.tracking_uri is no text")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run.run_yaml} or an attempt.yaml is damaged: {type(error).__name__}: {error}") from error
    if not is_in_mlflow:
        raise InputError(
            f"tracking.report_to of run {run.run_id} does not name mlflow; its metrics are in "
            f"{run.path}/attempts/*/metrics.jsonl, the newest ones in: {command(run, 'status')}"
        )
    return choose_tracking_uri(expanded(written, "tracking.tracking_uri"), run.runs_dir)


def _require_store(uri: str, runs_dir: Path) -> None:
    """Raises InputError for what no UI can be started on."""
    if uri == embedded_store(runs_dir) and not (runs_dir / "mlflow.db").is_file():
        raise InputError(
            f"there is no embedded MLflow store in {runs_dir} yet; use --runs-dir for another folder, or name a run, "
            "also one that is recorded on a server: distlm ui RUN"
        )
    if find_spec("mlflow") is None:
        raise InputError("the MLflow UI needs mlflow: pip install 'distlm[train]'")


def _require_free_port(host: str, port: int) -> None:
    """Raises InputError, before seconds are spent on starting."""
    if not 0 < port < 65536:
        raise InputError(Problem("must be from 1 to 65535", "--port", str(port)))
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        advice = f"use another one, such as --port {port + 1}" if port + 1 < 65536 else "use another --port"
        message = f"cannot listen on port {port} of {host}: {error.strerror or error}; {advice}"
        raise InputError(message) from None


# --- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def _server(uri: str, host: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """MLflow's server on a store, and what it prints. It ends with the block."""
    command = [
        sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1",
        "--uvicorn-opts", shlex.join(["--log-level", "warning"]),
    ]  # fmt: skip
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # may hold a password, so it is no argument
        "MLFLOW_REGISTRY_STORE_URI": uri,
        # Job execution starts 8 more processes of 250 MB each, which nothing here uses.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",
    }
    libc = ctypes.CDLL(None)  # loaded here: the child of a fork had better not
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            # It passes SIGTERM on to what it has started.
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )  # fmt: skip
        try:
            yield server, output
        finally:
            _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    """All of its processes. It writes nothing that a kill could tear: the store is a database."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it is ending already
        signal.signal(number, signal.SIG_IGN)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_END_TIMEOUT_S)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_until_it_answers(server: subprocess.Popen[bytes], output: IO[bytes], base: str) -> None:
    """Raises InfrastructureError if it ends, or does not answer in time."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not lead to this machine
    deadline = time.monotonic() + _START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"{base}/health", timeout=5):
                return
        except urllib.error.HTTPError:  # an answer, though another one than expected
            return
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
    raise _failure(server, output)


def _failure(server: subprocess.Popen[bytes], output: IO[bytes]) -> InfrastructureError:
    output.seek(0)
    last = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()][-10:]
    how = "does not answer" if server.poll() is None else f"has ended (exit code {server.returncode})"
    return InfrastructureError("\n".join([f"the MLflow server {how}", *(redact_uri(line) for line in last)]))


# --- addresses -------------------------------------------------------------------------------------------------------


def _for_url(host: str) -> str:
    """A host that a browser can ask: not 0.0.0.0, which means every address of this machine."""
    host = _WILDCARDS.get(host, host)
    return f"[{host}]" if ":" in host else host


def _without_secrets(uri: str) -> str:
    """The address of a server without user, password and query: the browser asks for them."""
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def _open_browser(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        say("distlm: warning: no browser was found here; open the address yourself", file=sys.stderr)
