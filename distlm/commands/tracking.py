"""`distlm sync`: send to MLflow what it has not had yet of a run."""

from __future__ import annotations

import argparse

from distlm.commands.data_plane import continue_in
from distlm.commands.find import find_run


def sync(options: argparse.Namespace) -> int:
    continue_in("distlm.tracking.sync", find_run(options.runs_dir, options.run).path)
