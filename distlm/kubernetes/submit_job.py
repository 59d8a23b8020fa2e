"""`python -m distlm.kubernetes.submit_job COMMAND...`, in the submitter pod of a RayJob: have Ray's head run the
command as a job, and print its output until it has ended.

In place of `ray job logs --follow`, which ends with an error when a connection breaks in the middle of the job, and
would end the cluster with it. Here only a head that stays away does that: KubeRay then begins again on a new cluster.
A head that comes back knows nothing of the job, which is sent to it once more.

Exits with 0 when the job has ended, however it has: KubeRay asks Ray for that.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from distlm.console import exit_code_of, say
from distlm.errors import ExitCode, InfrastructureError, InputError

_HEAD_TIMEOUT_S, _LOOK_INTERVAL_S = 90.0, 2.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def main(command: Sequence[str]) -> int:
    try:
        address, job_id = os.environ["RAY_DASHBOARD_ADDRESS"], os.environ["RAY_JOB_SUBMISSION_ID"]
    except KeyError as error:
        raise InputError(f"{error.args[0]} is not set: this is for the submitter pod of a RayJob") from None
    asyncio.run(_Submission(address, job_id, shlex.join(command)).follow())
    return ExitCode.SUCCEEDED


class _Submission:
    """A job of the head at `address`, and what of its output is printed."""

    def __init__(self, address: str, job_id: str, command: str) -> None:
        self._address = address if "://" in address else f"http://{address}"
        self._job_id, self._command = job_id, command
        self._num_printed = 0
        """Characters."""

    async def follow(self) -> None:
        """Until it has ended. Raises InfrastructureError where the head stays away."""
        seen_s = time.monotonic()
        while True:
            try:
                if await self._follow_connected():
                    return
                seen_s = time.monotonic()
            except (ConnectionError, RuntimeError, OSError) as error:
                silent_s = time.monotonic() - seen_s
                if silent_s > _HEAD_TIMEOUT_S:
                    raise InfrastructureError(
                        f"Ray's head at {self._address} has been away for {silent_s:.0f} s: {error}"
                    ) from None
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def _follow_connected(self) -> bool:
        """As long as the connection lasts; whether the job has ended. Raises what Ray raises without one."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self._address)
        if self._job_id not in {job.submission_id for job in client.list_jobs()}:
            client.submit_job(entrypoint=self._command, submission_id=self._job_id)
            say(f"sent to Ray: {self._command}")
            self._num_printed = 0
        await self._print_output(client)
        return str(client.get_job_status(self._job_id).value) in _ENDED

    async def _print_output(self, client: Any) -> None:
        """From the beginning, but for what is printed already."""
        num_read = 0
        async for text in client.tail_job_logs(self._job_id):
            begin = max(0, self._num_printed - num_read)
            num_read += len(text)
            self._num_printed = max(self._num_printed, num_read)
            say(text[begin:], end="")


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
