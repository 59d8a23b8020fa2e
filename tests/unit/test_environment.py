"""environment.txt against the real `pip freeze`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlm.controller.environment import environment_text, freeze, machine, parse_environment

ROOT = Path(__file__).parents[2]

pytest.importorskip("pip")


def pip_freeze(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "freeze", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()


def test_the_packages_of_this_environment_are_those_that_pip_prints() -> None:
    code = "from distlm.controller.environment import freeze; print('\\n'.join(freeze()))"
    ours = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    theirs = pip_freeze()
    assert ours.splitlines() == theirs
    assert len(theirs) > 20


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the metadata that pip leaves there, and checkouts that it refers to."""
    for name, remote in (("plain", None), ("local", ""), ("hosted", "git@example.org:me/hosted.git")):
        project = tmp_path / name / "python"
        project.mkdir(parents=True)
        (project / "pyproject.toml").touch()
        if remote is not None:
            for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "first")):
                identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
                subprocess.run(["git", *identity, *arguments], cwd=tmp_path / name, check=True)
            if remote:
                subprocess.run(["git", "remote", "add", "origin", remote], cwd=tmp_path / name, check=True)
    editable = {"dir_info": {"editable": True}}
    wheel = {"archive_info": {"hash": "sha256=ab12", "hashes": {"sha256": "ab12"}}}
    commit = {"vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "0123abcd"}}
    packages = {
        "plain": {"url": (tmp_path / "plain" / "python").as_uri()} | editable,
        "local": {"url": (tmp_path / "local" / "python").as_uri()} | editable,
        "Hosted-Here": {"url": (tmp_path / "hosted" / "python").as_uri()} | editable,
        "wheel_by.url": {"url": "https://example.org/wheel-1.0-py3-none-any.whl"} | wheel,
        "from-git": {"url": "https://example.org/me/x.git", "subdirectory": "python"} | commit,
        "from-folder": {"url": (tmp_path / "plain").as_uri(), "dir_info": {}},
        "Ordinary": None,
        "pip": None,
        "setuptools": None,
    }
    folder = tmp_path / "site"
    for name, origin in packages.items():
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if origin:
            (info / "direct_url.json").write_text(json.dumps(origin))
    return folder


def test_editable_and_direct_installs_are_told_as_pip_tells_them(site: Path) -> None:
    theirs = pip_freeze("--path", str(site))
    assert freeze([str(site)]) == theirs
    assert (
        "Ordinary==1.0" in theirs
        and "wheel_by.url @ https://example.org/wheel-1.0-py3-none-any.whl#sha256=ab12" in theirs
    )
    assert any(line.startswith("-e git+ssh://git@example.org/me/hosted.git@") for line in theirs)
    assert any("no remote (local==1.0)" in line for line in theirs)


def test_credentials_in_addresses_are_not_told(site: Path) -> None:
    origin = {"url": "https://me:hidden@example.org/w.whl?token=hidden", "archive_info": {}}
    (site / "Ordinary-1.0.dist-info" / "direct_url.json").write_text(json.dumps(origin))
    assert "Ordinary @ https://***@example.org/w.whl?token=***" in freeze([str(site)])


def test_damaged_metadata_is_told_as_far_as_it_goes(site: Path) -> None:
    (site / "Ordinary-1.0.dist-info" / "direct_url.json").write_text("{")
    (site / "plain-1.0.dist-info" / "direct_url.json").write_text('{"dir_info": {"editable": true}}')
    assert {"Ordinary==1.0", "plain==1.0"} <= set(freeze([str(site)]))


def test_the_file_holds_the_machine_in_lines_that_pip_ignores(tmp_path: Path) -> None:
    text = environment_text()
    told, packages = parse_environment(text)
    assert told == machine()
    assert told["python"].endswith(sys.version.split()[0]) and told["cpu cores"] == str(len(os.sched_getaffinity(0)))
    assert packages["pydantic"].startswith("pydantic==") and len(packages) == len(
        [line for line in freeze() if not line.startswith("#")]
    )
    headers = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(headers) >= len(told)
    assert os.environ["PATH"] not in text


def test_names_are_found_in_every_kind_of_line() -> None:
    lines = [
        "a-B.c==1",
        "d @ https://example.org/d.whl",
        "-e git+https://example.org/x@1#egg=e_f&subdirectory=g",
        "# Editable Git install with no remote (local==2)",
        "-e /home/me/local",
    ]
    packages = parse_environment("\n".join(lines))[1]
    assert [*packages] == ["a-b-c", "d", "e-f", "local"]
    assert packages["local"] == "local==2 -e /home/me/local"
