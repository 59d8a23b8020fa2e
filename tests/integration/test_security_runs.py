"""What a run opens, stores and says, looked at from outside while it trains and when it has ended.

One run for all: with secrets in the addresses of its data and of its MLflow server, and under a umask that lets the
group write and others do nothing.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from place import CONFIG, Place
from test_mlflow import free_port, mlflow_server

from distlm.errors import ExitCode
from distlm.run_folder import RunFolder

STORE_SECRET, DATA_SECRET, OTHER_SECRET = "canary-of-the-store", "canary-of-the-data", "canary-of-the-user"
UMASK = 0o007
ASK_RAY = """
import sys
from ray._raylet import GcsClient
try:
    nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
except Exception as error:
    print("refused", type(error).__name__, error)
else:
    print("answered", len(nodes))
"""


class Corpus(SimpleHTTPRequestHandler):
    """Gives the files of a folder to those who know the token."""

    def send_head(self) -> object:
        path, _, query = self.path.partition("?")
        if query != f"token={DATA_SECRET}":
            return self.send_error(403, f"not with {query}")
        self.path = path
        return super().send_head()  # type: ignore[no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass(frozen=True)
class Seen:
    """What was found while the run trained, and what it left."""

    place: Place
    run: RunFolder
    addresses: set[str]
    """On which its processes listened, each with the command."""
    clients: dict[str, str]
    """What Ray said to clients, by their token."""
    ray_token: str
    ray_folder_mode: int
    output: str


def listening(processes: Iterable[psutil.Process]) -> Iterator[tuple[str, int, str]]:
    """Address, port and command."""
    for process in processes:
        try:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip, connection.laddr.port, " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            continue


def ask_ray(address: str, place: Place, **environ: str) -> str:
    command = [sys.executable, "-c", ASK_RAY, address]
    return subprocess.run(
        command, env=place.environ | environ, cwd=place.folder, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("security")
    config = CONFIG | {
        "data": {
            **CONFIG["data"],  # type: ignore[dict-item]
            "train": [{"source": "datasets", "path": "json", "data_files": ["${CORPUS}"]}],
        },
        "training": CONFIG["training"] | {"max_steps": 150, "save_steps": 150, "eval_steps": 150},  # type: ignore[operator]
        "tracking": {"tracking_uri": "http://me:${STORE}@127.0.0.1:${PORT}"},
        "resources": {"num_workers": 2, "device": "cpu"},
    }
    place = Place(folder / "user", config)
    port = free_port()
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Corpus, directory=str(place.folder)))
    threading.Thread(target=web.serve_forever, daemon=True).start()
    place.environ |= {
        "STORE": STORE_SECRET, "PORT": str(port), "HF_TOKEN": OTHER_SECRET,
        "CORPUS": f"http://127.0.0.1:{web.server_port}/corpus.jsonl?token={DATA_SECRET}",
    }  # fmt: skip
    (folder / "server").mkdir()
    with mlflow_server(folder / "server", port):
        before = os.umask(UMASK)
        try:
            command = place.start("submit", "run.yaml")
        finally:
            os.umask(before)
        command.wait_for("step   5/150")
        worker = next(one for one in place.processes() if one.cmdline()[0].startswith("ray::RayTrainWorker"))
        worker.suspend()  # the training waits for it
        try:
            head = next(one for one in place.processes() if one.name() == "gcs_server")
            address = next(f"127.0.0.1:{port}" for ip, port, _ in listening([head]))
            root, token = Path(head.environ()["RAY_TMPDIR"]), head.environ()["RAY_AUTH_TOKEN"]
            addresses = {f"{ip} {what}" for ip, _, what in listening(place.processes())}
            clients = {
                "right": ask_ray(address, place, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
                "wrong": ask_ray(address, place, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
                "none": ask_ray(address, place, RAY_AUTH_MODE="disabled"),
            }
            mode = stat.S_IMODE(root.stat().st_mode)
        finally:
            worker.resume()
        assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
        yield Seen(place, command.run, addresses, clients, token, mode, command.out + command.err)
    web.shutdown()


def test_everything_listens_on_loopback_alone(seen: Seen) -> None:
    # Ray's services, one port of each worker, torch's store and gloo.
    assert len(seen.addresses) > 5
    wide = [line for line in seen.addresses if not is_loopback(line.partition(" ")[0])]
    assert not wide


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_ray_answers_only_with_the_token(seen: Seen) -> None:
    assert seen.clients["right"].startswith("answered 1")
    assert seen.clients["wrong"].startswith("refused")
    assert seen.clients["none"].startswith("refused")


def test_the_token_is_for_the_user_alone_and_stored_nowhere(seen: Seen) -> None:
    assert len(seen.ray_token) == 64
    assert seen.ray_folder_mode == 0o700
    assert not holding(seen.place.folder, seen.ray_token)
    assert not list(seen.place.home.iterdir())


@pytest.mark.parametrize("secret", [STORE_SECRET, DATA_SECRET, OTHER_SECRET])
def test_no_secret_is_stored_or_said(seen: Seen, secret: str) -> None:
    assert "curves: http://***@127.0.0.1" in seen.output
    assert secret not in seen.output
    assert not holding(seen.place.folder, secret)
    server = seen.place.folder.parent / "server"
    assert (server / "server.db").stat().st_size > 0 and list((server / "files").rglob("run.yaml"))
    assert not holding(server, secret)


def holding(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_files_have_the_modes_that_the_umask_gives(seen: Seen) -> None:
    paths = [seen.run.path, *seen.place.runs_dir.rglob("*")]
    assert {"checkpoints", "model", "init", "cache"} <= {path.name for path in paths}
    wrong = {
        str(path.relative_to(seen.place.folder)): oct(mode)
        for path in paths
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~UMASK
    }
    assert not wrong
