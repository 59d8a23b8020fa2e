"""A real tracking server, for tests of outages."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from place import wait_until


def clean_environment(home: Path) -> dict[str, str]:
    """No tracking URI, an own home, and none of the names from which mlflow concludes that it is being tested."""
    hidden = ("MLFLOW_", "PYTEST_", "GITHUB_", "CI")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return environment | {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class MlflowServer:
    """A tracking server as the documentation says to start it, that may die and come back with what it had."""

    def __init__(self, folder: Path, port: int) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        self._folder, self._port = folder, port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Without waiting for it to answer."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        command += ["--artifacts-destination", str(self._folder / "files")]
        environment = clean_environment(self._folder) | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def wait_until_it_answers(self) -> None:
        process = self._process
        assert process is not None
        wait_until(lambda: process.poll() is not None or answers(f"{self.uri}/health"), 90, "the MLflow server")
        assert process.poll() is None, (self._folder / "server.log").read_text()

    def kill(self) -> None:
        """Without warning."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """One that answers; killed at the end of the block."""
    server = MlflowServer(folder, port)
    server.start()
    try:
        server.wait_until_it_answers()
        yield
    finally:
        server.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
