"""A user's folder, and `distlm` commands that run in it with real Ray.

Every process that is started from a place inherits its HOME, which is a folder of its own: by that the processes that
a run has left behind are found.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from distlm.run_folder import RunFolder, read_json

MAX_SEQ_LENGTH, GLOBAL_BATCH, MICRO_BATCH, SEED = 32, 16, 4, 42
CONFIG = {
    "name": "tiny",
    "model": {
        "config": {
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": MAX_SEQ_LENGTH,
        }
    },
    "tokenizer": {"train": {"vocab_size": 300}},
    "data": {
        "train": [{"source": "files", "paths": ["corpus.jsonl"]}],
        "max_seq_length": MAX_SEQ_LENGTH,
        "validation_fraction": 0.1,
    },
    "training": {
        "max_steps": 20, "global_train_batch_size": GLOBAL_BATCH, "per_device_train_batch_size": MICRO_BATCH,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "mixed_precision": "no",
        "logging_steps": 5, "eval_steps": 10, "max_eval_samples": 32, "save_steps": 10,
    },
    "deepspeed": {"zero_stage": 2},
    "resources": {"num_workers": 2},
    "tracking": {"system_metrics_interval_s": 1.0, "log_model": False},
}  # fmt: skip
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 30.0


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)
    return value


class Command:
    """A running `distlm` command, its output in files."""

    def __init__(self, place: Place, arguments: tuple[str, ...]) -> None:
        number = len(list(place.folder.glob("command-*.out")))
        self._out, self._err = (place.folder / f"command-{number}.{suffix}" for suffix in ("out", "err"))
        self._place = place
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [*place.where, place.python, "-m", "distlm.cli", *arguments], cwd=place.folder,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=place.environ,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, timeout_s: float = START_TIMEOUT_S) -> None:
        def appeared() -> bool:
            assert self.process.poll() is None or text in self.out, (self.out, self.err)
            return text in self.out

        wait_until(appeared, timeout_s, f"{text!r} in the output")

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> int:
        code = self.process.wait(timeout_s)
        assert "Traceback" not in self.out + self.err
        return code

    @property
    def run(self) -> RunFolder:
        found = wait_until(lambda: re.search(r"^run (\S+?),? .*\n", self.out, re.MULTILINE), 60, "the run's id")
        return RunFolder(self._place.runs_dir / found[1])

    @property
    def controller(self) -> psutil.Process:
        handle = wait_until(lambda: read_json(self.run.attempts()[-1].handle_json), 60, "handle.json")
        return psutil.Process(handle["pid"])


class Place:
    """A user's folder with corpus and config, a home that must stay empty, and a folder for temporary files."""

    def __init__(self, folder: Path, config: Mapping[str, Any] = CONFIG) -> None:
        self.folder, self.home, self.temporary = folder, folder / "home", folder / "tmp"
        self.runs_dir = folder / "runs"
        self.home.mkdir(parents=True)
        self.temporary.mkdir()
        write_corpus(folder / "corpus.jsonl")
        (folder / "run.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self.shared_memory = set(Path("/dev/shm").iterdir())
        foreign = ("RAY_", "MLFLOW_", "HF_", "XDG_")
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        self.environ |= {"HOME": str(self.home), "TMPDIR": str(self.temporary)}
        self.where: tuple[str, ...] = ()
        """Put before commands, runs them on another host."""
        self.python = sys.executable

    def start(self, *arguments: str) -> Command:
        return Command(self, arguments)

    def processes(self) -> list[psutil.Process]:
        """Everything that was started from here and still runs."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def abandoned_shared_memory(self) -> set[Path]:
        """What is new in /dev/shm and used by no process. Where other tests run beside this one, without the semaphores
        of multiprocessing, which those leave behind that kill their processes."""
        new = set(Path("/dev/shm").iterdir()) - self.shared_memory
        if "PYTEST_XDIST_WORKER" in os.environ:
            new = {path for path in new if not path.name.startswith("sem.mp-")}
        for process in psutil.process_iter() if new else ():
            with suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                new = {path for path in new if str(path) not in maps}
        return new

    def listening_ports(self) -> set[int]:
        """TCP ports that processes from here listen on."""
        return {
            connection.laddr.port
            for process in self.processes()
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }

    def mlflow_run(self, run: RunFolder) -> Run:
        """The one MLflow run of a distlm run."""
        (found,) = self.mlflow_runs(run)
        return found

    def mlflow_runs(self, run: RunFolder) -> list[Run]:
        store = self.client
        experiments = [experiment.experiment_id for experiment in store.search_experiments()]
        return list(store.search_runs(experiments, f"tags.`distlm.run_id` = '{run.run_id}'"))

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.runs_dir / 'mlflow.db'}")

    def require_nothing_left(self, run: RunFolder) -> None:
        """No process, no folder of Ray's, nothing in the home or in the folder for temporary files."""
        wait_until(lambda: not self.processes(), END_TIMEOUT_S, f"the end of {self.processes()}")
        if handle := read_json(run.attempts()[-1].handle_json):
            assert not Path(handle["temporary_root"]).exists()
        assert not list(self.home.iterdir())
        assert not list(self.temporary.iterdir())
        wait_until(
            lambda: not self.abandoned_shared_memory(), END_TIMEOUT_S, f"the end of {self.abandoned_shared_memory()}"
        )
        hidden = list(run.path.rglob(".*"))  # reserves, half-written files
        assert not hidden


def write_corpus(path: Path) -> None:
    """Text with something to learn: each word is followed by one of three."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 6))) for _ in range(60)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(300):
            word, text = draw.randrange(60), []
            for _ in range(40):
                text.append(words[word])
                word = (word * 7 + draw.randrange(3)) % 60
            file.write(json.dumps({"text": " ".join(text)}) + "\n")
