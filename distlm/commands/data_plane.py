"""Verbs that need torch or mlflow, which no command imports: they go on in another process.

`python -m distlm.commands.data_plane MODULE ARGUMENT...` is that process. It imports MODULE, which fails where
`distlm[train]` is not installed, and calls its `main`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

from distlm.console import exit_code_of


def continue_in(module: str, *arguments: object) -> NoReturn:
    """Go on as `main` of a module, in place of this process: signals and the exit code need no passing on."""
    command = [sys.executable, "-m", __name__, module, *map(str, arguments)]
    os.execv(sys.executable, command)


def main(arguments: list[str]) -> int:
    module, *others = arguments
    # These run beside trainings that have all cores: threads of torch that spin while they wait for one another, which
    # is the default, then take several times as long as threads that sleep. OpenMP reads it when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return exit_code_of(lambda: import_module(module).main(others))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
