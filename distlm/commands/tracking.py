"""`distlm ui` and `distlm sync`: a run in MLflow."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.util import find_spec

from distlm.commands.find import find_run
from distlm.console import say
from distlm.errors import InputError


def ui(options: argparse.Namespace) -> int:
    store = (options.runs_dir / "mlflow.db").absolute()
    if not store.is_file():
        raise InputError(
            f"there is no embedded MLflow store in {options.runs_dir}; use --runs-dir, or open the server that "
            "the run's tracking URI names"
        )
    if find_spec("mlflow") is None:
        raise InputError("the MLflow UI needs mlflow: pip install 'distlm[train]'")
    say(f"MLflow UI on http://{options.host}:{options.port} (Ctrl-C ends it)")
    # Job execution starts 8 more processes of 250 MB each, which nothing here uses.
    os.environ.update(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--workers",
        "1",
    ]
    os.execv(sys.executable, command)


def sync(options: argparse.Namespace) -> int:
    run = find_run(options.runs_dir, options.run)
    return subprocess.call([sys.executable, "-m", "distlm.tracking.sync", str(run.path)])
