"""What is in k8s/ is right by all that can be told without a cluster: by itself, together, and as overlays make it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from manifest_checks import Manifest, pod_templates, problems, quantity, read_manifests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
BASE = sorted((FOLDER / "base").glob("[0-9]*.yaml"))
FINETUNING = FOLDER / "finetune-lora" / "finetune-lora.yaml"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
DOCKERFILE = (FOLDER / "Dockerfile").read_text()


def test_all_files_together() -> None:
    manifests = [one for path in (*BASE, FINETUNING) for one in read_manifests(path.read_text())]
    assert problems(manifests) == []
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(names) == len(set(names))
    assert {one["metadata"].get("namespace", "distlm") for one in manifests} == {"distlm"}


def test_the_folder_applies_the_base() -> None:
    """`kubectl apply -f k8s/` reads the YAML and JSON files of the folder itself, in the order of their names."""
    applied = sorted(path for path in FOLDER.iterdir() if path.suffix in (".yaml", ".yml", ".json"))
    assert [path.name for path in applied] == [path.name for path in BASE]
    assert [path.readlink() for path in applied] == [path.relative_to(FOLDER) for path in BASE]


def test_what_is_needed_comes_first() -> None:
    kinds = [one["kind"] for path in BASE for one in read_manifests(path.read_text())]
    assert kinds[0] == "Namespace"
    assert kinds.index("RayJob") > max(kinds.index("Deployment"), kinds.index("PriorityClass"), kinds.index("Role"))


def test_the_base_lists_all_its_files() -> None:
    (kustomization,) = read_manifests((FOLDER / "base" / "kustomization.yaml").read_text())
    assert kustomization["resources"] == [path.name for path in BASE]
    assert {path.name for path in (FOLDER / "base").iterdir()} == {*kustomization["resources"], "kustomization.yaml"}


# --- what kubectl makes of it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kubectl() -> str:
    if (program := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not installed")
    told = subprocess.run((program, "version", "--client", "--output=json"), capture_output=True, text=True)
    found = json.loads(told.stdout)["clientVersion"]["gitVersion"] if told.returncode == 0 else "of old"
    if (number := re.match(r"v(\d+)\.(\d+)", found)) is None or (int(number[1]), int(number[2])) < (1, 32):
        pytest.skip(f"kubectl is {found}: 1.32 builds kustomizations without a cluster")
    return program


@pytest.mark.parametrize("path", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_kustomizations(path: str, kubectl: str) -> None:
    manifests = build(kubectl, path)
    assert problems(manifests) == []
    names = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    files = [*BASE, FINETUNING, FOLDER / "overlays/kueue/queue.yaml"] if path == "overlays/kueue" else BASE
    assert names == {
        (one["kind"], one["metadata"]["name"]) for path in files for one in read_manifests(path.read_text())
    }


def build(kubectl: str, path: str) -> list[Manifest]:
    command = (kubectl, "kustomize", str(FOLDER / path))
    return read_manifests(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(("overlay", "tag"), [("cpu-demo", "0.1.0-cpu"), ("gpu", "0.1.0-cuda")])
def test_overlays_choose_the_image_of_all_pods(overlay: str, tag: str, kubectl: str) -> None:
    templates = [template for one in build(kubectl, f"overlays/{overlay}") for _, template in pod_templates(one)]
    images = {container["image"] for template in templates for container in template["spec"]["containers"]}
    assert images == {f"distlm:{tag}"}


def test_the_overlay_for_kueue(kubectl: str) -> None:
    """It has the runs wait as the key of the config does, in a queue that has room for one of them."""
    manifests = build(kubectl, "overlays/kueue")
    (queue,) = [one for one in manifests if one["kind"] == "ClusterQueue"]
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    quota = {one["name"]: quantity(one["nominalQuota"]) for one in flavor["resources"]}
    for job in [one for one in manifests if one["kind"] == "RayJob"]:
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "distlm" and job["spec"]["suspend"] is True
        (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        for name, room in quota.items():
            needs = [
                workers["replicas"] * requested(workers["template"], name),
                requested(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"], name),
                requested(job["spec"]["submitterPodTemplate"], name),
            ]
            assert room / 2 < sum(needs) <= room


def requested(template: Manifest, name: str) -> Decimal:
    return sum((quantity(one["resources"]["requests"][name]) for one in template["spec"]["containers"]), Decimal(0))


def test_the_overlay_for_gpus(kubectl: str) -> None:
    (job,) = [one for one in build(kubectl, "overlays/gpu") if one["kind"] == "RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    spec = worker["template"]["spec"]
    assert spec["containers"][0]["name"] == "ray-worker"
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert "nvidia.com/gpu" not in str(cluster["headGroupSpec"])


# --- the image -------------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs)
    return {str(canonicalize_name(name)): number for name, number in pairs}


def test_constraints_are_within_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = pins()
    for text in [*project["dependencies"], *extras["train"], *extras["ray"], *extras["kubernetes"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_constraints_are_what_is_tested() -> None:
    """Where the index has newer versions by now, it is no mistake of a change that is tested today."""
    other = {}
    for name, number in pins().items():
        try:
            if Version(version(name)).public != Version(number).public:
                other[name] = f"{version(name)} is installed, {number} is in the image"
        except PackageNotFoundError:
            continue
    if other:
        pytest.skip(f"renew k8s/constraints.txt: {other}")


def test_the_image_is_built_from_what_the_context_has() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


def test_the_image_runs_as_a_user_and_has_exact_versions() -> None:
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE)[-1] == "1000:1000"
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+-slim-bookworm$", DOCKERFILE, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"python:${PYTHON}"}
    assert all("-c k8s/constraints.txt" in line for line in DOCKERFILE.splitlines() if "pip install" in line)
