"""What a launcher is: it builds a request, which is pure and can be printed, and submits it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from distlm.config.schema import RunConfig
from distlm.errors import Problem
from distlm.run_folder import AttemptFolder, RunFolder
from distlm.view import View


@dataclass(frozen=True)
class Request:
    """A command to run on the target's head node. Secrets are in neither part: `env` holds names only."""

    command: tuple[str, ...]
    env: tuple[str, ...] = field(default=())
    """Names of environment variables to pass on."""

    def __str__(self) -> str:
        return shlex.join(self.command)


class Launcher(Protocol):
    """One target."""

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """What is wrong with a config for this target, as far as can be seen from here."""
        ...

    def build(self, config: RunConfig, run: RunFolder) -> Request:
        """The request for the run's newest attempt. Pure: what a dry run prints is what is submitted."""
        ...

    def submit(self, request: Request, attempt: AttemptFolder, view: View) -> dict[str, Any]:
        """Run the attempt to its end and show its events; the content of its result.json."""
        ...
