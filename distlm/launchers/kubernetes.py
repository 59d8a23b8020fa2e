"""Target kubernetes: the run is a RayJob of KubeRay. What is made of a config is in `kubernetes_manifests`, what the
cluster says about it in `kubernetes_states`, and what the job does in `distlm.ray_job` and `distlm.kubernetes`.

The client needs the package kubernetes alone (`pip install 'distlm[kubernetes]'`), and need not see the storage of the
cluster: the config travels as a ConfigMap, and how the run ended comes back with the job's output.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt, accepted_attempts
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, ExitCode, InfrastructureError, InputError, Problem
from distlm.launchers.base import Job, JobState, JobStatus, Request
from distlm.launchers.carried import carried_files
from distlm.launchers.kubernetes_api import AlreadyThereError, CommandError, KubernetesApi, NotThereError
from distlm.launchers.kubernetes_manifests import (
    COMPONENT_LABEL,
    CONFIG_FOLDER,
    FOLDER_ANNOTATION,
    HEAD,
    OWN_VARIABLES,
    SUBMITTER,
    Manifest,
    folder_in_pods,
    manifests,
    name_of,
    to_yaml,
    working_directory_in_pods,
)
from distlm.launchers.kubernetes_states import of_run, status_of
from distlm.launchers.shares import Hosts, check_hosts
from distlm.run_folder import RunFolder

_START_S = 120
"""What pods and workers need before they train, at least."""


@dataclass(frozen=True)
class KubernetesRequest(Request):
    """Objects to make, by the API or, printed, by kubectl."""

    objects: tuple[Manifest, ...] = ()
    context: str | None = None
    namespace: str | None = None
    env: tuple[str, ...] = field(default=())
    """Names of variables whose values are put into the Secret, and not shown."""

    @property
    def ray_job(self) -> Manifest:
        return self.objects[-1]


class KubernetesLauncher:
    """See `distlm.launchers.base.QueueLauncher`."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        yield from contradictions(config)
        yield from _check_image(config.kubernetes.image)
        yield from _check_pods(config)
        yield from _check_places(config)
        yield from _check_environment(config)

    def check_here(self, config: RunConfig) -> Iterator[Problem]:
        """Files are on the cluster: the controller looks there."""
        return self.check(config)

    def build(self, config: RunConfig, run: RunFolder) -> KubernetesRequest:
        attempts = run.attempts()
        number, token = (attempts[-1].number, Attempt.read(attempts[-1]).token) if attempts else (1, "")
        name = "-".join(filter(None, ("distlm", run.run_id, f"{number:03d}", token)))
        there = working_directory_in_pods(config, str(Path.cwd()))
        folder = _folder_in_pods(config, run, there)
        header = [f"Run {run.run_id} of distlm. `distlm status {run.path}` tells how it goes."]
        return _request(config, header, manifests(config, name, [folder], carried_files(run, there), folder))

    def render(self, config: RunConfig, path: Path, overrides: list[str]) -> KubernetesRequest:
        if config.env and config.kubernetes.env_secret is None:
            message = (
                "name a Secret of the namespace that has the values of the variables under env: no values are printed"
            )
            raise InputError(Problem(message, "kubernetes.env_secret"))
        name = name_of(config.name)
        header = [
            f'A run of {path} ("{config.name}") on Kubernetes: kubectl apply it. A RayJob is one run: made again after',
            "it was deleted, it goes on from its newest checkpoint; when it has ended, only with a changed config. For",
            "another run give another name (`name=...`).",
            "",
            "Printed by:",
            f"  distlm render {shlex.join([str(path), *overrides])} --target kubernetes",
        ]
        file = re.sub(r"[^A-Za-z0-9._-]", "-", path.name)  # as a ConfigMap has it
        what = [f"{CONFIG_FOLDER}/{file}", *overrides]
        return _request(config, header, manifests(config, name, what, {file: path.read_text("utf-8")}))

    def submit(self, request: Request, folder: Path) -> Job:
        assert isinstance(request, KubernetesRequest)
        api = KubernetesApi.connect(request.context, request.namespace)
        name = request.ray_job["metadata"]["name"]
        new: list[Manifest] = []
        try:
            for manifest in request.objects:
                made, is_new = _create(api, _with_values(manifest, request.env))
                new += [manifest] if is_new else []
            for manifest in request.objects[:-1]:
                api.own(manifest, made)
        except BaseException as error:
            if (left := _undo(api, new)) and isinstance(error, DistlmError):
                raise InfrastructureError(f"{error}; left there: {', '.join(left)}") from None
            raise
        there = request.ray_job["metadata"]["annotations"][FOLDER_ANNOTATION]
        return Job("kubernetes", f"{api.namespace}/{name}", address=api.context, folder=there)

    def status(self, job: Job) -> JobStatus:
        try:
            api, name = _api_and_name(job)
            return status_of(api.find(name))
        except NotThereError:
            return JobStatus(JobState.FAILED, "deleted", "its RayJob is not there any more")
        except DistlmError as error:
            return JobStatus(JobState.UNKNOWN, reason=str(error))

    def output(self, job: Job, run: RunFolder) -> str:
        """Of the newest submitter, which is another one after a retry."""
        try:
            api, name = _api_and_name(job)
            pods = api.pods(f"{of_run(name)},{COMPONENT_LABEL}=submitter")
            return api.log(pods[0]["metadata"]["name"], SUBMITTER) if pods else ""
        except DistlmError:
            return ""

    def cancel(self, job: Job, *, saves: bool) -> bool:
        """By a command in the head pod; where that cannot be, the RayJob is deleted, and its pods save as they end."""
        api, name = _api_and_name(job)
        if self.status(job).state != JobState.RUNNING:
            api.delete("RayJob", name)
            return True
        api.no_more_retries(name)
        command = ["cancel", job.folder, "--timeout=0", *(["--checkpoint"] if saves else [])]
        try:
            for _ in self._in_head_pod(api, name, command):
                pass
        except CommandError as error:
            return error.exit_code_there == ExitCode.INFRASTRUCTURE  # it is asked, and has not ended within no time
        except DistlmError:
            api.delete("RayJob", name)
            return True
        return False  # what it says has ended is the attempt before

    def no_more_starts(self, job: Job) -> None:
        api, name = _api_and_name(job)
        api.no_more_retries(name)

    def logs_there(self, job: Job, arguments: Sequence[str]) -> Iterator[str]:
        api, name = _api_and_name(job)
        return self._in_head_pod(api, name, ["logs", job.folder, *arguments])

    def _in_head_pod(self, api: KubernetesApi, name: str, arguments: Sequence[str]) -> Iterator[str]:
        """What a command of distlm prints there. Raises InputError where there is no such pod."""
        heads = [
            pod
            for pod in api.pods(f"{of_run(name)},{COMPONENT_LABEL}=head")
            if (pod.get("status") or {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        if not heads:
            raise InputError(f"the RayJob {name} has no head pod that runs, which could be asked")
        return api.run(heads[0]["metadata"]["name"], HEAD, ["python", "-m", "distlm.cli", *arguments])


def _request(config: RunConfig, header: Sequence[str], objects: list[Manifest]) -> KubernetesRequest:
    settings = config.kubernetes
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header)
    command = ["kubectl", "apply", "-f", "-"]
    if settings.context:
        command.insert(1, f"--context={settings.context}")
    return KubernetesRequest(
        tuple(command), comment + to_yaml(objects), tuple(objects), settings.context, settings.namespace,
        tuple(config.env),
    )  # fmt: skip


def _undo(api: KubernetesApi, made: Sequence[Manifest]) -> list[str]:
    """Delete what was made, the newest first; what is left."""
    left = []
    for manifest in reversed(made):
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            api.delete(kind, name)
        except DistlmError:
            left.append(f"{kind} {name}")
    return left


def _folder_in_pods(config: RunConfig, run: RunFolder, working_directory: str) -> str:
    """The run's folder as the pods see it: where it was, or where it is here, if they see that, or a new one."""
    is_here = PurePosixPath(run.path).is_relative_to(config.kubernetes.storage.mount_path)
    if is_here and CheckpointStore(run.checkpoints).newest_step():
        return str(run.path)
    jobs = [Job.read(attempt) for attempt in reversed(accepted_attempts(run))]
    known = [job.folder for job in jobs if job is not None and job.target == "kubernetes" and job.folder]
    if known:
        if not any(map(PurePosixPath(known[0]).is_relative_to, _mounts(config))):
            message = f"the run is in {known[0]} of the pods, which is on none of their storage now"
            raise InputError(Problem(message, "kubernetes.storage.mount_path", config.kubernetes.storage.mount_path))
        return known[0]
    if is_here:
        return str(run.path)
    return folder_in_pods(config, run.run_id, working_directory)


def _api_and_name(job: Job) -> tuple[KubernetesApi, str]:
    namespace, _, name = job.id.partition("/")
    return KubernetesApi.connect(job.address or None, namespace), name


def _create(api: KubernetesApi, manifest: Manifest) -> tuple[dict[str, Any], bool]:
    """The object, and whether it is new: ours may be there already, where a connection broke after it was made. Raises
    AlreadyThereError for a RayJob of something else."""
    try:
        return api.create(manifest), True
    except AlreadyThereError:
        there = api.get(manifest["kind"], manifest["metadata"]["name"])
        ours, theirs = (one["metadata"].get("annotations") or {} for one in (manifest, there))
        if ours.items() <= theirs.items():
            return there, False
        raise


def _with_values(manifest: Manifest, env: Sequence[str]) -> Manifest:
    """A Secret with the values that its variables have here."""
    if manifest["kind"] != "Secret":
        return manifest
    return {**manifest, "stringData": {name: os.environ[name] for name in env if name in os.environ}}


# --- what is wrong with a config ------------------------------------------------------------------------------------


def _check_image(image: str | None) -> Iterator[Problem]:
    if image is None:
        yield Problem("give the image that has distlm, such as registry/distlm:0.1.0", "kubernetes.image")
    elif "@" not in image:
        name, _, tag = image.rpartition("/")[2].partition(":")
        if not name or tag in ("", "latest"):
            message = "give it by a tag that says which one it is, or by digest: nodes keep what they call latest"
            yield Problem(message, "kubernetes.image", image)
    if image is not None and not re.fullmatch(r"[A-Za-z0-9._/:@-]+", image):
        yield Problem("is no name of an image", "kubernetes.image", image)


def _check_pods(config: RunConfig) -> Iterator[Problem]:
    settings, resources = config.kubernetes, config.resources
    worker = settings.worker
    yield from check_hosts(
        config,
        Hosts(
            "pod", "kubernetes.worker_pods", settings.worker_pods, "kubernetes.worker.gpus", worker.gpus,
            "kubernetes.worker.cpus", worker.cpus,
        ),
    )  # fmt: skip
    for kind, pod in (("head", settings.head), ("worker", worker)):
        if pod.memory_gib <= pod.shared_memory_gib:
            message = f"shared_memory_gib = {pod.shared_memory_gib:g} is a part of it; give it more"
            yield Problem(message, f"kubernetes.{kind}.memory_gib", f"{pod.memory_gib:g}")
    deadline_s = settings.active_deadline_s
    if deadline_s is not None and deadline_s < resources.time_to_save_s + _START_S:
        message = (
            f"nothing could be trained: pods and workers need about {_START_S} s to start, and "
            f"resources.time_to_save_s = {resources.time_to_save_s:g} s to save"
        )
        yield Problem(message, "kubernetes.active_deadline_s", str(deadline_s))


def _check_places(config: RunConfig) -> Iterator[Problem]:
    """The run's folder has to be on the storage that the pods share."""
    runs_dir, mounts = PurePosixPath(config.runs_dir), _mounts(config)
    if ".." in runs_dir.parts:
        yield Problem("leads out of the pods' storage", "runs_dir", str(runs_dir))
    elif runs_dir.is_absolute() and not any(map(runs_dir.is_relative_to, mounts)):
        message = f"is on no storage of the pods, which is at {', '.join(map(str, mounts))} (kubernetes.storage)"
        yield Problem(message, "runs_dir", str(runs_dir))


def _check_environment(config: RunConfig) -> Iterator[Problem]:
    """Each variable is given once."""
    plain = config.kubernetes.env
    for name in sorted({*plain, *config.env} & OWN_VARIABLES):
        yield Problem("is set by distlm", f"kubernetes.env.{name}" if name in plain else "env", name)
    for name in sorted({*plain} & {*config.env}):
        yield Problem("stands under env, too, whose variables come from a Secret", f"kubernetes.env.{name}")
    for name in sorted({"HOME", "HF_HOME"} & {*config.env}):
        yield Problem(f"is another one in the pods; set kubernetes.env.{name} to what it is there", "env", name)
    for name in sorted({name for name in config.env if config.env.count(name) > 1}):
        yield Problem("is named twice", "env", name)


def _mounts(config: RunConfig) -> list[PurePosixPath]:
    """Where the pods have storage: the shared one, and what the template for all pods mounts."""
    settings = config.kubernetes
    containers = (settings.pod_template.get("spec") or {}).get("containers") or ()
    further = [mount.get("mountPath") for container in containers for mount in container.get("volumeMounts") or ()]
    return [PurePosixPath(path) for path in (settings.storage.mount_path, *further) if path]
