"""Runs on a real Ray cluster of two hosts, sent by its Jobs API from a third one that has no torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from elastic_runs import SETTINGS, losses, make_place, require_each_step_once, wait_for_steps
from hosts import Host, hosts
from lab import wait_for_step
from place import Command, Place, wait_until
from ray_cluster import RayCluster

from distlm.errors import ExitCode
from distlm.launchers.carried import NEWEST_STEP
from distlm.processes import descendants, no_descendants_left
from distlm.run_folder import RunFolder, read_json
from distlm.temporary import temporary_root

CLIENT_PYTHON = Path(__file__).parents[2] / ".venv-client" / "bin" / "python"
PORT = 8265
API_TIMEOUT_S = 60.0


@dataclass
class RayOfTwoHosts:
    cluster: RayCluster
    nodes: list[Host]
    client: Host

    @property
    def address(self) -> str:
        return f"http://{self.nodes[0].address}:{PORT}"


@contextmanager
def ray_of_two_hosts() -> Iterator[RayOfTwoHosts]:
    """With one CPU on each."""
    with temporary_root() as folder, hosts(3, folder) as (head, other, client), no_descendants_left():
        (packages,) = CLIENT_PYTHON.parents[1].glob("lib/python*/site-packages")  # those of ray[default]
        cluster = RayCluster(folder, num_cpus=1, host=head, dashboard_port=PORT, packages=packages)
        cluster.add_node(1, host=other)
        ray = RayOfTwoHosts(cluster, [head, other], client)
        asked = (
            *client.command,
            str(CLIENT_PYTHON),
            "-c",
            f"import socket; socket.create_connection({(head.address, PORT)})",
        )
        wait_until(lambda: subprocess.run(asked, capture_output=True).returncode == 0, API_TIMEOUT_S, "the Jobs API")
        wait_until(lambda: num_nodes(ray) == 2, API_TIMEOUT_S, "both nodes")
        yield ray


def num_nodes(ray: RayOfTwoHosts) -> int:
    """How many Ray's dashboard knows to be alive."""
    code = (
        "import json, os, urllib.request as u; "
        f"r = u.Request('{ray.address}/nodes?view=summary', "
        "headers={'Authorization': 'Bearer ' + os.environ['RAY_AUTH_TOKEN']}); "
        "print(sum(n['raylet']['state'] == 'ALIVE' for n in json.load(u.urlopen(r))['data']['summary']))"
    )
    asked = (*ray.client.command, str(CLIENT_PYTHON), "-c", code)
    done = subprocess.run(asked, capture_output=True, text=True, env=ray.cluster.environ)
    return int(done.stdout or 0)


def make_client(ray: RayOfTwoHosts, folder: Path, runs_dir: Path | None = None) -> Place:
    """A user on the third host. `runs_dir`: what is there in place of the cluster's folder of runs."""
    place = make_place(folder)
    place.runs_dir.mkdir()
    place.python = str(CLIENT_PYTHON)
    place.where = ray.client.command
    if runs_dir is not None:
        runs_dir.mkdir()
        begin = f'mount --bind {runs_dir} {place.runs_dir}; exec "$@"'
        place.where = (*ray.client.command, "sh", "-c", begin, "sh")
    place.environ |= {name: ray.cluster.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    return place


def submit(place: Place, ray: RayOfTwoHosts, *arguments: str) -> Command:
    return place.start(
        "submit", "run.yaml", "--target", "ray", "--address", ray.address, f"ray.python={sys.executable}", *SETTINGS,
        *arguments,
    )  # fmt: skip


def test_a_client_without_torch_and_without_the_storage(tmp_path: Path) -> None:
    assert subprocess.run([CLIENT_PYTHON, "-c", "import torch"], capture_output=True).returncode != 0
    with ray_of_two_hosts() as ray:
        place = make_client(ray, tmp_path / "place", tmp_path / "of-the-client")
        command = submit(place, ray, "resources.num_workers=2", "training.max_steps=30")
        assert command.wait() == ExitCode.SUCCEEDED, (command.out, command.err)
        run = command.run
        of_the_client = RunFolder(tmp_path / "of-the-client" / run.run_id)
        told = read_json(of_the_client.attempts()[0].result_json)
        assert told == {**read_json(run.attempts()[0].result_json), NEWEST_STEP: 30}
        assert not of_the_client.model.exists()
        found = require_each_step_once(place, run)
        assert max(found) == 30 and found[30] < 5.0 < found[1]
        assert "step 30/30" in command.out and command.out.count("succeeded: model in") == 1
        hosts_of_ranks = {log.name for log in run.attempts()[0].logs.glob("rank-*.log")}
        assert hosts_of_ranks == {"rank-00000.log", "rank-00001.log"}

        shown = place.start("status", run.run_id, "--json")
        assert shown.wait() == ExitCode.SUCCEEDED, shown.err
        assert json.loads(shown.out)["state"] == "succeeded"
        logs = place.start("logs", run.run_id)
        assert logs.wait() == ExitCode.SUCCEEDED and "step 30/30" in logs.out, logs.err

        longer = submit(place, ray, "resources.num_workers=2", "training.max_steps=100000", "--detach")
        assert longer.wait() == ExitCode.SUCCEEDED, longer.err
        wait_for_step(longer.run, 20)
        cancelled = place.start("cancel", longer.run.run_id)
        assert cancelled.wait() == ExitCode.SUCCEEDED, (cancelled.out, cancelled.err)
        assert "preempted" in cancelled.out  # by Ray's request to stop, which the workers have time to save after
        result = read_json(longer.run.attempts()[0].result_json)
        assert result["exit_code"] == ExitCode.PREEMPTED and "which is saved (SIGTERM)" in result["message"]

        place.environ["RAY_AUTH_TOKEN"] = "another"
        refused = submit(place, ray, "resources.num_workers=2", "training.max_steps=30")
        assert refused.wait() == ExitCode.BAD_INPUT and "RAY_AUTH_TOKEN" in refused.err, refused.err


def test_a_host_is_cut_off_and_comes_back(tmp_path: Path) -> None:
    """In mid-training of an elastic run, followed from the client, which then ends it."""
    with ray_of_two_hosts() as ray:
        place = make_client(ray, tmp_path / "place")
        command = submit(place, ray, "resources.num_workers=[1,2]", "training.max_steps=100000", "--detach")
        assert command.wait() == ExitCode.SUCCEEDED, command.err
        run = command.run
        follower = place.start("logs", run.run_id, "-f")
        wait_for_steps(follower, 2, 30)
        ray.nodes[1].cut_off()
        wait_for_steps(follower, 1, 30)
        ray.nodes[1].connect_again()
        ray.cluster.add_node(1, host=ray.nodes[1])
        wait_until(lambda: follower.out.count("starting 2 workers") == 2, 180, "two workers again")
        wait_for_step(run, max(losses(run)) + 30)
        (on_the_client,) = (p for p in descendants(psutil.Process(follower.process.pid)) if "distlm.cli" in p.cmdline())
        on_the_client.send_signal(signal.SIGINT)  # what makes the host does not pass it on
        assert follower.wait() == ExitCode.CANCELLED and f"run {run.run_id} goes on" in follower.err
        ended = place.start("cancel", run.run_id, "--checkpoint")
        assert ended.wait() == ExitCode.SUCCEEDED, (ended.out, ended.err)
    result = read_json(run.attempts()[-1].result_json)
    assert result["exit_code"] == ExitCode.PREEMPTED
    assert [retry["cause"] for retry in result["retries"]] == ["node lost"]
    require_each_step_once(place, run)
