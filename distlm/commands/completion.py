"""`distlm completion`: the script that makes a shell complete `distlm`."""

from __future__ import annotations

import argparse

from argcomplete.shell_integration import shellcode

from distlm.console import say
from distlm.errors import ExitCode


def completion(options: argparse.Namespace) -> int:
    # bash keeps the order of runs, newest first, and completes no file names where a run or a key is meant.
    bash_options = ["-o", "nospace", "-o", "bashdefault", "-o", "nosort"]
    say(shellcode(["distlm"], shell=options.shell, complete_arguments=bash_options))
    return ExitCode.SUCCEEDED
