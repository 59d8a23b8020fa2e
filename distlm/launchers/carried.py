"""What travels with a job whose run's folder may be out of sight of the one who sends it, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distlm.checkpoint.store import CheckpointStore
from distlm.config.attempt import Attempt
from distlm.errors import DistlmError, InputError
from distlm.outcome import Outcome, result_of
from distlm.run_folder import AttemptFolder, RunFolder, dump_yaml, read_json

ATTEMPT_FILES = "DISTLM_ATTEMPT_FILES"
"""Environment variable: the files that travel, as JSON, or the folder where they are."""
JOB = "DISTLM_JOB"
"""Environment variable: TARGET:ID of the job."""
RUN_YAML, ATTEMPT_YAML, NEWEST_STEP = "run.yaml", "attempt.yaml", "newest_step"
"""The names of the files; the last one holds the step of the run's newest checkpoint, as the sender sees it."""
RESULT_PREFIX = "distlm-result: "
"""What the line of the job's output begins with that holds its result.json."""


def carried_files(run: RunFolder, working_directory: str | None = None) -> dict[str, str]:
    """The files for the run's newest attempt, by their names; none of a run that is not made yet, for a dry run.

    `working_directory`: where the config's relative paths are seen from there; None: from the same as here.
    """
    if not (attempts := run.attempts()):
        return {}
    attempt = Attempt.read(attempts[-1])
    if working_directory is not None:
        attempt = replace(attempt, working_directory=working_directory)
    return {
        RUN_YAML: run.run_yaml.read_text(encoding="utf-8"),
        ATTEMPT_YAML: dump_yaml(attempt.to_yaml()),
        NEWEST_STEP: str(known_newest_step(run)),
    }


def known_newest_step(run: RunFolder) -> int:
    """Of the run's checkpoints, where they are out of sight as they were told."""
    told = [read_json(attempt.result_json) for attempt in run.attempts()]
    steps = [result.get(NEWEST_STEP) for result in told if isinstance(result, dict)]
    return max([CheckpointStore(run.checkpoints).newest_step(), *(step for step in steps if isinstance(step, int))])


def result_line(run: RunFolder) -> str:
    """The end of the newest attempt, for those who do not see it."""
    newest_step = CheckpointStore(run.checkpoints).newest_step()
    return RESULT_PREFIX + json.dumps({**read_json(run.attempts()[-1].result_json), NEWEST_STEP: newest_step})


def line_of_error(run: RunFolder | None, error: DistlmError) -> str:
    """The same of a job that has ended before its attempt. `run`: None where it has not found its run."""
    outcome, problems = Outcome.of(error), error.problems if isinstance(error, InputError) else ()
    attempts = run.attempts() if run else []
    folder = attempts[-1] if attempts else AttemptFolder((run.path if run else Path()) / "attempts" / "001")
    result = result_of(folder, outcome, None, [problem.to_json() for problem in problems])
    newest_step = CheckpointStore(run.checkpoints).newest_step() if run else 0
    return RESULT_PREFIX + json.dumps({**result, NEWEST_STEP: newest_step})


def result_in(lines: Sequence[str]) -> dict[str, Any] | None:
    """The result.json among the lines that a job has printed; None: it has not come so far."""
    for line in reversed(lines):
        if line.startswith(RESULT_PREFIX):
            try:
                content = json.loads(line.removeprefix(RESULT_PREFIX))
            except ValueError:
                return None
            return content if isinstance(content, dict) else None
    return None
