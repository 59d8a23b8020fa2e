"""attempt.yaml: what is particular to one attempt of a run, and the config that follows from it and run.yaml.

Client and controller meet here: the client writes run.yaml and attempt.yaml, the controller and its workers read them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from distlm import __version__
from distlm.config.load import LoadedConfig, load_tree, with_overrides
from distlm.config.resolve import refuse_changes, resolved_tree, without_defaults
from distlm.config.schema import RunConfig
from distlm.errors import ExitCode, InputError, Problem
from distlm.run_folder import AttemptFolder, RunFolder, read_json, read_yaml, write_yaml


@dataclass(frozen=True)
class Attempt:
    """The content of attempt.yaml."""

    target: str
    distlm_version: str
    overrides: list[str] = field(default_factory=list)
    """Overrides on the command line of this attempt."""
    changes: list[str] = field(default_factory=list)
    """Overrides to apply to run.yaml: those of this resume and of the resumes before it."""
    origins: dict[str, str] = field(default_factory=dict)
    """Key -> "file:line" where the user wrote it, for messages."""
    working_directory: str = ""
    """Where the user started the command; relative paths of the config are seen from there."""
    reproduces: str = ""
    """Folder of the run that this one is to equal; empty: none."""
    record_samples: bool = False
    """The workers write down which samples each step trains on, in samples/ of the attempt's folder."""
    token: str = ""
    """Six random characters: of two attempts of the same number, made by those who do not see the same folder, each has
    its own."""
    kill_in_step: int | None = None
    """The last worker is killed (SIGKILL) in this step, for `distlm verify-resume`. None: no worker is."""

    def write(self, folder: AttemptFolder) -> None:
        write_yaml(folder.attempt_yaml, self.to_yaml())

    def to_yaml(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, folder: AttemptFolder) -> Attempt:
        """Raises InputError if it is missing or damaged, or has keys of a newer distlm."""
        content = read_yaml(folder.attempt_yaml)
        try:
            if unknown := sorted(set(content) - {known.name for known in fields(cls)}):
                version = content.get("distlm_version")
                raise InputError(
                    f"{folder.attempt_yaml} was written by distlm {version} and has keys that this one, "
                    f"{__version__}, does not know: {', '.join(unknown)}; use the distlm that wrote it"
                )
            attempt = cls(**content)
            # Older versions took a runs_dir on resume, which changed nothing.
            return replace(attempt, changes=[item for item in attempt.changes if not item.startswith("runs_dir=")])
        except (TypeError, AttributeError) as error:
            raise InputError(f"{folder.attempt_yaml} is damaged: {error}") from error


def create_run(loaded: LoadedConfig, run: RunFolder) -> None:
    """Make the run's folder and write run.yaml: every key, defaults included, `${VAR}` as written. It is never changed
    afterwards. Raises InputError if the folder cannot be made."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create the folder of the run: {error.strerror}"
        raise InputError(Problem(message, "runs_dir", str(run.runs_dir))) from None
    write_yaml(run.run_yaml, resolved_tree(loaded.config, loaded.raw))


def begin_attempt(loaded: LoadedConfig, run: RunFolder, overrides: list[str], **others: Any) -> AttemptFolder:
    """Make the folder of the run's next attempt and write its attempt.yaml; `others` are further fields of it."""
    folder = run.new_attempt()
    Attempt(
        target=loaded.config.resources.target,
        distlm_version=__version__,
        overrides=overrides,
        origins=loaded.origins,
        working_directory=str(Path.cwd()),
        token=secrets.token_hex(3),
        **others,
    ).write(folder)
    return folder


def load_attempt(run: RunFolder, folder: AttemptFolder) -> LoadedConfig:
    """The config of an attempt. Raises InputError, for example for an environment variable that is not set here."""
    attempt = Attempt.read(folder)
    return load_tree(read_run_yaml(run), attempt.changes, origins=attempt.origins)


def accepted_attempts(run: RunFolder) -> list[AttemptFolder]:
    """Those that were begun in full and not refused as bad input, oldest first. Raises InputError for damaged files."""

    def is_accepted(folder: AttemptFolder) -> bool:
        result = read_json(folder.result_json)
        was_refused = isinstance(result, dict) and result.get("exit_code") == ExitCode.BAD_INPUT
        return folder.attempt_yaml.exists() and not was_refused

    return [folder for folder in run.attempts() if is_accepted(folder)]


def changes_so_far(run: RunFolder) -> list[str]:
    """The overrides of run.yaml that are in force after the run's last resume. Raises InputError for damaged files."""
    attempts = accepted_attempts(run)
    return Attempt.read(attempts[-1]).changes if attempts else []


def read_run_yaml(run: RunFolder) -> dict[str, Any]:
    """The content of run.yaml. Raises InputError if it is missing or damaged."""
    tree = read_yaml(run.run_yaml)
    if not isinstance(tree, dict):
        raise InputError(f"{run.run_yaml} is damaged: it is no mapping of keys to values")
    return tree


def current_tree(run: RunFolder) -> dict[str, Any]:
    """run.yaml as the run's last resume left it, `${VAR}` unexpanded. Raises InputError for damaged files."""
    return with_overrides(read_run_yaml(run), changes_so_far(run))


def written_tree(run: RunFolder, changes: Sequence[str]) -> dict[str, Any]:
    """run.yaml and changes of it as a user might have written them: without the defaults, of which older versions of
    distlm wrote some that are refused beside other keys. Raises InputError."""
    written: dict[str, Any] = without_defaults(read_run_yaml(run))
    return with_overrides(written, changes)


def changed_config(
    run: RunFolder, overrides: list[str], check: Callable[[RunConfig], Iterator[Problem]]
) -> tuple[LoadedConfig, list[str]]:
    """The config of the next attempt of an existing run, and its cumulated changes.

    Raises InputError, naming each key, if the overrides would make it another run.
    """
    so_far = changes_so_far(run)
    loaded = load_tree(written_tree(run, so_far), overrides, check)
    begun = load_tree(written_tree(run, ()))  # with the keys that are new since then
    if refused := list(
        refuse_changes(resolved_tree(begun.config, begun.raw), resolved_tree(loaded.config, loaded.raw))
    ):
        raise InputError(*refused)
    return loaded, [*so_far, *overrides]
