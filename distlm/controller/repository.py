"""The state of the code in a git repository: commit, and what differs from it.

Nothing that the user's or the repository's git config names is run: no hook, filter, pager, file-system monitor, diff
driver or transport; nothing in the repository is written. What git does not tell in time is left out, and the record
says so.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from distlm.redact import redact_uri

TIMEOUT_S = 10.0
"""For all that is asked about a repository."""
MAX_FILE_BYTES = 2**20
"""The diff of a larger file is left out, like that of a binary one."""
MAX_DIFF_BYTES = 8 * 2**20
MAX_UNTRACKED_FILES = 1000
_MAX_LIST_BYTES = 16 * 2**20

_SECRET_FILES = (
    ".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ovpn", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pypirc", ".npmrc", ".htpasswd", ".pgpass", ".my.cnf",
    ".git-credentials", ".dockercfg", "kubeconfig*", "*credential*", "*secret*", "*password*", "*passwd*",
    "*service*account*.json",
)  # fmt: skip
"""Names of files that likely hold secrets: their diff is left out."""
_CONFIG = (
    "core.fsmonitor=false", "core.hooksPath=/dev/null", "core.untrackedCache=false", "core.quotePath=false",
    f"core.bigFileThreshold={MAX_FILE_BYTES}", "protocol.allow=never", "diff.orderFile=/dev/null",
    "diff.suppressBlankEmpty=false", "diff.context=3", "diff.interHunkContext=0",
)  # fmt: skip
_DIFF = (
    "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--no-relative",
    "--src-prefix=a/", "--dst-prefix=b/", "--diff-algorithm=myers", "--full-index", "--submodule=short",
    "--ignore-submodules=dirty",
)  # fmt: skip
_KEPT_VARIABLES = ("GIT_CEILING_DIRECTORIES", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
"""The others, such as GIT_DIR in a hook, may name another repository or a program."""


class GitError(Exception):
    """Git is missing, late, or refuses; the text is one line."""


@dataclass
class RepositoryState:
    """What is recorded of a repository. `problem` says what is missing in it, and is empty where nothing is."""

    folder: str
    """Top folder of the repository; the folder that was asked about where there is none."""
    commit: str | None = None
    """None: there is no repository, or no commit in it."""
    branch: str | None = None
    """None: a commit is checked out, not a branch."""
    remote: str | None = None
    is_dirty: bool | None = None
    """Tracked files differ from the commit. None: not known."""
    diff_sha256: str | None = None
    """Of the recorded diff and the names of what is left out of it; None: not known."""
    changed_files: list[dict[str, int | str | None]] = field(default_factory=list)
    """`path`, and lines `added` and `removed`: None for binary files and those above `MAX_FILE_BYTES`."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why a diff was left out -> paths."""
    num_redacted_lines: int = 0
    """Lines of the diff with a secret (in a URI, or a token of a known form), which is replaced by ***."""
    untracked_files: list[dict[str, int | str | None]] = field(default_factory=list)
    """`path` and `size` in bytes of files that git neither tracks nor ignores; at most `MAX_UNTRACKED_FILES`."""
    num_untracked_files: int = 0
    problem: str = ""


def read_repository(folder: Path, without: Sequence[Path] = ()) -> tuple[RepositoryState, bytes]:
    """The state of the repository that `folder` is in, and its diff, which `git apply` takes where nothing was left out
    or redacted. Files below `without` are not listed."""
    git = Git(folder)
    try:
        top = Path(git.line("rev-parse", "--show-toplevel"))
    except GitError as error:
        return RepositoryState(str(folder), problem=str(error)), b""
    git.folder = top
    state = RepositoryState(str(top))

    diff = b""
    try:
        _read_commit(git, state)
        if state.commit is not None:
            diff = _read_diff(git, state)
        _read_untracked(git, state, without)
    except GitError as error:
        state.problem = str(error)
    return state, diff


def repository_that_tracks(folder: Path, name: str) -> Path | None:
    """The repository in which the file `name` of `folder` is tracked, and does not merely lie; None: there is none, or
    git does not tell."""
    git = Git(folder)
    try:
        git.output("ls-files", "--error-unmatch", "--", name)
        return Path(git.line("rev-parse", "--show-toplevel"))
    except GitError:
        return None


def remote_url(git: Git) -> str | None:
    """Of origin, else of the first remote; without passwords. None: there is none. Raises GitError."""
    try:
        lines = git.text("config", "--get-regexp", r"^remote\..*\.url$").splitlines()
    except _Refused:
        return None
    urls = {name: url for name, _, url in (line.partition(" ") for line in reversed(lines))}
    return redact_uri(urls.get("remote.origin.url") or lines[0].partition(" ")[2]) if urls else None


def _read_commit(git: Git, state: RepositoryState) -> None:
    with suppress(_Refused):
        state.branch = git.line("symbolic-ref", "--short", "-q", "HEAD")
    state.remote = remote_url(git)
    with suppress(_Refused):
        state.commit = git.line("rev-parse", "--quiet", "--verify", "HEAD")


def _read_diff(git: Git, state: RepositoryState) -> bytes:
    entries = _counted(git.output(*_DIFF, "--numstat", "-z", limit=_MAX_LIST_BYTES))
    state.is_dirty = bool(entries)
    state.changed_files = entries
    if not entries:
        state.diff_sha256 = hashlib.sha256().hexdigest()
        return b""
    secret = set(_paths(git.output(*_DIFF, "--name-only", "-z", "--", *_SECRET_PATHSPEC, limit=_MAX_LIST_BYTES)))
    others = [str(entry["path"]) for entry in entries if entry["path"] not in secret]
    text = git.output(*_DIFF, "--", ".", *_NO_SECRET_PATHSPEC, limit=MAX_DIFF_BYTES) if others else b""
    left_out = {
        "a name that secrets have": sorted(secret),
        f"binary, or above {MAX_FILE_BYTES} bytes": [
            str(entry["path"]) for entry in entries if entry["added"] is None and entry["path"] not in secret
        ],
    }
    if len(text) >= MAX_DIFF_BYTES:
        text = text[: text.rfind(b"\ndiff --git ") + 1]
        num_kept = len(re.findall(rb"^diff --git ", text, re.MULTILINE))
        left_out[f"beyond the first {MAX_DIFF_BYTES} bytes of the whole diff"] = others[num_kept:]
    state.left_out = {reason: paths for reason, paths in left_out.items() if paths}
    text, state.num_redacted_lines = _redacted(text)
    state.diff_sha256 = hashlib.sha256(text + repr(sorted(state.left_out.items())).encode()).hexdigest()
    return text


def _pathspec(magic: str) -> list[str]:
    """Files of these names, and everything in folders of these names."""
    return [f":({magic},glob,icase)**/{name}{tail}" for name in _SECRET_FILES for tail in ("", "/**")]


_SECRET_PATHSPEC = _pathspec("top")
_NO_SECRET_PATHSPEC = _pathspec("top,exclude")


def _counted(output: bytes) -> list[dict[str, int | str | None]]:
    """The entries of --numstat."""
    entries: list[dict[str, int | str | None]] = []
    for entry in _paths(output):
        added, removed, path = entry.split("\t", 2)
        is_text = added != "-"
        entries.append(
            {"path": path, "added": int(added) if is_text else None, "removed": int(removed) if is_text else None}
        )
    return entries


def _paths(output: bytes) -> list[str]:
    """The strings between NUL bytes; what is not UTF-8 in them becomes U+FFFD."""
    return output.decode(errors="replace").split("\0")[:-1]


def _redacted(diff: bytes) -> tuple[bytes, int]:
    """The diff without secrets, as far as their form tells them, and the number of lines that had one."""
    text = diff.decode(errors="surrogateescape")
    redacted = redact_uri(text)  # no secret goes beyond its line
    count = sum(before != after for before, after in zip(text.split("\n"), redacted.split("\n"), strict=True))
    return redacted.encode(errors="surrogateescape"), count


def _read_untracked(git: Git, state: RepositoryState, without: Sequence[Path]) -> None:
    top = Path(state.folder)
    inside = [os.path.relpath(os.path.realpath(path), os.path.realpath(top)) for path in without]
    exclude = [f":(top,exclude,literal){path}" for path in inside if path != "." and not path.startswith("..")]
    paths = _paths(
        git.output("ls-files", "--others", "--exclude-standard", "-z", "--", ".", *exclude, limit=_MAX_LIST_BYTES)
    )
    state.num_untracked_files = len(paths)
    state.untracked_files = [{"path": path, "size": _size(top / path)} for path in paths[:MAX_UNTRACKED_FILES]]


def _size(path: Path) -> int | None:
    try:
        return path.lstat().st_size
    except (OSError, ValueError):
        return None


class _Refused(GitError):
    """Git has answered, and its answer is an error."""


class Git:
    """Git in a folder, for `TIMEOUT_S` in all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._deadline = time.monotonic() + TIMEOUT_S
        self._filters: list[str] | None = None

    def line(self, *arguments: str) -> str:
        return self.text(*arguments).strip()

    def text(self, *arguments: str) -> str:
        return self.output(*arguments).decode(errors="replace")

    def output(self, *arguments: str, limit: int = _MAX_LIST_BYTES) -> bytes:
        """What git prints, cut after `limit` bytes. Raises GitError."""
        settings = [*_CONFIG, *self._without_filters()] if arguments[0] in ("diff", "ls-files") else _CONFIG
        return self._run([*(part for setting in settings for part in ("-c", setting)), *arguments], limit)

    def _without_filters(self) -> list[str]:
        """Settings by which no filter (such as Git LFS) is run on a file to compare it."""
        if self._filters is None:
            try:
                names = self._run(["config", "--null", "--name-only", "--get-regexp", r"^filter\."], _MAX_LIST_BYTES)
            except _Refused:
                names = b""
            filters = sorted({name.rpartition(".")[0] for name in _paths(names)})
            empty = [f"{name}.{key}=" for name in filters for key in ("clean", "smudge", "process")]
            self._filters = [*empty, *(f"{name}.required=false" for name in filters)]
        return self._filters

    def _run(self, arguments: Sequence[str], limit: int) -> bytes:
        command = ["git", "--no-pager", "--no-optional-locks", "--no-replace-objects", *arguments]
        left_s = self._deadline - time.monotonic()
        verb = next((part for part in arguments if part in _VERBS), arguments[0])
        late = GitError(f"git {verb} did not end within {TIMEOUT_S:g} s")
        if left_s <= 0:
            raise late
        try:
            with tempfile.TemporaryFile() as errors:
                process = subprocess.Popen(
                    command, cwd=self.folder, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=errors, start_new_session=True,
                )  # fmt: skip
                assert process.stdout is not None
                output, ended = _read_in_time(process, process.stdout, limit, left_s)
                errors.seek(0)
                text = errors.read(_MAX_LIST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            raise GitError("git is not installed here") from None
        except OSError as error:
            raise GitError(f"git cannot be run: {error.strerror}") from None
        if not ended:
            raise late
        if len(output) < limit and process.returncode:
            raise _Refused(_reason(text) or f"git {verb} ended with exit code {process.returncode}")
        return output


_VERBS = ("rev-parse", "symbolic-ref", "config", "diff", "ls-files")


def _read_in_time(
    process: subprocess.Popen[bytes], stream: IO[bytes], limit: int, timeout_s: float
) -> tuple[bytes, bool]:
    """Up to `limit` bytes, and whether that came in time. The process and what it has started are gone afterwards."""
    is_late = threading.Event()

    def kill() -> None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    def end() -> None:
        is_late.set()
        kill()

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        with stream:
            output = stream.read(limit)
            if len(output) >= limit:
                kill()
        process.wait()
    finally:
        timer.cancel()
    return output, not is_late.is_set()


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _KEPT_VARIABLES}
    return kept | {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1"}


def _reason(text: str) -> str:
    """Git's own words, the first line of them."""
    first = next((line for line in text.splitlines() if line.strip()), "").removeprefix("fatal: ").strip()
    return "there is no git repository" if first.startswith("not a git repository") else redact_uri(first)
