"""The state of a prediction that is under way, beside the file that it will become: FILE.parts/

    lock                  held by the process that predicts
    about.json            what is predicted; written when the rows below are complete
    rows-000000.jsonl     examples of the first part, a line of JSON for each row of the input
    part-000000.jsonl     their predictions, whole
    workers.log           what Ray has printed

Whoever predicts writes the parts that are missing, each by a rename. So a part is there or not, and a call after a kill
goes on with the others. Parts of something else, such as another step or a changed input, are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.data.labelled import ROWS_AT_ONCE
from distlm.errors import InputError
from distlm.inference.predictor import Example, Prediction
from distlm.run_folder import read_json, write_atomically, write_json

FORMAT_VERSION = 1
ROWS_PER_PART = ROWS_AT_ONCE  # so that a word has the same context as in an evaluation


@dataclass(frozen=True)
class Parts:
    """The parts of one output file."""

    folder: Path

    @classmethod
    def beside(cls, output: Path) -> Parts:
        return cls(output.with_name(f"{output.name}.parts"))

    @property
    def log(self) -> Path:
        """What the libraries of several workers have printed."""
        return self.folder / "workers.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises InputError if the folder is another process's, or is not one of parts."""
        lock = self.folder / "lock"
        if self.folder.exists() and not lock.exists():
            raise InputError(f"{self.folder} is in the way: it holds no parts of predictions; remove or rename it")
        self.folder.mkdir(exist_ok=True)
        with open(lock, "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is predicting into {self.folder}; wait for it or end it") from None
            yield

    def about(self) -> dict[str, Any] | None:
        """What the parts are of; None: they were not begun, or are damaged."""
        try:
            about: dict[str, Any] | None = read_json(self.folder / "about.json")
        except InputError:
            return None
        return about

    def clear(self) -> None:
        """Remove all parts, `about.json` first."""
        (self.folder / "about.json").unlink(missing_ok=True)
        for pattern in ("rows-*", "part-*", ".*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def begin(self, examples: Iterable[Example]) -> int:
        """Write the examples; returns how many there are. `write_about` has to follow."""
        self.clear()
        rows, count = iter(examples), 0
        for number in itertools.count():
            lines = [json.dumps(example) + "\n" for example in itertools.islice(rows, ROWS_PER_PART)]
            if not lines:
                return count
            (self.folder / f"rows-{number:06d}.jsonl").write_text("".join(lines), encoding="utf-8")
            count += len(lines)
        raise AssertionError

    def write_about(self, about: Mapping[str, Any]) -> None:
        write_json(self.folder / "about.json", dict(about))

    def missing(self) -> list[int]:
        """Numbers of the parts without predictions."""
        numbers = (int(path.stem.partition("-")[2]) for path in self.folder.glob("rows-*.jsonl"))
        return sorted(number for number in numbers if not self._predictions(number).exists())

    def examples(self, number: int) -> list[Example]:
        text = (self.folder / f"rows-{number:06d}.jsonl").read_text(encoding="utf-8")
        return [Example(*json.loads(line)) for line in text.splitlines()]

    def write(self, number: int, predictions: Iterable[Prediction]) -> None:
        write_atomically(self._predictions(number), "".join(f"{json.dumps(found)}\n" for found in predictions))

    def predictions(self) -> Iterator[Prediction]:
        """Of all rows, in their order."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            with open(path, encoding="utf-8") as file:
                yield from map(json.loads, file)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _predictions(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.jsonl"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
