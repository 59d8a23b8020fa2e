"""What is recorded of a git repository, of real ones; and that reading it runs nothing, changes nothing and ends."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from distlm.controller import repository
from distlm.controller.repository import read_repository, repository_that_tracks


def git(folder: Path, *arguments: str, check: bool = True) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=check, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def no_config_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with one commit on the branch main."""
    path = tmp_path / "project"
    path.mkdir()
    git(path, "init", "-q", "-b", "main")
    (path / "train.py").write_text("a = 1\n" * 20)
    (path / "old.py").write_text("gone\n")
    (path / ".env").write_text("TOKEN=first\n")
    (path / ".gitignore").write_text("*.log\n")
    (path / "image.bin").write_bytes(bytes(range(256)))
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "first")
    return path


def test_a_clean_repository(folder: Path) -> None:
    git(folder, "remote", "add", "mirror", "https://example.org/mirror.git")
    git(folder, "remote", "add", "origin", "https://me:hidden@example.org/project.git")
    (folder / "sub").mkdir()
    state, diff = read_repository(folder / "sub")
    assert (state.folder, state.branch) == (str(folder), "main")
    assert state.commit == git(folder, "rev-parse", "HEAD").strip()
    assert state.remote == "https://***@example.org/project.git"
    assert (state.is_dirty, state.changed_files, state.untracked_files, diff, state.problem) == (False, [], [], b"", "")


def test_the_diff_makes_the_same_files_again(folder: Path, tmp_path: Path) -> None:
    """Staged and unstaged changes alike, whatever the user's git prints by default."""
    for name, value in (
        ("color.ui", "always"),
        ("diff.noprefix", "true"),
        ("diff.context", "0"),
        ("diff.renames", "copies"),
    ):
        git(folder, "config", name, value)
    git(folder, "clone", "-q", str(folder), str(tmp_path / "clone"))
    (folder / "train.py").write_text("a = 1\n" * 19 + "a = 2\n")
    (folder / "new ä.py").write_text("no newline at the end")
    git(folder, "add", "-A")
    (folder / "train.py").write_text("b = 0\n" + "a = 1\n" * 19 + "a = 2\n")
    (folder / "old.py").unlink()
    state, diff = read_repository(folder)
    assert state.is_dirty and state.left_out == {}
    assert [(one["path"], one["added"], one["removed"]) for one in state.changed_files] == [
        ("new ä.py", 1, 0), ("old.py", 0, 1), ("train.py", 2, 1),
    ]  # fmt: skip
    (tmp_path / "recorded.diff").write_bytes(diff)
    git(tmp_path / "clone", "apply", str(tmp_path / "recorded.diff"))
    for name in ("train.py", "new ä.py"):
        assert (tmp_path / "clone" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "clone" / "old.py").exists()
    assert read_repository(folder)[0].diff_sha256 == state.diff_sha256
    (folder / "train.py").write_text("other\n")
    assert read_repository(folder)[0].diff_sha256 != state.diff_sha256


def test_untracked_files_are_listed_with_sizes_and_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "notes.txt").write_text("12345")
    (folder / "big.log").write_text("ignored")
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "runs" / "one" / "run.yaml").write_text("of distlm itself")
    state, diff = read_repository(folder, without=[folder / "runs"])
    assert state.untracked_files == [{"path": "notes.txt", "size": 5}]
    assert (state.is_dirty, diff) == (False, b"")
    monkeypatch.setattr(repository, "MAX_UNTRACKED_FILES", 1)
    (folder / "more.txt").touch()
    state, _ = read_repository(folder)
    assert (len(state.untracked_files), state.num_untracked_files) == (1, 3)


def test_secrets_are_left_out(folder: Path) -> None:
    (folder / ".env").write_text("TOKEN=hidden\n")
    for name in ("deploy.pem", "config/Secrets.yaml", "my-credentials/plain.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hidden\n")
    (folder / "train.py").write_text('db = "postgresql://me:hidden@host/db"\nkeep = 1\n')
    git(folder, "add", "-A")
    state, diff = read_repository(folder)
    assert b"hidden" not in diff and b"+keep = 1" in diff
    assert state.num_redacted_lines == 1
    assert state.left_out == {
        "a name that secrets have": [".env", "config/Secrets.yaml", "deploy.pem", "my-credentials/plain.txt"]
    }
    assert len(state.changed_files) == 5


@pytest.mark.parametrize(
    "line",
    [
        "https://ghp_hidden@github.com/o/r.git",
        "https://host/x?a=1&token=hidden",
        "mysql://u:pass/hidden@host",
        *(f"key = '{prefix}{'hidden0' * 6}'" for prefix in ("hf_", "ghp_", "github_pat_", "sk-", "sk-proj-")),
        *(f"key = '{prefix}HIDDEN0HIDDEN000'" for prefix in ("AKIA", "ASIA")),
        "key = 'xoxb-123456789012-hidden'",
    ],
)
def test_a_secret_in_a_line_is_left_out(folder: Path, line: str) -> None:
    (folder / "train.py").write_text(f"# before\n{line}\n# behind\n")
    state, diff = read_repository(folder)
    assert b"hidden" not in diff.lower() and b"***" in diff
    assert state.num_redacted_lines == 1
    assert b"+# before\n" in diff and b"+# behind\n" in diff


def test_code_without_secrets_is_recorded_as_it_is(folder: Path) -> None:
    lines = (
        "from hf_hub import x", "task-specific-parameters-of-the-model-1", "sk-learn", "a = b @ c", "url = 'http://host:80/x'",
        "git@github.com:o/r.git", "model = 'hf-internal-testing/tiny-random-BertModel'", "AKIA", "d?a=1",
    )  # fmt: skip
    (folder / "train.py").write_text("\n".join(lines))
    state, diff = read_repository(folder)
    assert state.num_redacted_lines == 0
    assert all(f"+{line}\n".encode() in diff for line in lines)


def test_binary_and_large_files_are_left_out_and_named(folder: Path) -> None:
    (folder / "image.bin").write_bytes(bytes(reversed(range(256))))
    (folder / "large.txt").write_text("line of text\n" * 100_000)
    git(folder, "add", "-A")
    state, diff = read_repository(folder)
    assert state.left_out == {"binary, or above 1048576 bytes": ["image.bin", "large.txt"]}
    assert b"line of text" not in diff and len(diff) < 1000
    (folder / "image.bin").write_bytes(bytes(256))
    assert read_repository(folder)[0].diff_sha256 != state.diff_sha256


def test_a_huge_diff_is_cut_between_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MAX_DIFF_BYTES", 10_000)
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (folder / name).write_text(f"{name}\n" * 600)  # 4,200 bytes of diff each
    git(folder, "add", "-A")
    state, diff = read_repository(folder)
    assert state.left_out == {"beyond the first 10000 bytes of the whole diff": ["c.txt", "d.txt"]}
    git(folder, "stash", "-q")
    (tmp_path / "recorded.diff").write_bytes(diff)
    git(folder, "apply", str(tmp_path / "recorded.diff"))
    assert (folder / "b.txt").read_text() == "b.txt\n" * 600 and not (folder / "c.txt").exists()


def test_nothing_that_a_config_names_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    ran.mkdir()

    def program(name: str) -> str:
        path = tmp_path / f"program-{name}"
        path.write_text(f"#!/bin/sh\ntouch '{ran}/{name}'\ncat\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    (folder / ".gitattributes").write_text("*.py filter=mine diff=mine\nold.py diff=other\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "attributes")
    for key, name in (
        ("core.fsmonitor", "fsmonitor"), ("diff.external", "external"), ("diff.mine.textconv", "textconv"),
        ("diff.other.command", "command"), ("filter.mine.clean", "clean"), ("core.pager", "pager"),
        ("core.hooksPath", "hooks"),
    ):  # fmt: skip
        git(folder, "config", key, program(name))
    git(folder, "config", "filter.mine.required", "true")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", program("environment"))
    (folder / "train.py").write_text("changed\n")
    (folder / "old.py").write_text("changed\n")
    index = (folder / ".git" / "index").read_bytes()
    state, diff = read_repository(folder)
    assert not list(ran.iterdir())
    assert (folder / ".git" / "index").read_bytes() == index
    assert state.problem == "" and diff.count(b"+changed") == 2
    git(folder, "diff", "HEAD", check=False)
    assert list(ran.iterdir()), "they would have been run"


def test_where_there_is_no_repository_or_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "empty").mkdir()
    state, diff = read_repository(tmp_path / "empty")
    assert (state.commit, diff, state.problem) == (None, b"", "there is no git repository")
    git(tmp_path / "empty", "init", "-q", "-b", "main")
    (tmp_path / "empty" / "a.py").touch()
    state, diff = read_repository(tmp_path / "empty")
    assert (state.commit, state.branch, state.is_dirty, state.problem) == (None, "main", None, "")
    assert state.untracked_files == [{"path": "a.py", "size": 0}]


def test_without_git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    state, diff = read_repository(folder)
    assert (state.commit, diff, state.problem) == (None, b"", "git is not installed here")


def test_a_git_that_hangs_is_ended(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "git"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/pid\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(repository, "TIMEOUT_S", 3.0)
    began_s = time.monotonic()
    state, diff = read_repository(folder)
    assert time.monotonic() - began_s < 20
    assert (state.commit, diff, state.problem) == (None, b"", "git rev-parse did not end within 3 s")
    pid = (tmp_path / "pid").read_text().strip()
    deadline_s = time.monotonic() + 20  # what is killed lives on until the system has taken it apart
    while not is_gone(pid):
        assert time.monotonic() < deadline_s, f"process {pid} goes on"
        time.sleep(0.01)


def is_gone(pid: str) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_files_that_merely_lie_in_a_repository_are_not_tracked(folder: Path) -> None:
    (folder / "venv").mkdir()
    (folder / "venv" / "module.py").touch()
    assert repository_that_tracks(folder, "train.py") == folder
    assert repository_that_tracks(folder / "venv", "module.py") is None
