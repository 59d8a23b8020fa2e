"""What the pods of a run on Kubernetes do, with processes in place of pods: each has what its container in the manifest
has, the ends of KubeRay and the kubelet are played by the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from elastic_runs import SETTINGS, make_place, require_each_step_once
from hosts import Host, hosts
from lab import wait_for_step
from place import Place, wait_until
from ray_cluster import RayCluster
from test_ray_jobs import CLIENT_PYTHON

from distlm.config.attempt import begin_attempt, create_run
from distlm.config.load import LoadedConfig, load_config
from distlm.errors import ExitCode
from distlm.launchers.carried import ATTEMPT_FILES, RESULT_PREFIX, result_in
from distlm.launchers.kubernetes import KubernetesLauncher, KubernetesRequest
from distlm.processes import no_descendants_left
from distlm.run_folder import RunFolder, read_json
from distlm.temporary import temporary_root

PORT = 8265
GRACE_S = 120.0
OTHERS = [
    "resources.target=kubernetes", "kubernetes.image=distlm:1", "resources.num_workers=2", "kubernetes.worker_pods=1",
    "kubernetes.worker.cpus=2", "training.max_steps=120",
]  # fmt: skip


@dataclass
class Sent:
    """A run as it was sent, the files of its ConfigMap and its RayJob."""

    place: Place
    run: RunFolder
    request: KubernetesRequest
    config_folder: Path

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.request.ray_job["spec"]
        return spec

    def environ_of_head(self) -> dict[str, str]:
        """The variables of its container, but for those of places that are elsewhere here."""
        (container,) = self.spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        found = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        found = {name: value.replace("$(POD_NAMESPACE)", "distlm") for name, value in found.items()}
        return found | {ATTEMPT_FILES: str(self.config_folder), "HOME": str(self.place.home)}


def send(folder: Path) -> Sent:
    """What `distlm submit` makes; the storage of the pods is the folder of the place."""
    place = make_place(folder)
    os.chdir(place.folder)
    overrides = [*SETTINGS, *OTHERS, f"kubernetes.storage.mount_path={place.folder}"]
    loaded: LoadedConfig = load_config(Path("run.yaml"), overrides, KubernetesLauncher().check_here)
    sender = RunFolder(folder.parent / "of-the-sender" / "20260131-235959-3fa9c1")
    create_run(loaded, sender)
    begin_attempt(loaded, sender, overrides)
    request = KubernetesLauncher().build(loaded.config, sender)
    config_folder = folder / "config-map"
    config_folder.mkdir()
    for name, text in request.objects[0]["data"].items():
        (config_folder / name).write_text(text)
    return Sent(place, RunFolder(place.runs_dir / sender.run_id), request, config_folder)


@dataclass
class Pods:
    """A Ray cluster as KubeRay makes it of a RayJob, with one worker pod."""

    cluster: RayCluster
    hosts: list[Host]
    worker: psutil.Process
    """Its raylet."""

    def pre_stop(self, pod: psutil.Process) -> None:
        """What the kubelet runs before it ends a pod, in the pod of that process."""
        inside = ("nsenter", f"--target={pod.pid}", "--all", sys.executable, "-m", "distlm.kubernetes.pre_stop")
        environ = {**self.cluster.environ, "RAY_ADDRESS": self.cluster.address}
        environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
        subprocess.run([*inside, str(GRACE_S)], env=environ, check=True, timeout=GRACE_S)


@contextmanager
def pods(sent: Sent) -> Iterator[Pods]:
    with temporary_root() as folder, hosts(3, folder) as found, no_descendants_left():
        (packages,) = CLIENT_PYTHON.parents[1].glob("lib/python*/site-packages")  # those of ray[default]
        head, worker, _ = found
        environ = sent.environ_of_head()
        cluster = RayCluster(folder, num_cpus=0, host=head, dashboard_port=PORT, packages=packages, environ=environ)
        yield Pods(cluster, found, cluster.add_node(2, host=worker))


def submitter(sent: Sent, on: Pods, number: int) -> subprocess.Popen[str]:
    """The submitter pod of the RayJob's n-th start."""
    (container,) = sent.spec["submitterPodTemplate"]["spec"]["containers"]
    assert container["command"][0] == container["args"][0] == "python"
    environ = on.cluster.environ | {
        "RAY_DASHBOARD_ADDRESS": f"{on.hosts[0].address}:{PORT}", "RAY_JOB_SUBMISSION_ID": f"distlm-a-{number}",
    }  # fmt: skip
    return subprocess.Popen(
        [*on.hosts[2].command, sys.executable, *container["command"][1:], sys.executable, *container["args"][1:]],
        env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_run_outlives_its_pods(tmp_path: Path) -> None:
    """A worker pod is deleted in mid-training: the run goes on when another one is there. The head pod is deleted: the
    workers save, and the next start of the RayJob, on new pods, goes on. The one after that finds nothing to do."""
    sent = send(tmp_path / "place")
    run = sent.run
    with pods(sent) as first:
        job = submitter(sent, first, 1)
        wait_until(lambda: run.attempts() or job.poll() is not None, 120, "the attempt")
        assert job.poll() is None, job.communicate()
        wait_for_step(run, 20)
        first.pre_stop(first.worker)
        stopped = read_json(run.attempts()[-1].result_json)
        assert stopped is None, f"the run has ended with its worker pod: {stopped}"
        with suppress(psutil.NoSuchProcess):  # Ray ends a node that leaves when nothing runs on it
            first.worker.kill()
        first.cluster.add_node(2, host=first.hosts[1])
        log = run.attempts()[-1].output_log
        wait_until(lambda: log.read_text().count("starting 2 workers") == 2, 120, "workers on the new pod")
        wait_for_step(run, 60)
        first.pre_stop(first.cluster.gcs)
        text, _ = job.communicate(timeout=60)
        assert job.returncode == 0, text
    assert "they go on when another one has come" in text and text.count("sent to Ray") == 1
    assert "(the head pod is about to end)" in text and text.splitlines()[-1].startswith(RESULT_PREFIX)
    result = result_in(text.splitlines())
    assert result is not None and (result["exit_code"], result["retries"]) == (ExitCode.PREEMPTED, [])
    saved = result["newest_step"]
    assert saved >= 60

    with pods(sent) as second:
        job = submitter(sent, second, 2)
        text, _ = job.communicate(timeout=240)
        assert f"continuing from checkpoint step-{saved:08d}" in text, text
        result = result_in(text.splitlines())
        assert result is not None and result["exit_code"] == ExitCode.SUCCEEDED

        again, _ = submitter(sent, second, 3).communicate(timeout=60)
        assert f"run {run.run_id} has ended before with exit code 0; nothing to do" in again
        assert result_in(again.splitlines()) == result
    assert [attempt.number for attempt in run.attempts()] == [1, 2]
    found = require_each_step_once(sent.place, run)
    assert max(found) == 120
