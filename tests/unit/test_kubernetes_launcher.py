"""Target kubernetes against a server that speaks as the real one: what is made there, what is told of it, and what
becomes of refusals and broken connections."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_runs
import pytest
from kube_api import NAMESPACE, KubeApi
from made_runs import clean_environment as environment
from made_runs import distlm, end, make_run

from distlm.commands.follow import _Follower
from distlm.config.attempt import Attempt, begin_attempt
from distlm.config.load import load_tree
from distlm.errors import ExitCode, InfrastructureError, InputError
from distlm.launchers.base import Job, JobState
from distlm.launchers.carried import RESULT_PREFIX
from distlm.launchers.jobs import tell_target_of_end
from distlm.launchers.kubernetes import KubernetesLauncher, KubernetesRequest
from distlm.launchers.kubernetes_api import KubernetesApi
from distlm.run_folder import RunFolder, read_json, write_json
from distlm.view.plain import PlainView

CONFIG: dict[str, Any] = {
    **made_runs.CONFIG,
    "resources": {"num_workers": 2, "target": "kubernetes"},
    "kubernetes": {"image": "distlm:0.1.0-cpu", "worker_pods": 2},
    "env": ["SECRET_OF_MINE"],
}
OWNED = ("configmaps", "secrets", "networkpolicies")
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "rayClusterName": "c"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit code 75"}
PREEMPTED = {
    "state": "preempted", "exit_code": 75, "message": "stopped after step 40, which is saved", "cause": "preemption",
    "problems": [], "log": "x", "needs_new_attempt": False,
}  # fmt: skip


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeApi]:
    with KubeApi() as api:
        monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("SECRET_OF_MINE", "hunter2-hunter2")
        yield api


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = make_run(tmp_path / "runs", **{key: CONFIG[key] for key in ("resources", "kubernetes", "env")})
    begin_attempt(load_tree(CONFIG), run, [])
    return run


def built(run: RunFolder, **settings: Any) -> KubernetesRequest:
    config = load_tree({**CONFIG, "kubernetes": {**CONFIG["kubernetes"], **settings}}).config
    return KubernetesLauncher().build(config, run)


def sent(run: RunFolder, **settings: Any) -> Job:
    job = KubernetesLauncher().submit(built(run, **settings), Path("/"))
    job.write(run.attempts()[-1])
    return job


def name_of(job: Job) -> str:
    return job.id.partition("/")[2]


def add_pod(api: KubeApi, job: Job, component: str, name: str, **status: Any) -> None:
    labels = {"app.kubernetes.io/instance": name_of(job), "app.kubernetes.io/component": component}
    container = {"submitter": "ray-job-submitter"}.get(component, f"ray-{component}")
    spec = {"nodeName": "node-1", "containers": [{"name": container, "image": "distlm:0.1.0-cpu"}]}
    api.create("pods", {"metadata": {"name": name, "labels": labels}, "spec": spec, "status": status})


# --- what is made ----------------------------------------------------------------------------------------------------


def test_a_run_is_a_ray_job_and_what_it_owns(api: KubeApi, run: RunFolder) -> None:
    job = sent(run)
    name = name_of(job)
    assert name == f"distlm-{run.run_id}-001-{Attempt.read(run.attempts()[0]).token}"
    assert job == Job("kubernetes", f"{NAMESPACE}/{name}", address="test", folder=f"/storage/runs/{run.run_id}")
    ray_job = api.object("rayjobs", name)
    assert ray_job["spec"]["entrypoint"] == f"python -m distlm.ray_job /storage/runs/{run.run_id}"
    for resource in OWNED:
        (owner,) = api.object(resource, name)["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("RayJob", ray_job["metadata"]["uid"])
    files = api.object("configmaps", name)["data"]
    assert {*files} == {"run.yaml", "attempt.yaml", "newest_step"}
    assert files["run.yaml"] == run.run_yaml.read_text()
    assert "hunter2" not in json.dumps([ray_job, files, str(built(run))])
    assert api.object("secrets", name)["data"]["SECRET_OF_MINE"] == "aHVudGVyMi1odW50ZXIy"
    api.delete("rayjobs", name)
    assert not [
        api.objects(resource) for resource in ("configmaps", "secrets", "networkpolicies") if api.objects(resource)
    ]


def test_a_run_that_cannot_be_finished_making_is_taken_back(api: KubeApi, run: RunFolder) -> None:
    """The RayJob is there already: else it would train where nobody knows of it."""
    api.forbid("patch", "secrets")
    with pytest.raises(InputError, match='cannot patch resource "secrets"'):
        sent(run)
    assert [api.objects(resource) for resource in (*OWNED, "rayjobs")] == [[]] * 4
    api.forbid("delete", "rayjobs")
    with pytest.raises(InfrastructureError, match=r'cannot patch resource "secrets".*; left there: RayJob distlm-'):
        sent(run)


def test_what_was_made_goes_with_what_was_refused(api: KubeApi, run: RunFolder) -> None:
    api.exceed_quota("rayjobs")
    with pytest.raises(InputError, match=r"exceeded quota.*; use fewer or smaller pods, or have the quota raised"):
        sent(run)
    assert [api.objects(resource) for resource in (*OWNED, "rayjobs")] == [[]] * 4


def test_the_same_attempt_is_sent_once(api: KubeApi, run: RunFolder) -> None:
    first, second = sent(run), sent(run)
    assert first == second and len(api.objects("rayjobs")) == len(api.objects("configmaps")) == 1


def test_a_ray_job_of_something_else_is_left_alone(api: KubeApi, run: RunFolder) -> None:
    other = {**built(run).ray_job}
    other["metadata"] = {"name": other["metadata"]["name"], "annotations": {"distlm/run-folder": "/elsewhere"}}
    api.create("rayjobs", other)
    with pytest.raises(InputError, match="already exists"):
        sent(run)
    assert api.objects("configmaps") == [] and len(api.objects("rayjobs")) == 1


@pytest.mark.parametrize("fault", ["drop", "drop_after"])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_a_connection_that_breaks_makes_nothing_twice(api: KubeApi, run: RunFolder, fault: str, method: str) -> None:
    getattr(api, fault)(2, method=method)
    job = sent(run)
    assert len(api.objects("rayjobs")) == 1
    assert api.object("configmaps", name_of(job))["metadata"]["ownerReferences"]


def test_an_api_that_is_busy_is_asked_again(api: KubeApi, run: RunFolder) -> None:
    api.throttle(2, retry_after_s=1)
    job = sent(run)
    assert KubernetesLauncher().status(job).state == JobState.SUBMITTED


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "resource", "text"),
    [
        ("create", "rayjobs", r'cannot create resource "rayjobs" .*the Role in k8s/20-rbac.yaml'),
        ("create", "configmaps", r'cannot create resource "configmaps" .*the Role in k8s/20-rbac.yaml'),
        ("patch", "secrets", r'cannot patch resource "secrets" .*the Role in k8s/20-rbac.yaml'),
    ],
)
def test_rights_that_are_missing_are_told(api: KubeApi, run: RunFolder, verb: str, resource: str, text: str) -> None:
    api.forbid(verb, resource)
    with pytest.raises(InputError, match=text):
        sent(run)


def test_a_cluster_without_kuberay_is_told(api: KubeApi, run: RunFolder) -> None:
    api.without_kuberay()
    with pytest.raises(InputError, match="does not know RayJobs; install KubeRay's operator"):
        sent(run)
    assert api.objects("configmaps") == []


def test_a_namespace_that_is_not_there_is_told(api: KubeApi, run: RunFolder) -> None:
    with pytest.raises(InputError, match=r'namespaces "nowhere" not found; set kubernetes\.namespace'):
        sent(run, namespace="nowhere")


def test_what_the_schema_refuses_is_told(api: KubeApi, run: RunFolder) -> None:
    with pytest.raises(InputError, match=r"strict decoding error: unknown field .*nodeSelektor"):
        sent(run, pod_template={"spec": {"nodeSelektor": {}}})
    with pytest.raises(InputError, match=r"is invalid: .*hostNetwork"):
        sent(run, pod_template={"spec": {"hostNetwork": "yes"}})


def test_a_context_that_is_not_there_is_told(api: KubeApi, run: RunFolder) -> None:
    with pytest.raises(InputError, match=r"kubernetes\.context = other: the kubeconfig has no such one; it has test"):
        sent(run, context="other")


CONTEXTS = """
contexts:
- {name: a, context: {cluster: c, user: u, namespace: research}}
- {name: b, context: {cluster: c, user: missing}}
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: u, user: {token: t}}]
"""
LOGIN = "{exec: {apiVersion: client.authentication.k8s.io/v1, command: no-such-login}}"


@pytest.mark.parametrize(
    ("files", "context", "problem"),
    [
        ([CONTEXTS], None, r"has no current context; name one with kubernetes\.context: it has a, b"),
        (["current-context: c" + CONTEXTS], None, r"kubernetes\.context = c: the kubeconfig has no such one; it has"),
        ([CONTEXTS], "c", r"kubernetes\.context = c: the kubeconfig has no such one; it has a, b"),
        (["{"], None, "the kubeconfig .* cannot be read"),
        (["- 1"], "a", "the kubeconfig .* cannot be read"),
        ([CONTEXTS.replace("{token: t}", LOGIN)], "a", "command `no-such-login` has given no credentials"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_kubeconfig_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], context: str | None, problem: str
) -> None:
    use_kubeconfigs(tmp_path, monkeypatch, files)
    with pytest.raises(InputError, match=problem):
        KubernetesApi.connect(context, None)


def test_of_several_kubeconfigs_the_first_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "current-context: a" + CONTEXTS.replace("namespace: research", "namespace: other")
    use_kubeconfigs(tmp_path, monkeypatch, ["current-context: b" + CONTEXTS, other])
    assert KubernetesApi.connect("a", None).namespace == "research"
    assert KubernetesApi.connect("a", "mine").namespace == "mine"
    assert KubernetesApi.connect(None, None).context == "b"


def use_kubeconfigs(folder: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    paths = [folder / f"kubeconfig-{number}" for number in range(len(files))]
    for path, text in zip(paths, files, strict=True):
        path.write_text(text)
    location = os.pathsep.join([str(folder / "missing"), *map(str, paths)])
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", location)


def test_without_a_cluster_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    missing = str(tmp_path / "missing")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", missing)
    with pytest.raises(InputError, match="no cluster is known here"):
        sent(run)


def test_a_token_that_is_not_accepted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    with KubeApi(token="right") as api:
        path = api.kubeconfig(tmp_path / "kubeconfig")
        path.write_text(path.read_text().replace("right", "wrong"))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        with pytest.raises(InputError, match="the kubeconfig's credentials are not accepted"):
            sent(run)


def test_an_api_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    monkeypatch.setattr("distlm.launchers.kubernetes_api._PAUSE_FACTOR_S", 0.01)
    with KubeApi() as api:
        path, url = api.kubeconfig(tmp_path / "kubeconfig"), api.url
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    with pytest.raises(InfrastructureError, match=f"the Kubernetes API at {re.escape(url)} does not answer: .*refused"):
        sent(run)
    status = KubernetesLauncher().status(Job("kubernetes", "distlm/distlm-a", address="test"))
    assert status.state == JobState.UNKNOWN and "does not answer" in status.reason


# --- how it stands ---------------------------------------------------------------------------------------------------


def test_the_life_of_a_run(api: KubeApi, run: RunFolder) -> None:
    launcher, job = KubernetesLauncher(), sent(run)
    name = name_of(job)

    def now(**status: Any) -> str:
        api.set_status("rayjobs", name, status)
        return str(launcher.status(job))

    assert now(jobDeploymentStatus="Initializing", rayClusterName="c") == "pending (Initializing)"
    api.create(
        "rayclusters", {"metadata": {"name": "c"}, "spec": api.object("rayjobs", name)["spec"]["rayClusterSpec"]}
    )
    message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    add_pod(api, job, "worker", "w-1", phase="Pending", conditions=[condition])
    assert now() == f"pending (Initializing): worker pod w-1 cannot be placed: {message}"
    api.set_status("pods", "w-1", {"phase": "Running", "conditions": []})
    assert now(jobDeploymentStatus="Running", jobStatus="PENDING") == "pending (Running/PENDING)"
    assert now(jobStatus="RUNNING") == "running (Running/RUNNING)"
    ended = {"name": "ray-worker", "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
    ended |= {"ready": True, "restartCount": 1, "image": "i", "imageID": "i"}
    api.set_status("pods", "w-1", {"containerStatuses": [ended]})
    assert "worker pod w-1 ran out of memory (OOMKilled)" in now()
    api.set_status("pods", "w-1", {"containerStatuses": []})
    assert now(jobDeploymentStatus="Retrying", failed=1) == (
        "pending (Retrying/RUNNING): it goes on with new pods (retry 1 of 3)"
    )
    assert now(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED") == "succeeded (Complete/SUCCEEDED)"
    api.delete("rayjobs", name)
    assert str(launcher.status(job)) == "failed (deleted): its RayJob is not there any more"


def test_a_warning_about_a_volume_is_told(api: KubeApi, run: RunFolder) -> None:
    job = sent(run)
    api.set_status("rayjobs", name_of(job), {"jobDeploymentStatus": "Initializing"})
    add_pod(api, job, "head", "h-1", phase="Pending")
    about = {"kind": "Pod", "name": "h-1", "namespace": NAMESPACE, "uid": api.object("pods", "h-1")["metadata"]["uid"]}
    event = {"metadata": {"name": "e"}, "type": "Warning", "reason": "FailedMount", "message": "no such volume"}
    api.create("events", {**event, "involvedObject": about})
    assert "head pod h-1 does not start (FailedMount): no such volume" in str(KubernetesLauncher().status(job))
    api.forbid("list", "events")
    assert str(KubernetesLauncher().status(job)) == "pending (Initializing)", "what may not be seen is not told"


def test_the_output_is_that_of_the_newest_submitter(api: KubeApi, run: RunFolder) -> None:
    launcher, job = KubernetesLauncher(), sent(run)
    assert launcher.output(job, run) == ""
    add_pod(api, job, "submitter", "s-1", phase="Running")
    assert launcher.output(job, run) == "", "there is no kubelet yet"
    api.set_log(NAMESPACE, "s-1", "sent to Ray\nstep 1/100 ä\n")
    assert launcher.output(job, run) == "sent to Ray\nstep 1/100 ä\n"


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(api: KubeApi, tmp_path: Path) -> Any:
    """Runs a command of distlm where the cluster is known."""
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG))
    env = environment(tmp_path, KUBECONFIG=os.environ["KUBECONFIG"], SECRET_OF_MINE="hunter2-hunter2")
    return lambda *arguments: distlm(*arguments, cwd=tmp_path, env=env)


def test_submit_status_and_resume(api: KubeApi, cli: Any, tmp_path: Path) -> None:
    done = cli("submit", "run.yaml", "--detach")
    assert done.returncode == 0, (done.stdout, done.stderr)
    (path,) = (tmp_path / "runs").iterdir()
    run, name = RunFolder(path), api.objects("rayjobs")[0]["metadata"]["name"]
    assert f"kubernetes job distlm/{name}: submitted" in done.stdout
    refused = cli("resume", "last")
    assert refused.returncode == ExitCode.BAD_INPUT and "has a job already" in refused.stderr
    api.set_status("rayjobs", name, RUNNING)
    assert json.loads(cli("status", "last", "--json").stdout)["state"] == "running"

    result = {
        "state": "preempted",
        "exit_code": 75,
        "message": "stopped after step 40, which is saved",
        "newest_step": 40,
    }
    result |= {"cause": "preemption", "problems": [], "log": "x", "needs_new_attempt": False}
    add_pod(api, Job("kubernetes", f"distlm/{name}"), "submitter", "s-1", phase="Succeeded")
    api.set_log(NAMESPACE, "s-1", f"step 40/100\n{RESULT_PREFIX}{json.dumps(result)}\n")
    api.set_status("rayjobs", name, FAILED)
    told = json.loads(cli("status", "last", "--json").stdout)
    assert told["state"] == "preempted" and told["attempts"][0]["exit_code"] == 75
    assert read_json(run.attempts()[0].result_json)["newest_step"] == 40
    assert run.attempts()[0].output_log.read_text() == "step 40/100\n"

    here = cli("resume", "last", "--target", "local")
    assert here.returncode == ExitCode.BAD_INPUT and "with step 40 as the newest, are not here" in here.stderr
    again = cli("resume", "last", "--detach")
    assert again.returncode == 0, (again.stdout, again.stderr)
    (second,) = [one for one in api.objects("rayjobs") if one["metadata"]["name"].startswith(f"distlm-{path.name}-002")]
    assert second["metadata"]["annotations"]["distlm/run-folder"] == f"/storage/runs/{path.name}"
    assert api.object("configmaps", second["metadata"]["name"])["data"]["newest_step"] == "40"


def test_a_run_is_cancelled_in_its_head_pod(api: KubeApi, run: RunFolder, cli: Any) -> None:
    job = sent(run)
    api.set_status("rayjobs", name_of(job), RUNNING)
    add_pod(api, job, "head", "h-1", phase="Running")
    add_pod(api, job, "submitter", "s-1", phase="Running")
    asked: list[list[str]] = []

    def in_head_pod(pod: str, command: list[str]) -> tuple[str, int]:
        asked.append(command)
        api.set_log(NAMESPACE, "s-1", f"{RESULT_PREFIX}{json.dumps(PREEMPTED)}\n")
        api.set_status("rayjobs", name_of(job), FAILED)
        return "", 3  # it has not ended within no time

    api.on_exec(in_head_pod)
    done = cli("cancel", "last", "--checkpoint")
    assert done.returncode == 0 and "preempted" in done.stdout, (done.stdout, done.stderr)
    assert asked == [["python", "-m", "distlm.cli", "cancel", job.folder, "--timeout=0", "--checkpoint"]]
    assert api.object("rayjobs", name_of(job))["spec"]["backoffLimit"] == 0, "KubeRay is not to begin again"


def test_a_command_that_fails_in_the_head_pod_deletes_nothing(api: KubeApi, run: RunFolder) -> None:
    """The run has ended otherwise meanwhile, or needs longer: its output is still to be read."""
    job = sent(run)
    api.set_status("rayjobs", name_of(job), RUNNING)
    add_pod(api, job, "head", "h-1", phase="Running")
    for code, is_asked in ((3, True), (2, False), (0, False)):  # the run's folder is not there yet; it had ended before
        api.on_exec(lambda pod, command, code=code: ("", code))
        assert KubernetesLauncher().cancel(job, saves=True) == is_asked
    assert len(api.objects("rayjobs")) == 1

    def vanish(pod: str, command: list[str]) -> tuple[str, int]:
        api.disconnect()
        return "", 0

    api.on_exec(vanish)
    KubernetesLauncher().cancel(job, saves=True)
    with pytest.raises(InfrastructureError, match="in the pod h-1"):
        list(KubernetesLauncher().logs_there(job, ["--rank=0"]))
    assert len(api.objects("rayjobs")) == 1


def test_a_run_that_has_ended_for_good_is_not_begun_again(api: KubeApi, run: RunFolder, cli: Any) -> None:
    """KubeRay is about to: nobody waits for new pods to be told what is known."""
    job = sent(run)
    add_pod(api, job, "submitter", "s-1", phase="Succeeded")
    result = PREEMPTED | {"state": "failed", "exit_code": 1, "message": "no number", "cause": "divergence"}
    api.set_log(NAMESPACE, "s-1", f"step 1\nTraceback\n{RESULT_PREFIX}{json.dumps(result)}\n")
    api.set_status("rayjobs", name_of(job), {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1})
    assert json.loads(cli("status", "last", "--json").stdout)["state"] == "failed"
    assert api.object("rayjobs", name_of(job))["spec"]["backoffLimit"] == 0
    assert run.attempts()[0].output_log.read_text() == "step 1\nTraceback\n"


def test_a_job_whose_cluster_does_not_answer_may_still_run(
    api: KubeApi, run: RunFolder, cli: Any, tmp_path: Path
) -> None:
    sent(run)
    path = Path(os.environ["KUBECONFIG"])
    path.write_text(path.read_text().replace(api.url, "http://127.0.0.1:9"))
    refused = cli("resume", "last")
    assert refused.returncode == ExitCode.BAD_INPUT and "whether a job of run" in refused.stderr, refused.stderr
    assert len(run.attempts()) == 1


def test_without_its_result_a_run_that_was_elsewhere_does_not_begin_anew_here(
    api: KubeApi, run: RunFolder, cli: Any
) -> None:
    job = sent(run)
    api.set_status("rayjobs", name_of(job), RUNNING)
    api.delete("rayjobs", name_of(job))
    told = json.loads(cli("status", "last", "--json").stdout)
    assert told["state"] == "infrastructure" and "is not there any more" in told["attempts"][0]["message"]
    here = cli("resume", "last", "--target", "local")
    assert here.returncode == ExitCode.BAD_INPUT and "if it has saved any, are not here" in here.stderr
    assert cli("resume", "last", "--detach").returncode == 0


def test_without_a_head_pod_to_ask_the_ray_job_is_deleted(api: KubeApi, run: RunFolder, cli: Any) -> None:
    job = sent(run)
    api.set_status("rayjobs", name_of(job), RUNNING)
    done = cli("cancel", "last")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert api.objects("rayjobs") == [] and api.objects("configmaps") == []
    assert read_json(run.attempts()[0].result_json)["exit_code"] == ExitCode.CANCELLED


def test_a_run_that_waits_is_taken_away(api: KubeApi, run: RunFolder, cli: Any) -> None:
    job = sent(run)
    api.set_status("rayjobs", name_of(job), {"jobDeploymentStatus": "Initializing"})
    done = cli("cancel", "last")
    assert done.returncode == 0 and "is taken from the queue" in done.stdout, (done.stdout, done.stderr)
    assert api.objects("rayjobs") == []


def test_the_log_of_a_rank_comes_from_the_head_pod(api: KubeApi, run: RunFolder, cli: Any) -> None:
    job = sent(run)
    api.set_status("rayjobs", name_of(job), RUNNING)
    none = cli("logs", "last", "--rank", "1")
    assert none.returncode == ExitCode.BAD_INPUT and "has no head pod that runs" in none.stderr
    add_pod(api, job, "head", "h-1", phase="Running")
    without = cli("logs", "last", "--rank", "1")
    assert without.returncode != 0 and "in the pod h-1" in without.stderr, "no kubelet"
    api.on_exec(lambda pod, command: (" ".join([pod, *command[3:]]) + "\n", 0))
    assert cli("logs", "last", "--rank", "1").stdout == f"h-1 logs {job.folder} --rank=1\n"
    api.on_exec(lambda pod, command: ("", 2))
    failed = cli("logs", "last", "--rank", "7", "-f")
    assert failed.returncode == ExitCode.INFRASTRUCTURE and "exit code 2" in failed.stderr
    api.forbid("get", "pods/exec")
    refused = cli("logs", "last", "--rank", "1")
    assert refused.returncode == ExitCode.BAD_INPUT and 'resource "pods/exec"' in refused.stderr


def test_who_sees_a_run_fail_tells_kuberay(api: KubeApi, run: RunFolder, cli: Any) -> None:
    """In the run's own folder, which is seen from here."""
    job = sent(run)
    end(run.attempts()[0], ExitCode.FAILED)
    cli("status", "last")
    assert api.object("rayjobs", name_of(job))["spec"]["backoffLimit"] == 0


def test_what_a_job_printed_before_the_log_of_its_run_hides_nothing(
    api: KubeApi, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run whose folder is seen from here: its log comes seconds after the submitter's first line."""
    job = sent(run)
    api.set_status("rayjobs", name_of(job), RUNNING)
    add_pod(api, job, "submitter", "s-1", phase="Running")
    api.set_log(NAMESPACE, "s-1", "sent to Ray\n")
    follower = _Follower(run, PlainView(sys.stdout))
    assert follower._look(shows_ending=True) is None
    run.attempts()[0].output_log.write_text("step 1\n")
    follower._show_new_lines()
    assert follower._look(shows_ending=True) is None
    follower._show_new_lines()
    with open(run.attempts()[0].output_log, "a") as log:
        log.write("step 2\n")
    follower._show_new_lines()
    shown = capsys.readouterr().out
    assert [shown.count(line) for line in ("sent to Ray", "step 1", "step 2")] == [1, 1, 1]


def test_where_the_pods_have_a_run_that_is_on_their_storage(
    api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folder one is in, and whatever place an attempt was sent to before that was refused there."""
    run = make_run(tmp_path / "project" / "runs", **{key: CONFIG[key] for key in ("resources", "kubernetes", "env")})
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    first = begin_attempt(load_tree(CONFIG), run, [])
    Job("kubernetes", "distlm/a", folder="/storage/runs/elsewhere").write(first)
    end(first, ExitCode.BAD_INPUT)
    begin_attempt(load_tree(CONFIG), run, [])
    monkeypatch.chdir("/")
    settings = CONFIG["kubernetes"] | {"storage": {"mount_path": str(tmp_path)}}
    request = KubernetesLauncher().build(load_tree({**CONFIG, "kubernetes": settings}).config, run)
    assert request.ray_job["metadata"]["annotations"]["distlm/run-folder"] == str(run.path)


def test_a_run_whose_storage_is_taken_away_is_told(run: RunFolder) -> None:
    Job("kubernetes", "distlm/a", folder="/storage/runs/x").write(run.attempts()[0])
    with pytest.raises(
        InputError, match="the run is in /storage/runs/x of the pods, which is on none of their storage"
    ):
        built(run, storage={"mount_path": "/other"})


@pytest.mark.parametrize(
    ("request_json", "state"),
    [({"save": True, "reason": "the head pod is about to end"}, "infrastructure"), ({"save": True}, "cancelled")],
)
def test_a_pod_that_ends_is_no_cancel_by_the_user(
    api: KubeApi, run: RunFolder, cli: Any, request_json: dict[str, Any], state: str
) -> None:
    job = sent(run)
    write_json(run.attempts()[0].cancel_json, request_json)
    api.delete("rayjobs", name_of(job))
    assert json.loads(cli("status", "last", "--json").stdout)["state"] == state


def test_a_deleted_run_that_has_ended_keeps_its_result(api: KubeApi, run: RunFolder, cli: Any) -> None:
    job = sent(run)
    end(run.attempts()[0], ExitCode.SUCCEEDED)
    api.delete("rayjobs", name_of(job))
    assert json.loads(cli("status", "last", "--json").stdout)["state"] == "succeeded"


def test_a_request_that_cannot_be_sent_leaves_a_result(api: KubeApi, cli: Any, tmp_path: Path) -> None:
    api.without_kuberay()
    done = cli("submit", "run.yaml")
    assert done.returncode == ExitCode.BAD_INPUT and "install KubeRay" in done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    assert read_json(RunFolder(path).attempts()[0].result_json)["exit_code"] == ExitCode.BAD_INPUT


@pytest.mark.parametrize("num_drops", [3, 4, 5])
def test_an_api_that_breaks_off_again_and_again(
    api: KubeApi, run: RunFolder, monkeypatch: pytest.MonkeyPatch, num_drops: int
) -> None:
    """It is asked four times, each time."""
    monkeypatch.setattr("distlm.launchers.kubernetes_api._PAUSE_FACTOR_S", 0.01)
    api.drop(num_drops)
    if num_drops < 4:
        sent(run)
    else:
        with pytest.raises(InfrastructureError, match="does not answer"):
            sent(run)
    assert len(api.objects("rayjobs")) == (num_drops < 4)


FOLLOW = """
import sys
import time
from distlm.cli import main
from distlm.commands import follow

follow._ASK_JOB_INTERVAL_S = 0.3
sys.exit(main(["submit", "run.yaml"]))
"""


def test_a_run_is_followed_to_its_end(api: KubeApi, tmp_path: Path) -> None:
    """From sending it to its exit code, through a retry on new pods; the test plays KubeRay."""
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG))
    env = environment(tmp_path, KUBECONFIG=os.environ["KUBECONFIG"])
    with subprocess.Popen(
        (sys.executable, "-c", FOLLOW), cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        shown: list[str] = []

        def wait_for(text: str) -> None:
            assert follower.stdout is not None
            while not shown or text not in shown[-1]:
                line = follower.stdout.readline()
                assert line, (text, shown)
                shown.append(line)

        wait_for(": submitted\n")
        (ray_job,) = api.objects("rayjobs")
        name = ray_job["metadata"]["name"]
        job = Job("kubernetes", f"{NAMESPACE}/{name}")
        add_pod(api, job, "worker", "w-1", phase="Pending", containerStatuses=[
            {"name": "ray-worker", "ready": False, "restartCount": 0, "image": "i", "imageID": "",
             "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
        ])  # fmt: skip
        api.set_status("rayjobs", name, {"jobDeploymentStatus": "Initializing", "rayClusterName": "c"})
        wait_for(
            "pending (Initializing): worker pod w-1 cannot start (ImagePullBackOff): not found; look at kubernetes"
        )
        api.set_status("pods", "w-1", {"phase": "Running", "containerStatuses": None})
        add_pod(api, job, "submitter", "s-1", phase="Running")
        api.set_log(NAMESPACE, "s-1", "sent to Ray: python\nattempt 1\nstep 1\n")
        api.set_status("rayjobs", name, RUNNING)
        wait_for("step 1")
        ended = {"name": "ray-worker", "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
        ended |= {"ready": True, "restartCount": 1, "image": "i", "imageID": "i"}
        api.set_status("pods", "w-1", {"containerStatuses": [ended]})
        wait_for("runs; worker pod w-1 ran out of memory (OOMKilled)")
        api.set_status("pods", "w-1", {"containerStatuses": None})
        api.delete("pods", "s-1")
        api.set_status("rayjobs", name, {"jobDeploymentStatus": "Retrying", "failed": 1})
        wait_for("it goes on with new pods (retry 1 of 3)")
        add_pod(api, job, "submitter", "s-2", phase="Running")
        api.set_log(NAMESPACE, "s-2", "sent to Ray: python\nattempt 2\nstep 2\n")
        api.set_status("rayjobs", name, RUNNING)
        wait_for("step 2")
        result = {
            **PREEMPTED,
            "state": "failed",
            "exit_code": 1,
            "cause": "divergence",
            "message": "the loss is not a number",
        }
        api.append_log(NAMESPACE, "s-2", f"the last line\n{RESULT_PREFIX}{json.dumps(result)}\n")
        api.set_status("rayjobs", name, {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"})
        rest = follower.stdout.read()
    assert follower.returncode == ExitCode.FAILED
    text = "".join(shown) + rest
    assert [text.count(part) for part in ("attempt 1", "step 1", "attempt 2", "step 2", "the last line")] == [1] * 5
    assert RESULT_PREFIX not in text


@pytest.mark.parametrize("result", ['{"exit_code": 1', "[1]", '"1"', '{"exit_code": "1"}', '{"exit_code": 75}', ""])
def test_only_an_end_for_good_that_can_be_read_is_told(api: KubeApi, run: RunFolder, result: str) -> None:
    job = sent(run)
    run.attempts()[-1].result_json.write_text(result)
    tell_target_of_end(run)
    assert api.object("rayjobs", name_of(job))["spec"]["backoffLimit"] > 0


def test_an_end_for_good_is_told_while_it_is_new(api: KubeApi, run: RunFolder) -> None:
    """Who cannot reach the cluster any more is not to wait for it."""
    job = sent(run)
    end(run.attempts()[-1], ExitCode.FAILED)
    result_json, now_s = run.attempts()[-1].result_json, time.time()
    for age_s, limit_is_zero in ((2 * 86400, False), (0, True)):
        os.utime(result_json, (now_s - age_s, now_s - age_s))
        tell_target_of_end(run)
        assert (api.object("rayjobs", name_of(job))["spec"]["backoffLimit"] == 0) == limit_is_zero
