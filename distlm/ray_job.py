"""`python -m distlm.ray_job RUN_FOLDER` or `python -m distlm.ray_job CONFIG [KEY=VALUE ...]`, the entry point of a job
of Ray's Jobs API: run the newest attempt of the run, or of a new run, to its end.

The last line of its output is the attempt's result.json, for clients that do not see the run's folder.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from distlm.config.attempt import Attempt, begin_attempt, create_run
from distlm.config.load import load_config
from distlm.console import exit_code_of, say
from distlm.errors import InputError
from distlm.launchers.local import LocalLauncher, require_packages
from distlm.launchers.ray import ATTEMPT_FILES, RESULT_PREFIX
from distlm.launchers.supervise import wait_for_attempt
from distlm.run_folder import RunFolder, new_run_id, read_json, write_atomically
from distlm.run_reference import pin_references
from distlm.view.kept import KeptView
from distlm.view.plain import PlainView

_TARGET = "resources.target=ray"


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        raise InputError("usage: python -m distlm.ray_job RUN_FOLDER, or CONFIG [KEY=VALUE ...]")
    require_packages()
    files = os.environ.pop(ATTEMPT_FILES, None)
    if files is not None:
        run = _carried_run(Path(arguments[0]), json.loads(files))
    else:
        run = _new_run(Path(arguments[0]), list(arguments[1:]))
    with suppress(OSError):  # what is missing there is named by who needs it
        os.chdir(Attempt.read(run.attempts()[-1]).working_directory)
    attempt, view = run.attempts()[-1], KeptView(PlainView(sys.stdout))
    code = wait_for_attempt(run, attempt, view, LocalLauncher(), shows_ending=True)
    say(f"{RESULT_PREFIX}{json.dumps(read_json(run.attempts()[-1].result_json))}")
    return code


def _carried_run(folder: Path, files: Mapping[str, str]) -> RunFolder:
    """The run's folder, with those of its files that are not there yet."""
    for name, text in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomically(path, text)
        except OSError as error:
            raise InputError(
                f"the run's folder {folder} cannot be made on {os.uname().nodename}: {error.strerror}; set runs_dir to "
                "a folder on storage that all nodes of the cluster share"
            ) from None
    run = RunFolder(folder)
    run.attempts()[-1].logs.mkdir(exist_ok=True)
    return run


def _new_run(config: Path, overrides: list[str]) -> RunFolder:
    loaded = pin_references(load_config(config, [*overrides, _TARGET]))
    run = RunFolder(Path(loaded.config.runs_dir).absolute() / new_run_id())
    create_run(loaded, run)
    begin_attempt(loaded, run, [*overrides, _TARGET])
    return run


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
