"""What a config becomes on Kubernetes: each key in its place, manifests that nothing is wrong with, and what is refused
before anything is sent."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_checks import RULES, Manifest, read_manifests

from distlm.cli import main
from distlm.config.load import load_config, load_tree
from distlm.errors import InputError
from distlm.launchers.kubernetes import KubernetesLauncher
from distlm.launchers.kubernetes_manifests import MAX_NAME, merged, name_of

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "name": "My run",
    "model": {"config": {"model_type": "bert"}},
    "tokenizer": {"train": {"vocab_size": 1000}},
    "data": {"train": [{"source": "python-docs"}]},
    "training": {"max_steps": 100, "global_train_batch_size": 64, "per_device_train_batch_size": 4},
    "resources": {"num_workers": 2, "target": "kubernetes"},
    "kubernetes": {"image": "distlm:1", "worker_pods": 2},
}
GPUS = {"gpus": 4, "cpus": 32, "memory_gib": 256.0, "shared_memory_gib": 16.0}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gpus": ({"num_workers": 8, "device": "cuda"}, {"worker": GPUS}),
    "elastic": ({"num_workers": [1, 4]}, {"worker_pods": 4}),
    "placed": (
        {},
        {
            "node_selector": {"pool": "training"},
            "tolerations": [{"key": "training", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
            "priority_class": "low", "queue": "research",
        },
    ),
    "image": ({}, {
        "image": f"registry.example:5000/team/distlm@sha256:{'a' * 64}", "image_pull_policy": "IfNotPresent",
        "image_pull_secrets": ["registry"],
    }),
    "ends": ({"time_to_save_s": 300.0}, {"active_deadline_s": 86400, "max_retries": 0, "ttl_s": 0, "suspend": True}),
    "places": ({}, {"namespace": "research", "service_account": "a", "storage": {"claim": "c", "mount_path": "/data"}}),
    "small": ({}, {"head": {"cpus": 1, "memory_gib": 2.5, "shared_memory_gib": 0.25}, "network_policy": False}),
    "env": ({}, {"env": {"NCCL_DEBUG": "INFO"}, "env_secret": "tokens"}),
    "patched": ({}, {
        "pod_template": {"metadata": {"annotations": {"team": "nlp"}}, "spec": {"runtimeClassName": "nvidia"}},
        "worker_template": {"spec": {
            "containers": [{
                "name": "ray-worker", "env": [{"name": "HOME", "value": "/scratch"}],
                "resources": {"limits": {"rdma/hca": 1}, "requests": {"rdma/hca": 1}},
                "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
            }],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
        }},
        "head_template": {"spec": {"nodeSelector": {"pool": "cpu"}}},
    }),
}  # fmt: skip


def rendered(resources: dict[str, Any], settings: dict[str, Any], **others: Any) -> list[Manifest]:
    tree = {**CONFIG, **others}
    tree["resources"] = {**CONFIG["resources"], **resources}
    tree["kubernetes"] = {**CONFIG["kubernetes"], **settings}
    config = load_tree(tree, (), KubernetesLauncher().check).config
    path = Path(__file__).parent / "run.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_: "name: My run\n# with 'all' its \"text\"\n")
        text = str(KubernetesLauncher().render(config, path, ["training.max_steps=7", "name=a b"]))
    return read_manifests(text)


def pod_specs(ray_job: Manifest) -> dict[str, Manifest]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"]["spec"],
        "worker": cluster["workerGroupSpecs"][0]["template"]["spec"],
        "submitter": ray_job["spec"]["submitterPodTemplate"]["spec"],
    }


def environ(pod: Manifest) -> dict[str, Any]:
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in pod["containers"][0]["env"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_wrong_with_what_is_rendered(name: str) -> None:
    resources, settings = VARIANTS[name]
    documents = rendered(resources, settings, env=["HF_TOKEN"] if name == "env" else [])
    assert [f"{one['kind']}: {what}" for one in documents for rule in RULES for what in rule(one)] == []
    kinds = ["ConfigMap", *(["NetworkPolicy"] if name != "small" else []), "RayJob"]
    assert [one["kind"] for one in documents] == kinds


@pytest.mark.parametrize(
    ("config", "path"), [("pretrain", "base/60-pretrain.yaml"), ("finetune-lora", "finetune-lora/finetune-lora.yaml")]
)
def test_what_is_shipped_is_rendered(
    config: str, path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["render", f"configs/{config}.yaml", "--target", "kubernetes"]) == 0
    assert (ROOT / "k8s" / path).read_text() == capsys.readouterr().out


def test_a_plain_run() -> None:
    config_map, policy, ray_job = rendered({}, {})
    name = "distlm-my-run"
    assert {one["metadata"]["name"] for one in (config_map, policy, ray_job)} == {name}
    assert config_map["data"] == {"run.yaml": "name: My run\n# with 'all' its \"text\"\n"}
    spec = ray_job["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["entrypoint"] == "python -m distlm.ray_job /etc/distlm/run.yaml training.max_steps=7 'name=a b'"
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] == 3 and "suspend" not in spec
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    pods = pod_specs(ray_job)
    submitter = pods["submitter"]["containers"][0]
    assert submitter["args"][-2:] == ["training.max_steps=7", "name=a b"]
    head = environ(pods["head"])
    assert head["DISTLM_NUM_OWN_NODES"] == "3" and head["DISTLM_JOB"] == f"kubernetes:$(POD_NAMESPACE)/{name}"
    assert list(head).index("POD_NAMESPACE") < list(head).index("DISTLM_JOB"), "Kubernetes expands what stands before"
    assert environ(pods["worker"])["DISTLM_REPLACES_NODES"] == "1"
    (worker_group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert [worker_group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_policy_lets_in_the_own_pods_and_the_operator() -> None:
    _, policy, ray_job = rendered({}, {})
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    cluster = ray_job["spec"]["rayClusterSpec"]
    for template in (
        cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"],
        ray_job["spec"]["submitterPodTemplate"],
    ):  # fmt: skip
        assert chosen.items() <= template["metadata"]["labels"].items()
    own, operator = policy["spec"]["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": chosen}}] and "ports" not in own
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]


def test_a_pod_has_time_to_save() -> None:
    *_, ray_job = rendered(*VARIANTS["ends"])
    for kind in ("head", "worker"):
        pod = pod_specs(ray_job)[kind]
        assert pod["terminationGracePeriodSeconds"] == 330
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "distlm.kubernetes.pre_stop", "330"]
    assert environ(pod_specs(ray_job)["head"])["RAY_JOB_STOP_WAIT_TIME_S"] == "300"
    spec = ray_job["spec"]
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (86400, 0, 0)
    assert spec["suspend"] is True


def test_gpus() -> None:
    *_, ray_job = rendered(*VARIANTS["gpus"])
    worker = pod_specs(ray_job)["worker"]
    amounts = {"cpu": 32, "memory": "256Gi", "nvidia.com/gpu": 4}
    assert worker["containers"][0]["resources"] == {"requests": amounts, "limits": amounts}
    assert worker["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    volumes = {one["name"]: one for one in worker["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert "nvidia.com/gpu" not in str(pod_specs(ray_job)["head"])


def test_where_pods_are_placed() -> None:
    *_, ray_job = rendered(*VARIANTS["placed"])
    pods = pod_specs(ray_job)
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research" and ray_job["spec"]["suspend"]
    assert {pod["priorityClassName"] for pod in pods.values()} == {"low"}
    assert pods["worker"]["nodeSelector"] == {"pool": "training"} and "nodeSelector" not in pods["head"]
    assert [one["key"] for one in pods["worker"]["tolerations"]] == ["training"]


def test_secrets_are_named_and_not_printed() -> None:
    *_, ray_job = documents = rendered({}, {"env_secret": "tokens"}, env=["HF_TOKEN"])
    reference = {"secretKeyRef": {"name": "tokens", "key": "HF_TOKEN", "optional": True}}
    pods = pod_specs(ray_job)
    assert environ(pods["head"])["HF_TOKEN"] == environ(pods["worker"])["HF_TOKEN"] == reference
    assert "HF_TOKEN" not in environ(pods["submitter"])
    assert not any(one["kind"] == "Secret" for one in documents)
    with pytest.raises(InputError, match=r"kubernetes\.env_secret: name a Secret"):
        rendered({}, {}, env=["HF_TOKEN"])


def test_templates_are_patched_by_names() -> None:
    *_, ray_job = rendered(*VARIANTS["patched"])
    pods = pod_specs(ray_job)
    assert {pod["runtimeClassName"] for pod in pods.values()} == {"nvidia"}
    worker = pods["worker"]
    assert len(worker["containers"]) == 1 and worker["containers"][0]["image"] == "distlm:1"
    assert environ(worker)["HOME"] == "/scratch" and environ(worker)["RAY_worker_niceness"] == "0"
    assert worker["containers"][0]["resources"]["limits"] == {"cpu": 2, "memory": "4Gi", "rdma/hca": 1}
    assert {one["name"] for one in worker["volumes"]} == {"storage", "tmp", "shared-memory", "scratch"}
    assert pods["head"]["nodeSelector"] == {"pool": "cpu"} and "nodeSelector" not in worker


def test_a_patch_of_all_pods_changes_each_container_in_its_own() -> None:
    containers = [{"name": f"ray-{kind}", "imagePullPolicy": "Always"} for kind in ("head", "worker", "job-submitter")]
    sidecar = {"name": "logs", "image": "logs:1"}
    *_, ray_job = rendered({}, {"pod_template": {"spec": {"containers": [*containers, sidecar]}}})
    for kind, name in (("head", "ray-head"), ("worker", "ray-worker"), ("submitter", "ray-job-submitter")):
        found = pod_specs(ray_job)[kind]["containers"]
        assert [one["name"] for one in found] == [name, "logs"]
        assert found[0]["imagePullPolicy"] == "Always" and found[0]["image"] == "distlm:1"


def test_merging() -> None:
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}
    assert merged([1, 2], [3]) == [3] and merged({"a": 1}, {"a": None}) == {"a": None}
    assert merged([{"name": "x", "v": 1}], [{"name": "y"}, {"name": "x", "w": 2}]) == [
        {"name": "x", "v": 1, "w": 2}, {"name": "y"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pretrain", "distlm-pretrain"),
        ("My run: größe 3!", "distlm-my-run-gr-e-3"),
        ("---", "distlm"),
        ("a" * 40, "distlm-" + "a" * 40),
    ],
)
def test_names(text: str, name: str) -> None:
    assert name_of(text) == name


def test_long_names_stay_apart() -> None:
    first, second = (name_of("a" * 80 + end) for end in "xy")
    assert first != second and {len(first), len(second)} == {MAX_NAME}


@pytest.mark.parametrize(
    ("resources", "settings", "problem"),
    [
        ({}, {"image": None}, "kubernetes.image: give the image"),
        ({}, {"image": "distlm"}, "kubernetes.image = distlm: give it by a tag that says which one it is"),
        ({}, {"image": "distlm:latest"}, "kubernetes.image = distlm:latest: give it by a tag"),
        ({}, {"image": "localhost:5000/distlm"}, "kubernetes.image = localhost:5000/distlm: give it by a tag"),
        ({}, {"image": "dist lm:1"}, "kubernetes.image = dist lm:1: is no name of an image"),
        ({}, {"worker_pods": 3}, "kubernetes.worker_pods = 3: some of them would have nothing to do"),
        ({"device": "cuda"}, {}, "kubernetes.worker.gpus = 0: resources.device is cuda; each pod needs 1"),
        ({"device": "cpu"}, {"worker": GPUS}, "kubernetes.worker.gpus = 4: resources.device is cpu"),
        ({"num_workers": 16}, {"worker": GPUS}, "kubernetes.worker.gpus = 4: 8 workers are to be on each pod"),
        ({"cpus_per_worker": 4}, {}, "kubernetes.worker.cpus = 2: 1 workers with resources.cpus_per_worker = 4 need"),
        ({}, {"head": {"shared_memory_gib": 4.0}}, "kubernetes.head.memory_gib = 4: shared_memory_gib = 4 is a part"),
        ({}, {"active_deadline_s": 60}, "kubernetes.active_deadline_s = 60: nothing could be trained"),
        ({}, {"namespace": "Mine"}, "kubernetes.namespace = Mine: must be a name as Kubernetes takes it"),
        ({}, {"storage": {"mount_path": "data"}}, "kubernetes.storage.mount_path = data: must be the absolute path"),
        ({}, {"storage": {"mount_path": "/"}}, "kubernetes.storage.mount_path = /: must be the absolute path"),
        ({}, {"env": {"a b": "c"}}, "kubernetes.env: a b is no name of an environment variable"),
        ({}, {"pod_template": {"containers": []}}, "kubernetes.pod_template: containers is no key of a pod template"),
        ({}, {"max_retries": -1}, "kubernetes.max_retries = -1"),
        ({}, {"tolerations": {}}, "kubernetes.tolerations"),
        ({}, {"gpus": 8}, "kubernetes.gpus"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_sent(
    resources: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError) as error:
        rendered(resources, settings)
    assert any(problem in str(one) for one in error.value.problems), error.value


@pytest.mark.parametrize(
    ("plain", "secret", "problem"),
    [
        ({"HF_TOKEN": "a"}, ["HF_TOKEN"], "kubernetes.env.HF_TOKEN = a: stands under env, too"),
        ({"DISTLM_JOB": "a"}, [], "kubernetes.env.DISTLM_JOB = DISTLM_JOB: is set by distlm"),
        ({"RAY_USAGE_STATS_ENABLED": "1"}, [], "kubernetes.env.RAY_USAGE_STATS_ENABLED = "),
        ({}, ["POD_NAMESPACE"], "env = POD_NAMESPACE: is set by distlm"),
        ({}, ["HOME"], "env = HOME: is another one in the pods"),
        ({}, ["A", "A"], "env = A: is named twice"),
    ],
)
def test_each_variable_is_given_once(plain: dict[str, str], secret: list[str], problem: str) -> None:
    with pytest.raises(InputError) as error:
        rendered({}, {"env": plain, "env_secret": "s"}, env=secret)
    assert [str(one).startswith(problem) for one in error.value.problems] == [True]
    assert environ(pod_specs(rendered({}, {"env": {"HOME": "/scratch"}})[-1])["worker"])["HOME"] == "/scratch"


@pytest.mark.parametrize(
    ("runs_dir", "is_refused"),
    [("runs", False), ("/storage/mine", False), ("/home/ada/runs", True), ("../runs", True), ("/scratch/runs", False)],
)
def test_the_runs_folder_is_on_the_storage(runs_dir: str, is_refused: bool) -> None:
    mount = {"name": "scratch", "mountPath": "/scratch"}
    template = {"spec": {"containers": [{"name": "ray-head", "volumeMounts": [mount]}]}}
    tree = {**CONFIG, "runs_dir": runs_dir, "kubernetes": {**CONFIG["kubernetes"], "pod_template": template}}
    problems = [str(one) for one in KubernetesLauncher().check(load_tree(tree).config)]
    assert any(problem.startswith("runs_dir") for problem in problems) == is_refused, problems


def test_a_secret_in_a_config_is_refused() -> None:
    with pytest.raises(InputError, match=r"kubernetes\.env\.URI"):
        rendered({}, {"env": {"URI": "http://ada:hunter2@mlflow:5000"}})


def test_a_dry_run_prints_what_would_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG))
    assert main(["submit", "run.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["name"] == "My run", "all else is comments"
    documents = read_manifests("\n".join(line[2:] for line in out.splitlines() if line.startswith("# ")))
    assert documents[-1]["kind"] == "RayJob" and not (tmp_path / "runs").exists()


def test_names_of_kubernetes_have_dots(tmp_path: Path) -> None:
    """In files and in overrides; ours have none."""
    selector, annotation = (
        {"nvidia.com/gpu.product": "A100"},
        {"a.kubernetes.io/evict": "false"},
    )
    tree = {**CONFIG, "kubernetes": {**CONFIG["kubernetes"], "node_selector": selector}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    override = "kubernetes.pod_template={metadata: {annotations: {a.kubernetes.io/evict: 'false'}}}"
    settings = load_config(tmp_path / "run.yaml", [override]).config.kubernetes
    assert (settings.node_selector, settings.pod_template) == (selector, {"metadata": {"annotations": annotation}})
    with pytest.raises(InputError, match="keys have no dots"):
        load_config(tmp_path / "run.yaml", ["kubernetes={worker.cpus: 3}"])
    with pytest.raises(InputError, match=r"kubernetes\.node_selector\.a\.b/c"):
        load_config(tmp_path / "run.yaml", ["kubernetes.node_selector={a.b/c: 3}"])


def test_a_config_of_any_name_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = yaml.safe_dump(CONFIG, allow_unicode=True) + "# größer, with 'quotes', a trailing blank \n#\ttab: {x}\n"
    (tmp_path / "my größe run.yaml").write_text(text)
    assert main(["render", "my größe run.yaml", "name=größe #1", "--target", "kubernetes"]) == 0
    config_map, *_, ray_job = read_manifests(capsys.readouterr().out)
    assert config_map["data"] == {"my-gr--e-run.yaml": text}
    assert ray_job["spec"]["entrypoint"].endswith("/etc/distlm/my-gr--e-run.yaml 'name=größe #1'")
    assert [what for rule in RULES for what in rule(config_map)] == []


@pytest.mark.parametrize(
    ("override", "is_refused"),
    [
        ("name=a", True),
        ("env=[DATA]", False),
        ("kubernetes.env={DATA: /storage/there}", False),
        ("kubernetes.pod_template={spec: {containers: [{name: ray-head, env: [{name: DATA, value: /d}]}]}}", False),
        ("kubernetes.head_template={spec: {containers: [{name: ray-head, envFrom: []}]}}", False),
        ("resources.target=slurm", False),
    ],
)
def test_variables_of_the_config_are_those_of_the_pods(
    monkeypatch: pytest.MonkeyPatch, override: str, is_refused: bool
) -> None:
    """What is set here is not there by itself; what is given for the pods need not be set here."""
    monkeypatch.setenv("DATA", "/here")
    tree = {**CONFIG, "data": {"train": [{"source": "files", "paths": ["${DATA}/text.txt"]}]}}
    if is_refused:
        with pytest.raises(InputError, match=r"data\.train\.0\.paths\.0.*DATA is not passed on to the pods; name it"):
            load_tree(tree, [override])
        return
    paths = load_tree(tree, [override]).config.data.train[0].paths
    assert paths == ["/storage/there/text.txt" if "kubernetes.env" in override else "/here/text.txt"]
    monkeypatch.delenv("DATA")
    if "kubernetes.env" in override:
        assert load_tree(tree, [override]).config.data.train[0].paths == paths


@pytest.mark.parametrize(
    "override",
    ["env=[{HF_TOKEN: x}]", "kubernetes.pod_template={spec: {containers: 3}}",
     "kubernetes.pod_template={spec: {containers: [{name: ray-head, env: [{name: [a]}]}]}}", "kubernetes.env=[a]"],
)  # fmt: skip
def test_what_is_no_config_at_all_is_no_crash(override: str) -> None:
    with contextlib.suppress(InputError):
        load_tree(CONFIG, [override])


def test_a_variable_of_the_pods_may_name_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("B", raising=False)
    tree = {**CONFIG, "name": "${A}", "kubernetes": {**CONFIG["kubernetes"], "env": {"A": "a-${B}", "B": "b"}}}
    config = load_tree(tree).config
    assert (config.name, config.kubernetes.env) == ("a-b", {"A": "a-b", "B": "b"})


def test_the_example_of_the_page() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    example = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    *_, ray_job = rendered(example["resources"], {**example["kubernetes"], "env_secret": "s"}, env=example["env"])
    assert [what for rule in RULES for what in rule(ray_job)] == []
    assert pod_specs(ray_job)["worker"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
