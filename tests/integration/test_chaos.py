"""One run under random faults ends as if nothing had happened: `pytest tests/integration/test_chaos.py
--chaos-seed N --chaos-faults 100` for a certain seed, or for a night; with `-m nightly` other kinds of runs."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from elastic_runs import losses, make_place
from labelled_runs import reviews, write_csv
from mlflow import MlflowClient
from mlflow_server import MlflowServer, free_port
from place import CONFIG, START_TIMEOUT_S, Command, Place, wait_until

from distlm.checkpoint.store import CheckpointStore
from distlm.errors import ExitCode
from distlm.metrics_file import read_backwards
from distlm.run_folder import RunFolder, read_json

STEPS_PER_FAULT = 60
TOLERANCE = 5e-5  # relative, of losses on another number of workers
OUTAGE = "MLflow goes, and comes back two faults later"
_SETTINGS = (
    "training.global_train_batch_size=24", "training.logging_steps=1", "training.save_steps=20",
    "training.eval_steps=30", "recovery.step_timeout_s=4",
    "training.learning_rate=1e-3",  # at higher ones rounding grows: the gradient has spikes
)  # fmt: skip


class Chaos:
    """A run, the server that records it, and what can be done to both."""

    def __init__(
        self, place: Place, server: MlflowServer, draw: random.Random, num_workers: int, command: Command
    ) -> None:
        self.place, self.server, self.draw, self.num_workers = place, server, draw, num_workers
        self.command = command
        self.faults: dict[str, Callable[[], None]] = {
            "a worker is killed": lambda: self._kill_worker(signal.SIGKILL),
            "a worker crashes": lambda: self._kill_worker(signal.SIGSEGV),
            "a worker is stopped": lambda: self._kill_worker(signal.SIGSTOP),
            "Ray Train's controller is killed": lambda: self._kill("ray::TrainController"),
            "the mailbox is killed": lambda: self._kill("ray::RecorderMailbox"),
            "Ray's head is killed": lambda: self._kill("gcs_server"),
            "the controller is killed": self._kill_controller,
            "the command is killed": self._kill_command,
            "preempted, and resumed on another number of workers": self._resize,
            "the newest checkpoint is torn": self._tear_checkpoint,
            OUTAGE: self.server.kill,
        }

    @property
    def run(self) -> RunFolder:
        return self.command.run

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server.uri)

    def wait_for_step(self, step: int, since_s: float) -> None:
        """Wait until the run has done a step since then that is this one or a later one."""

        def done() -> bool:
            assert self.command.process.poll() is None, (self.command.out, self.command.err)
            attempts = self.run.attempts()
            newest = next(read_backwards(attempts[-1].metrics_jsonl, b'"train/loss"'), None) if attempts else None
            return newest is not None and newest["step"] >= step and newest["timestamp_ms"] / 1000 > since_s

        wait_until(done, START_TIMEOUT_S, f"step {step}")

    def end(self) -> None:
        """Bring the server back and wait for the run's end."""
        if not self.server.is_running:
            self.server.start()
        assert self.command.wait(4 * START_TIMEOUT_S) == ExitCode.SUCCEEDED, (self.command.out, self.command.err)

    def _processes(self, name: str) -> list[psutil.Process]:
        found = wait_until(
            lambda: [p for p in self.place.processes() if name in " ".join(p.cmdline()[:1])], START_TIMEOUT_S, name
        )
        return list(found)

    def _kill(self, name: str) -> None:
        for process in self._processes(name):
            process.kill()

    def _kill_worker(self, number: signal.Signals) -> None:
        self.draw.choice(sorted(self._processes("ray::RayTrainWorker"), key=lambda p: p.pid)).send_signal(number)

    def _kill_controller(self) -> None:
        psutil.Process(read_json(self.run.attempts()[-1].handle_json)["pid"]).kill()

    def _kill_command(self) -> None:
        self.command.process.kill()
        self.command.process.wait()
        wait_until(lambda: not self.place.processes(), 60, "the end of what it has started")
        self._resume()

    def _resize(self) -> None:
        self.command.process.send_signal(self.draw.choice([signal.SIGTERM, signal.SIGHUP]))
        assert self.command.wait(60) == ExitCode.PREEMPTED, (self.command.out, self.command.err)
        self._resume(f"resources.num_workers={self.draw.randint(1, self.num_workers)}")

    def _resume(self, *overrides: str) -> None:
        run = self.run
        self.command = self.place.start("resume", run.run_id, *overrides)

    def _tear_checkpoint(self) -> None:
        store = CheckpointStore(self.run.checkpoints)
        newest = wait_until(lambda: len(store.checkpoints()) > 1 and store.checkpoints()[0], 60, "two checkpoints")
        shard = sorted(newest.path.glob("shard-*"))[0]
        os.truncate(shard, shard.stat().st_size // 2)
        self._kill_worker(signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = make_place(tmp_path / "place")
    yield place
    for process in place.processes():
        process.kill()


def write_finetuning(place: Place) -> None:
    """Make run.yaml that of a LoRA fine-tuning of what a short pretraining leaves."""
    pretraining = place.start("submit", "run.yaml", "training.max_steps=4")
    assert pretraining.wait(START_TIMEOUT_S) == ExitCode.SUCCEEDED, pretraining.err
    write_csv(place.folder / "reviews.csv", reviews(300, 0))
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    del config["tokenizer"]
    config["task"] = {"type": "text-classification"}
    config["model"] = {"name_or_path": f"run:{pretraining.run.run_id}"}
    config["peft"] = {
        "peft_type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"
    }  # fmt: skip
    config["data"]["train"][0]["paths"] = ["reviews.csv"]
    (place.folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.mark.parametrize(
    ("is_finetuning", "zero_stage", "num_workers"),
    [
        (False, 2, 2),
        *(pytest.param(*kind, marks=pytest.mark.nightly) for kind in ((False, 3, 3), (True, 2, 3), (True, 3, 2))),
    ],
)
def test_a_run_under_faults_ends_as_if_nothing_had_happened(
    place: Place, tmp_path: Path, request: pytest.FixtureRequest, is_finetuning: bool, zero_stage: int, num_workers: int
) -> None:
    seed = request.config.getoption("--chaos-seed")
    num_faults = request.config.getoption("--chaos-faults")
    last_step = STEPS_PER_FAULT * (num_faults + 1)
    if is_finetuning:
        write_finetuning(place)

    def start(*overrides: str) -> Command:
        size = (f"deepspeed.zero_stage={zero_stage}", f"resources.num_workers={num_workers}")
        return place.start("submit", "run.yaml", f"training.max_steps={last_step}", *_SETTINGS, *size, *overrides)

    reference = start("tracking.report_to=[]")
    assert reference.wait(4 * START_TIMEOUT_S) == ExitCode.SUCCEEDED, reference.err
    expected = losses(reference.run)
    assert sorted(expected) == list(range(1, last_step + 1))

    draw = random.Random(seed)
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server", free_port())
    try:
        server.start()
        chaos = Chaos(place, server, draw, num_workers, start(f"tracking.tracking_uri={server.uri}"))
        names = draw.sample(sorted(chaos.faults), k=len(chaos.faults))[:num_faults]
        names += draw.choices(sorted(chaos.faults), k=num_faults - len(names))
        outages = [number for number, name in enumerate(names) if name == OUTAGE]
        since_s = time.time()
        for number, name in enumerate(names):
            if number - 2 in outages and not server.is_running:
                server.start()
            chaos.wait_for_step(STEPS_PER_FAULT * number + draw.randrange(1, STEPS_PER_FAULT // 2), since_s)
            since_s = time.time()
            print(f"chaos: {number + 1}: {name}")
            chaos.faults[name]()
        chaos.end()
        server.wait_until_it_answers()

        found = losses(chaos.run)
        assert found == pytest.approx(expected, rel=TOLERANCE)
        assert found[last_step] == pytest.approx(expected[last_step], rel=TOLERANCE)
        (recorded,) = [
            run
            for experiment in chaos.client.search_experiments()
            for run in chaos.client.search_runs([experiment.experiment_id])
        ]
        assert recorded.info.status == "FINISHED"
        points = chaos.client.get_metric_history(recorded.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, last_step + 1))
        evaluated = chaos.client.get_metric_history(recorded.info.run_id, "eval/loss")
        assert sorted(point.step for point in evaluated) == list(range(30, last_step + 1, 30))
        assert {point.step: point.value for point in points} == pytest.approx(expected, rel=TOLERANCE)
        place.require_nothing_left(chaos.run)
    finally:
        server.kill()
