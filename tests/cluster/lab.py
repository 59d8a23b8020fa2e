"""A real Slurm of two nodes on this machine (see slurm_lab/up.sh), as a test sees it. As root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastic_runs import losses, make_place
from place import Place, wait_until

from distlm.run_folder import RunFolder, is_there, read_json

_SCRIPTS = Path(__file__).parent / "slurm_lab"
_PROJECT = Path(__file__).parents[2]
START_TIMEOUT_S, END_TIMEOUT_S = 180.0, 60.0
NODES = (1, 2)
_OF_THE_NODE = {"node-init", "slurmd", "ps", "bash"}


@dataclass(frozen=True)
class Lab:
    """The cluster. Its nodes have an address, processes, /tmp and /dev/shm of their own."""

    folder: Path
    shared: frozenset[str]
    """Names in /tmp of what all hosts share."""

    @property
    def login(self) -> tuple[str, ...]:
        """Runs on the login host the command that is put behind it."""
        return (str(self.folder / "bin" / "lab"),)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """The output of a command on the login host, which is to succeed."""
        done = subprocess.run((*self.login, *command), cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def on_node(self, number: int, *command: str) -> str:
        on = (str(self.folder / "bin" / "lab-on"), str(number), *command)
        return subprocess.run(on, capture_output=True, text=True, check=True).stdout

    def power_off(self, number: int) -> None:
        subprocess.run((str(self.folder / "bin" / "lab-kill"), str(number)), check=True)

    def boot(self, number: int) -> None:
        subprocess.run((str(self.folder / "bin" / "lab-boot"), str(number)), check=True)
        wait_until(lambda: len(self.idle_nodes()) == len(NODES), START_TIMEOUT_S, "the node's return")

    def idle_nodes(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = START_TIMEOUT_S) -> None:
        wait_until(lambda: self.job(job_id)["JobState"] in states, timeout_s, f"job {job_id} to be {states}")

    def require_nothing_left(self) -> None:
        """No process, no file in /tmp or /dev/shm of any node that is not its own, and no listening port."""
        for number in NODES:
            wait_until(lambda n=number: not self.processes(n), END_TIMEOUT_S, f"the end of {self.processes(number)}")
            files = self.on_node(number, "sh", "-c", "ls -A /tmp /dev/shm").split()
            assert not {name for name in files if name not in {"/tmp:", "/dev/shm:", *self.shared}}, files
            ports = self.on_node(number, "ss", "--tcp", "--listening", "--numeric", "--no-header").splitlines()
            assert len(ports) == 1, ports  # slurmd's

    def processes(self, number: int) -> list[str]:
        lines = self.on_node(number, "ps", "-e", "-o", "comm=").split()
        return [name for name in lines if name not in _OF_THE_NODE]


@contextmanager
def slurm_lab(shared: Path) -> Iterator[Lab]:
    """The cluster, with the folder `shared` on all of its hosts."""
    folder = Path(f"/tmp/dlab-{os.getpid()}")
    # The project is on all hosts by itself, unless it is below /tmp, which each has for itself.
    paths = [path for path in (shared, _PROJECT) if path.is_relative_to("/tmp")]
    environ = {**os.environ, "SLURM_LAB": str(folder), "SLURM_LAB_SHARED": " ".join(map(str, paths))}
    subprocess.run((str(_SCRIPTS / "up.sh"),), env=environ, check=True, stdin=subprocess.DEVNULL)
    try:
        yield Lab(folder, frozenset(path.parts[2] for path in (folder, *paths)))
    finally:
        subprocess.run((str(_SCRIPTS / "down.sh"),), env=environ, check=True)


def place_on(lab: Lab, folder: Path) -> Place:
    """A user's folder, whose commands run on the login host."""
    place = make_place(folder)
    place.where = lab.login
    return place


def job_id(run: RunFolder) -> str:
    job = wait_until(lambda: read_json(run.attempts()[-1].job_json), START_TIMEOUT_S, "job.json")
    return str(job["id"])


def wait_for_step(run: RunFolder, step: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Until the run has trained it."""

    def is_done() -> bool:
        newest = run.attempts()[-1] if run.attempts() else None
        assert not (newest and is_there(newest.result_json)) or max(losses(run), default=0) >= step, (
            read_json(newest.result_json) if newest else None
        )
        return max(losses(run), default=0) >= step

    wait_until(is_done, timeout_s, f"step {step}")
