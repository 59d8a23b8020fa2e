"""With what an attempt runs: code, packages, machine and data, in its folder and in the tracker.

    attempts/NNN/
      code/code.json               commit, branch, remote, changed and untracked files of `working_directory` (the
                                   repository of the folder in which the user started the command) and `distlm` (that of
                                   distlm itself, where it runs from another checkout)
      code/working_directory.diff  what differs from the commit, for `git apply`; not where nothing does
      code/distlm.diff
      environment.txt              what `pip freeze` prints, and the machine in comment lines
      data.json                    digests and counts of the data, the tokenizer and the initial weights

All is collected in a thread while Ray and the workers start, and never fails or delays a run. Environment variables are
not recorded.
"""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distlm
from distlm.checkpoint.tensor_file import one_line
from distlm.config.attempt import accepted_attempts
from distlm.config.reproduce import original_of
from distlm.controller.differences import SAME_REPOSITORY, AttemptRecord, differences
from distlm.controller.environment import environment_text
from distlm.controller.recorder import Recorder
from distlm.controller.repository import read_repository, repository_that_tracks
from distlm.run_folder import AttemptFolder, RunFolder, read_json, write_atomically, write_json

_COMPARISON_TIMEOUT_S = 30.0
_DATA_KEYS = ("format_version", "fingerprint", "max_seq_length", "vocab_size", "train", "validation", "sources")
"""Of `distlm.data.prepare.DataInfo`."""


class Provenance:
    """Collects in a thread from the moment it is made; the controller hands on what there is when it is there."""

    def __init__(self, run: RunFolder, folder: AttemptFolder, say: Callable[[str], None]) -> None:
        """`say` shows a line to the user."""
        self._run, self._folder, self._say = run, folder, say
        self._tags: dict[str, str] = {}
        self._files: list[Path] = []
        self._lines: list[str] = []
        """For the user."""
        self._original: RunFolder | None = None
        self._try("cannot read which run this one is to equal", self._find_original)
        self._is_prepared = threading.Event()
        self._thread = threading.Thread(target=self._collect, name="provenance", daemon=True)
        self._thread.start()

    def prepared(self, recorder: Recorder) -> None:
        """Go on: init/ is made, so that the data can be recorded. Where the run is to equal another one, wait for what
        is otherwise, which its user wants to know before it trains."""
        self._is_prepared.set()
        self.record(recorder, _COMPARISON_TIMEOUT_S if self._original else 0.0)

    def record(self, recorder: Recorder, timeout_s: float = 0.0) -> None:
        """Once all is collected, for which this waits up to `timeout_s` after `prepared`: hand it to the recorder and
        warn the user. For the thread of the controller; to be called again and again."""
        self._thread.join(timeout_s if self._is_prepared.is_set() else 0.0)
        if self._thread.is_alive():
            return
        for line in self._lines:
            self._say(line)
        if self._tags:
            recorder.set_tags(self._tags)
        for file in self._files:
            folder = "/code" if file.parent == self._folder.code else ""
            recorder.log_artifact(file, f"attempts/{self._folder.number:03d}{folder}")
        self._lines, self._tags, self._files = [], {}, []

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        self._try("cannot record the code", self._collect_code)
        self._try("cannot record the environment", self._collect_environment)
        self._is_prepared.wait()
        self._try("cannot record the data", self._collect_data)
        self._try("cannot compare with the run to equal", self._compare)

    def _try(self, failure: str, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - whatever it is, a record is no reason to fail a run
            traceback.print_exc()
            self._lines.append(f"warning: {failure}: {type(error).__name__}: {one_line(error)}")

    def _find_original(self) -> None:
        self._original = original_of(self._run)
        if self._original:
            self._tags["distlm.reproduces"] = self._original.run_id

    def _collect_code(self) -> None:
        self._folder.code.mkdir(exist_ok=True)
        code: dict[str, Any] = {"working_directory": self._repository("working_directory", Path.cwd()), "distlm": None}
        package = Path(distlm.__file__).parent
        checkout = repository_that_tracks(package, "__init__.py")
        if checkout is not None:
            is_same = str(checkout) == code["working_directory"]["folder"]
            code["distlm"] = SAME_REPOSITORY if is_same else self._repository("distlm", checkout)
        write_json(self._folder.code_json, code)
        self._files.append(self._folder.code_json)

    def _repository(self, name: str, folder: Path) -> dict[str, Any]:
        """Read the repository that `folder` is in, and write its diff."""
        state, diff = read_repository(folder, without=[self._run.runs_dir])
        if diff:
            path = self._folder.code / f"{name}.diff"
            path.write_bytes(diff)
            self._files.append(path)
        if name == "working_directory":
            commit = f"{state.commit or ''}{'-dirty' if state.is_dirty else ''}"
            self._tags |= {"distlm.git_commit": commit, "mlflow.source.git.commit": commit}
        return asdict(state)

    def _collect_environment(self) -> None:
        write_atomically(self._folder.environment_txt, environment_text())
        self._files.append(self._folder.environment_txt)

    def _collect_data(self) -> None:
        info = read_json(self._run.init / "prepared.json")["data_info"]
        weights = sorted((self._run.init / "model").glob("*.safetensors"))
        write_json(
            self._folder.data_json,
            {
                **{key: info[key] for key in _DATA_KEYS},
                "tokenizer_sha256": info["tokenizer_fingerprint"],
                "initial_weights_sha256": {file.name: _sha256(file) for file in weights},
            },
        )
        self._files.append(self._folder.data_json)

    def _compare(self) -> None:
        """With every attempt of the original, each of which may have run with something else."""
        if self._original is None:
            return
        ours, attempts = AttemptRecord.read(self._folder), accepted_attempts(self._original)
        if not attempts:
            message = f"run {self._original.run_id} has no records any more, so nothing is compared with it"
            self._lines.append(f"warning: {message}")
            return
        found: list[str] = []
        for attempt in attempts:
            number = f", attempt {attempt.number}" if len(attempts) > 1 else ""
            name = f"run {self._original.run_id}{number}"
            found += (f"warning: {line}" for line in differences(ours, AttemptRecord.read(attempt), name))
        if not found and None not in (ours.code, ours.environment, ours.data):
            found = [f"code, packages, machine and data are those of run {self._original.run_id}"]
        self._lines += found


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
