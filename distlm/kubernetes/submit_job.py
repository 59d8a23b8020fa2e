"""`python -m distlm.kubernetes.submit_job COMMAND...`, in the submitter pod of a RayJob: have Ray's head run the
command as a job, and print its output until it has ended.

In place of `ray job logs --follow`, which ends with an error when a connection breaks in the middle of the job, and
would end the cluster with it. Here only a head that stays away does that: KubeRay then begins again on a new cluster.
A head that comes back knows nothing of the job, which is sent to it once more.

Exits with 0 when the job has ended, however it has, for KubeRay asks Ray for that; and when the head stays away: that a
submitter has ended whose job nobody knows is what KubeRay tries again after, in time before it would give up for good.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from distlm.console import exit_code_of, say
from distlm.errors import ExitCode, InputError

_HEAD_TIMEOUT_S, _PAUSE_S = 90.0, 2.0
_LOOK_INTERVAL_S, _ANSWER_TIMEOUT_S = 10.0, 10.0
"""A connection to a node that is lost stays open and silent, so the head is asked beside it."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_T = TypeVar("_T")


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
        self._seen_s = time.monotonic()
        """When the head has last answered."""

    async def follow(self) -> None:
        """Until the job has ended, or the head has stayed away."""
        while True:
            try:
                if await self._follow_connected():
                    return
            except Exception as error:  # noqa: BLE001 - Ray's client lets through what its libraries raise
                silent_s = time.monotonic() - self._seen_s
                if silent_s > _HEAD_TIMEOUT_S:
                    why = str(error) or type(error).__name__
                    return say(f"Ray's head at {self._address} has been away for {silent_s:.0f} s: {why}")
            await asyncio.sleep(_PAUSE_S)

    async def _follow_connected(self) -> bool:
        """As long as the connection lasts; whether the job has ended."""
        from ray.job_submission import JobSubmissionClient

        client = await self._ask(JobSubmissionClient, self._address)
        if self._job_id not in {job.submission_id for job in await self._ask(client.list_jobs)}:
            await self._ask(lambda: client.submit_job(entrypoint=self._command, submission_id=self._job_id))
            say(f"sent to Ray: {self._command}")
            self._num_printed = 0
        printing = asyncio.create_task(self._print_output(client))
        try:
            while not printing.done():
                await asyncio.wait({printing}, timeout=_LOOK_INTERVAL_S)
                status = await self._ask(client.get_job_status, self._job_id)
            printing.result()
        finally:
            printing.cancel()
        return str(status.value) in _ENDED

    async def _print_output(self, client: Any) -> None:
        """From the beginning, but for what is printed already."""
        num_read = 0
        async for text in client.tail_job_logs(self._job_id):
            begin = max(0, self._num_printed - num_read)
            num_read += len(text)
            self._num_printed = max(self._num_printed, num_read)
            say(text[begin:], end="")

    async def _ask(self, ask: Callable[..., _T], *arguments: Any) -> _T:
        """What Ray's client answers, which itself waits without end for a node that is lost."""
        answer: Future[_T] = Future()

        def run() -> None:
            try:
                answer.set_result(ask(*arguments))
            except Exception as error:  # noqa: BLE001 - carried over
                answer.set_exception(error)

        threading.Thread(target=run, name="ask-head", daemon=True).start()
        result = await asyncio.wait_for(asyncio.wrap_future(answer), _ANSWER_TIMEOUT_S)
        self._seen_s = time.monotonic()
        return result


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
