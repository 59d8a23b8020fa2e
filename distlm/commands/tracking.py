"""`distlm sync`: send to MLflow what it has not had yet of a run."""

from __future__ import annotations

import argparse
import subprocess
import sys

from distlm.commands.find import find_run


def sync(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    return subprocess.call([sys.executable, "-m", "distlm.tracking.sync", str(run.path)])
