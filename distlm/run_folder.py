"""The folder of a run: the one place that spells its paths and writes its small files.

    RUNS_DIR/
      cache/FINGERPRINT/          tokenised data and trained tokenizers, shared by runs
      mlflow.db, mlartifacts/     the embedded MLflow store, when no tracking URI is given
      RUN_ID/
        run.yaml                  training semantics, immutable
        lease                     held by the controller that may write here
        init/                     initial weights, tokenizer and what was prepared once for the run
        checkpoints/step-00000100/
        model/                    the trained model in Hugging Face format
        attempts/001/             attempt.yaml, job.json, handle.json, cancel.json, result.json, metrics.jsonl, logs/,
                                  and with what it ran: code/, environment.txt, data.json

Both planes meet here, so this module uses only the standard library and yaml.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from distlm.errors import InputError

COMMAND_FD = "DISTLM_COMMAND_FD"
"""Environment variable: file descriptor of a socket to the command that waits for the attempt. The controller sends it
events (see `distlm.view`), one line of JSON each; the other end closes when the command is gone."""

OUTPUT_LOG = "output.log"
NUM_OWN_NODES = "DISTLM_NUM_OWN_NODES"
"""Environment variable: how many Ray nodes are being started for this attempt alone, of the cluster at RAY_ADDRESS. The
controller waits for them, and runs on one of them."""

REPLACES_NODES = "DISTLM_REPLACES_NODES"
"""Environment variable, set where a node of the cluster that leaves is replaced by another one: it is waited for."""


def new_run_id() -> str:
    """UTC time and 6 random characters, such as 20260131-235959-3fa9c1: unique, and sorts by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def run_created_s(run_id: str) -> float:
    """When a run was made, in seconds since the epoch, from the beginning of its id. Raises ValueError."""
    return datetime.strptime(run_id[:15], "%Y%m%d-%H%M%S").replace(tzinfo=UTC).timestamp()


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text`, so that a reader sees the old file or the new one and never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:  # names of files may hold anything
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` at the end of the block, and is removed if the block raises.

    `path` may be an empty folder, or with `replace` any. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        follow_umask(*temporary.glob("*.safetensors"))
        if replace and path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def follow_umask(*files: Path) -> None:
    """Give new files the mode that the umask gives, which that of their folder tells: the library safetensors makes its
    files for their owner alone, and a group that shares the runs could not read them."""
    for file in files:
        with suppress(OSError):  # of storage that has no modes
            file.chmod(file.parent.stat().st_mode & 0o666)


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file. Raises InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def is_there(path: Path) -> bool:
    """Whether a file exists that another host may have just made. NFS remembers for up to a minute that a name was not
    there, unless its folder is opened anew."""
    try:
        return path in path.parent.iterdir()
    except OSError:
        return False


class _Dumper(yaml.SafeDumper):
    """Quotes all text that YAML 1.2, in which users' configs are read, would take for a number, such as 1e5 or 08."""


for _tag, _pattern in (
    ("int", r"[-+]?[0-9][0-9_]*"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))


def dump_yaml(data: Any) -> str:
    """YAML text that reads the same as a config and in `read_yaml`."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_yaml(path: Path, data: Any) -> None:
    write_atomically(path, dump_yaml(data))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file that was written here. Raises InputError if it is missing or damaged."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from None


@dataclass(frozen=True)
class AttemptFolder:
    """attempts/NNN/ of a run: one uninterrupted stretch of it on one target."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def attempt_yaml(self) -> Path:
        return self.path / "attempt.yaml"

    @property
    def handle_json(self) -> Path:
        return self.path / "handle.json"

    @property
    def job_json(self) -> Path:
        """The handle of the job, on a target with a queue: see `distlm.launchers.base.Job`."""
        return self.path / "job.json"

    @property
    def job_config_yaml(self) -> Path:
        """What the config said, of a job that was given one and may be given another one when it begins again."""
        return self.path / "job_config.yaml"

    @property
    def job_script(self) -> Path:
        """What was sent to a target with a queue."""
        return self.path / "job.sh"

    @property
    def cancel_json(self) -> Path:
        """What `distlm cancel` asks of the controller: {"save": true}, or false to stop now."""
        return self.path / "cancel.json"

    @property
    def result_json(self) -> Path:
        return self.path / "result.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def metrics_sent_json(self) -> Path:
        return self.path / "metrics.sent.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def preparation_json(self) -> Path:
        return self.path / "preparation.json"

    @property
    def controller_log(self) -> Path:
        return self.logs / "controller.log"

    def worker_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.log"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def code_json(self) -> Path:
        return self.code / "code.json"

    @property
    def environment_txt(self) -> Path:
        return self.path / "environment.txt"

    @property
    def data_json(self) -> Path:
        return self.path / "data.json"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def evaluations(self) -> Path:
        """Tables of the evaluations, a folder for each step."""
        return self.path / "evaluations"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def ray_train(self) -> Path:
        """For Ray's bookkeeping, which nothing reads."""
        return self.path / "ray_train"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.path.parent.parent)

    @property
    def output_log(self) -> Path:
        """What the command that waits for the attempt shows, in lines."""
        return self.logs / OUTPUT_LOG

    def reserve(self, name: str) -> Path:
        """Room for the file `name`, held in case that the storage gets full."""
        return self.path / f".{name}.reserve"


@dataclass(frozen=True)
class RunFolder:
    """RUNS_DIR/RUN_ID/."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path, run_id: str) -> RunFolder:
        path = runs_dir.absolute() / run_id
        path.mkdir(parents=True)
        return cls(path)

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def created_s(self) -> float | None:
        """When it was made, in seconds since the epoch; None: its name is no id, such as that of a copy."""
        with suppress(ValueError):
            if re.fullmatch(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}", self.run_id):
                return run_created_s(self.run_id)
        return None

    @property
    def runs_dir(self) -> Path:
        return self.path.parent

    @property
    def cache(self) -> Path:
        return self.runs_dir / "cache"

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def lease(self) -> Path:
        return self.path / "lease"

    @property
    def init(self) -> Path:
        return self.path / "init"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def model_upload_json(self) -> Path:
        return self.path / "model_upload.json"

    def attempts(self) -> list[AttemptFolder]:
        """All attempts, oldest first; what has another name than a number is none."""
        found = [AttemptFolder(path) for path in self.path.glob("attempts/*") if path.name.isdecimal()]
        return sorted(found, key=lambda attempt: attempt.number)

    def new_attempt(self) -> AttemptFolder:
        attempts = self.attempts()
        number = attempts[-1].number + 1 if attempts else 1
        attempt = AttemptFolder(self.path / "attempts" / f"{number:03d}")
        attempt.logs.mkdir(parents=True)
        return attempt


def user_request(attempt: AttemptFolder) -> dict[str, Any] | None:
    """What `distlm cancel` has asked of the attempt; None: nothing, or it was a pod that is about to end."""
    request = read_json(attempt.cancel_json) if is_there(attempt.cancel_json) else None
    return request if isinstance(request, dict) and "reason" not in request else None


def runs_in(runs_dir: Path) -> list[RunFolder]:
    """Every folder that is, or was to become, a run's: newest first, and last those whose name is no id. Raises OSError
    if the folder cannot be read."""
    found = [RunFolder(path) for path in runs_dir.absolute().iterdir()] if runs_dir.is_dir() else []
    return sorted(filter(_looks_like_a_run, found), key=lambda run: (run.created_s or 0.0, run.run_id), reverse=True)


def _looks_like_a_run(run: RunFolder) -> bool:
    if run.run_id.startswith("."):
        return False
    if run.run_yaml.is_file() or (run.path / "attempts").is_dir():
        return True
    return run.created_s is not None and run.path.is_dir()


def process_name(pid: int, host: str) -> str:
    """How the holder of a lease is named."""
    return f"process {pid} on {host}"


@contextmanager
def lease(run: RunFolder) -> Iterator[None]:
    """The right to write into the run's folder: one controller at a time. Released by the kernel if we are killed."""
    with open(run.lease, "a+", encoding="utf-8") as file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"run {run.run_id} is being trained by {file.read().strip() or 'another process'}"
            ) from None
        file.truncate(0)
        file.write(f"{process_name(os.getpid(), socket.gethostname())}\n")
        file.flush()
        yield


_LEASE_PATIENCE_S = 0.5


def _lock(file: TextIO) -> None:
    """Take the exclusive lock. Raises BlockingIOError if another process keeps one: `lease_holder` has one for an
    instant only, which is waited for."""
    deadline = time.monotonic() + _LEASE_PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def lease_holder(run: RunFolder) -> str | None:
    """Who holds the lease, such as "process 17 on node3"; None: nobody. Changes nothing and keeps nobody out.

    A shared lock is tried, and given back at once, because only the file system knows of a holder on another host or in
    another container; /proc/locks does not. Raises OSError if the file cannot be read.
    """
    try:
        with open(run.lease, encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
            fcntl.flock(file, fcntl.LOCK_UN)
    except FileNotFoundError:
        pass
    return None
