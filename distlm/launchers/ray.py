"""Target ray: the run is a job of the Jobs API of an existing Ray cluster. What the job does is in `distlm.ray_job`.

The client needs the package ray alone, with its extra `default` (`pip install 'distlm[ray]'`). It need not see the
cluster's storage: what it has written of the run travels with the job, and how the run ended comes back with the job's
output.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import distlm
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.errors import InfrastructureError, InputError, Problem
from distlm.launchers.base import Job, JobState, JobStatus, Request
from distlm.launchers.carried import ATTEMPT_FILES, JOB, carried_files
from distlm.run_folder import RunFolder

_CONNECT_TIMEOUT_S = 10.0
_DEFAULT_PORT = 8265
_STOP_WAIT_S = 60
"""Between the request to stop a job and its end by force; Ray's default is 3 s, in which nothing is saved."""
_STATES = {
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "STOPPED": JobState.CANCELLED,
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class RayRequest(Request):
    """A job for the Jobs API. `command` is its entry point."""

    address: str = ""
    submission_id: str = ""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    env: tuple[str, ...] = ()
    """Names of variables whose values are sent along, and not shown."""

    def __str__(self) -> str:
        """The command of Ray's own that submits it."""
        shown = {**self.runtime_env.get("env_vars", {}), **{name: f"${{{name}}}" for name in self.env}}
        words = ["ray", "job", "submit", f"--address={self.address}"]
        words += [f"--submission-id={self.submission_id}"] if self.submission_id else []
        words += ["--runtime-env-json", json.dumps({**self.runtime_env, "env_vars": shown})]
        return f"{shlex.join(words)} -- {shlex.join(self.command)}\n"


class RayLauncher:
    """See `distlm.launchers.base.QueueLauncher`."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        yield from contradictions(config)

    def check_here(self, config: RunConfig) -> Iterator[Problem]:
        """Files are on the cluster: the controller looks there."""
        yield from self.check(config)
        if not (config.ray.address or os.environ.get("RAY_ADDRESS")):
            yield Problem("give the address of the cluster's Jobs API, such as http://head:8265", "ray.address")

    def build(self, config: RunConfig, run: RunFolder) -> RayRequest:
        attempts = run.attempts()
        number = attempts[-1].number if attempts else 1
        name = f"{run.run_id}-{number:03d}"
        variables = {ATTEMPT_FILES: json.dumps(carried_files(run)), JOB: f"ray:{name}"}
        return self._request(config, (str(run.path),), name, variables)

    def render(self, config: RunConfig, path: Path, overrides: list[str]) -> RayRequest:
        return self._request(config, (str(path.absolute()), *overrides), "", {})

    def _request(self, config: RunConfig, what: tuple[str, ...], name: str, variables: dict[str, str]) -> RayRequest:
        runtime_env = dict(config.ray.runtime_env)
        given = runtime_env.pop("env_vars", {})
        runtime_env["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **given, **variables}
        if config.ray.code == "carried":
            package = str(Path(distlm.__file__).parent)
            runtime_env["py_modules"] = [*runtime_env.get("py_modules", []), package]
        entry_point = (*shlex.split(config.ray.python), "-m", "distlm.ray_job", *what)
        return RayRequest(entry_point, "", _address(config), name, runtime_env, tuple(config.env))

    def submit(self, request: Request, folder: Path) -> Job:
        assert isinstance(request, RayRequest)
        values = {name: os.environ[name] for name in request.env if name in os.environ}
        runtime_env = {**request.runtime_env, "env_vars": {**request.runtime_env["env_vars"], **values}}

        def send(client: Any) -> str:
            sent: str = client.submit_job(
                entrypoint=shlex.join(request.command),
                submission_id=request.submission_id or None,
                runtime_env=runtime_env,
            )
            return sent

        return Job("ray", self._ask(request.address, send), address=request.address)

    def status(self, job: Job) -> JobStatus:
        try:
            info = self._ask(job.address, lambda client: client.get_job_info(job.id))
        except (InputError, InfrastructureError) as error:
            return JobStatus(JobState.UNKNOWN, reason=str(error))
        return status_of(info.status.value, info.driver_exit_code, info.message)

    def output(self, job: Job, run: RunFolder) -> str:
        try:
            text: str = self._ask(job.address, lambda client: client.get_job_logs(job.id))
        except (InputError, InfrastructureError):
            return ""
        return text

    def cancel(self, job: Job, *, saves: bool) -> bool:
        """Whoever is stopped by Ray saves."""
        self._ask(job.address, lambda client: client.stop_job(job.id))
        return True

    def no_more_starts(self, job: Job) -> None:
        return

    def logs_there(self, job: Job, arguments: Sequence[str]) -> None:
        return None

    def _ask(self, address: str, ask: Callable[[Any], _T]) -> _T:
        """Raises InputError for what the user can mend, InfrastructureError for the rest."""
        if find_spec("ray") is None or find_spec("requests") is None:
            raise InputError("ray is not installed here; run: pip install 'distlm[ray]'")
        _reach(address)
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            return ask(JobSubmissionClient(address))
        except AuthenticationError as error:
            what = str(error).strip().splitlines()[0]
            raise InputError(
                f"the Ray cluster at {address} refuses: {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as they are "
                "on the cluster"
            ) from None
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise InfrastructureError(f"the Ray cluster at {address}: {' '.join(str(error).split())}") from None


def _address(config: RunConfig) -> str:
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    return address if "://" in address or not address else f"http://{address}"


def _reach(address: str) -> None:
    """Ray's client waits for minutes for a host that is silent. Raises InfrastructureError."""
    place = urlsplit(address)
    port = place.port or (443 if place.scheme == "https" else _DEFAULT_PORT)
    try:
        socket.create_connection((place.hostname or "", port), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise InfrastructureError(
            f"the Ray cluster at {address} cannot be reached: {error.strerror or error}"
        ) from None


def status_of(word: str, exit_code: int | None, message: str | None) -> JobStatus:
    """Of Ray's word for a job. A job that was stopped has not succeeded, whatever its exit code."""
    state = _STATES.get(word, JobState.UNKNOWN).with_exit_code(exit_code)
    reason = " ".join((message or "").split()) if state != JobState.RUNNING else ""
    return JobStatus(state, word, reason)
