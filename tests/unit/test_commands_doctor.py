"""`distlm doctor`: what it finds, in the full install, in the base install, and where something is broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from made_runs import clean_environment, distlm, make_attempt, make_run, parsed

from distlm.doctor.hardware import check_hardware
from distlm.doctor.software import Requirement, check_package, check_software, is_within, parse_requirement
from distlm.doctor.surroundings import check_surroundings
from distlm.errors import ExitCode
from distlm.temporary import stale_temporary_roots, temporary_root


def by_subject(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert all({*one} == {"verdict", "subject", "found", "advice"} for one in found)
    assert all(one["verdict"] in ("ok", "warning", "missing") for one in found)
    assert all(one["advice"] for one in found if one["verdict"] == "missing")
    return {one["subject"]: one for one in found}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('ray[train]<2.61,>=2.60; extra == "train"', ("ray", "<2.61,>=2.60", "train")),
        ("typing-extensions>=4.13", ("typing-extensions", ">=4.13", "")),
        ("types-PyYAML; extra == 'dev'", ("types-PyYAML", "", "dev")),
        ("a.b (>=1, <2) ; python_version < '3.12'", ("a.b", ">=1,<2", "")),
    ],
)
def test_requirements(text: str, expected: tuple[str, str, str]) -> None:
    assert parse_requirement(text) == expected


@pytest.mark.parametrize(
    ("found", "versions", "expected"),
    [
        ("2.13.0+cpu", "<2.14,>=2.8", True),
        ("2.14", "<2.14,>=2.8", False),
        ("2.14.0", "<=2.14", True),
        ("2.7.9", ">=2.8", False),
        ("2.10", ">=2.9", True),
        ("5.23", ">=5.23.0", True),
        ("3.11.7", "<3.14,>=3.11", True),
        ("1.0rc1", "!=1", False),
        ("anything", "", True),
    ],
)
def test_versions(found: str, versions: str, expected: bool) -> None:
    assert is_within(found, versions) is expected


def test_every_requirement_of_ours_is_understood() -> None:
    requirements = [parse_requirement(text) for text in distribution("distlm").requires or []]
    assert {"torch", "ray", "mlflow"} <= {one.name for one in requirements if one.extra == "train"}
    assert all(isinstance(is_within("1.0", one.versions), bool) for one in requirements)


def test_packages() -> None:
    missing = check_package(Requirement("distlm-no-such-package", ">=1", "train"))
    assert (missing.verdict, missing.advice) == ("missing", "pip install 'distlm[train]'")
    assert check_package(Requirement("pytest", ">=1000", "")).verdict == "warning"
    assert check_package(Requirement("pytest", ">=1", "")).verdict == "ok"


def test_this_machine_can_train(tmp_path: Path) -> None:
    text = distlm("doctor", cwd=tmp_path)
    assert text.returncode == ExitCode.SUCCEEDED, text.stdout
    assert not any(line.startswith("missing") for line in text.stdout.splitlines()) and text.stderr == ""
    found = by_subject(parsed(distlm("doctor", "--json", cwd=tmp_path)))
    assert {"Python", "torch", "ray", "rich", "C++ compiler", "git", "GPUs", "CPU", "memory", "/dev/shm"} <= {*found}
    assert found["torch"]["found"] == distribution("torch").version
    assert "torch on this machine" in found and "pytest" not in found
    assert str(len(os.sched_getaffinity(0))) in found["CPU"]["found"]
    assert not (tmp_path / "runs").exists(), "it only looks"


@pytest.fixture
def base_install(tmp_path: Path) -> dict[str, str]:
    """The environment of an interpreter that sees the packages of the base install only, if it is started with -S."""
    base = tmp_path / "base"
    base.mkdir()
    for name in (
        "distlm", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "pyyaml",
        "rich", "markdown-it-py", "mdurl", "pygments", "argcomplete",
    ):  # fmt: skip
        for file in distribution(name).files or []:
            top = Path(distribution(name).locate_file(file.parts[0])).resolve()
            if ".." not in file.parts and top.exists() and not (base / top.name).exists():
                (base / top.name).symlink_to(top)
    if not (base / "distlm").exists():
        (base / "distlm").symlink_to(Path(__file__).parents[2] / "distlm")
    return clean_environment(tmp_path, PYTHONPATH=str(base))


def test_the_base_install_says_what_to_install(tmp_path: Path, base_install: dict[str, str]) -> None:
    command = [sys.executable, "-S", "-m", "distlm.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=base_install, capture_output=True, text=True)
    assert done.returncode == ExitCode.INFRASTRUCTURE, done.stderr
    found = by_subject(json.loads(done.stdout))
    assert found["pydantic"]["verdict"] == "ok"
    for name in ("torch", "ray", "mlflow"):
        assert (found[name]["verdict"], found[name]["advice"]) == ("missing", "pip install 'distlm[train]'")
    assert "torch on this machine" not in found


def test_the_base_install_does_not_go_on_where_it_cannot(tmp_path: Path, base_install: dict[str, str]) -> None:
    run = make_run(tmp_path / "runs")
    make_attempt(run)
    # -S is not handed on to what `distlm sync` becomes, so that is started here.
    command = [sys.executable, "-S", "-m", "distlm.commands.data_plane", "distlm.tracking.sync", str(run.path)]
    done = subprocess.run(command, cwd=tmp_path, env=base_install, capture_output=True, text=True)
    assert done.returncode == ExitCode.BAD_INPUT
    assert done.stderr == "distlm: mlflow is not installed here; run: pip install 'distlm[train]'\n"


def test_without_compiler_and_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    for text, expected in (
        ("#!/bin/sh\necho 'one.cpp:1: error: no headers' >&2; exit 1\n", "does not compile: one.cpp:1: error"),
        ("not a program", "does not work"),
        (None, "none found"),
    ):
        if text:
            broken.write_text(text)
            broken.chmod(0o755)
        else:
            broken.unlink()
        monkeypatch.setenv("PATH", str(tmp_path))
        found = {one.subject: one for one in check_software()}
        assert found["C++ compiler"].verdict == "warning" and expected in found["C++ compiler"].found
        assert found["git"].verdict == "warning"


def test_a_compiler_with_arguments_and_in_another_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "my c++"
    script.write_text(
        '#!/bin/sh\n[ "$LC_ALL" = C ] || { echo "Fehler" >&2; exit 1; }\n[ "$1" = -O1 ] && shift && exec c++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("CXX", f"'{script}' -O1")
    found = {one.subject: one for one in check_software()}
    assert found["C++ compiler"].verdict == "ok" and str(script) in found["C++ compiler"].found
    script.write_text("#!/bin/sh\nprintf 'error: \\377\\n' >&2; exit 1\n")
    found = {one.subject: one for one in check_software()}
    assert "does not compile: error: " in found["C++ compiler"].found, "not in UTF-8"
    monkeypatch.setenv("CXX", "'no end")
    assert "C++ compiler" in {one.subject for one in check_software()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("#!/nowhere/sh\n", "No such file"), ("#!/bin/sh\nprintf '\\377' >&2; exit 3\n", "cannot be imported: \ufffd")],
)
def test_a_python_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    pytest.importorskip("torch")
    script = tmp_path / "python"
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    found = {one.subject: one for one in check_hardware()}["torch on this machine"]
    assert found.verdict == "missing" and expected in found.found
    assert "pip install --force-reinstall torch" in found.advice and "distlm" not in found.advice


def test_what_the_system_refuses_ends_no_other_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    long = tmp_path / ("x" * 300)
    found = {one.subject: one for one in check_surroundings(long / "runs")}
    assert "port 5000" in found and found["runs folder"].verdict == "missing", "no folder can have that name"
    # As where a parent cannot be read, which root always can.
    monkeypatch.setattr(shutil, "disk_usage", refused)
    found = {one.subject: one for one in check_surroundings(tmp_path)}
    assert found["runs folder"].verdict == "warning" and "Permission denied" in found["runs folder"].found
    assert {"temporary files", "loopback network", "port 5000"} <= {*found}
    monkeypatch.setattr(resource, "getrlimit", refused)
    found = {one.subject: one for one in check_hardware()}
    assert "Permission denied" in found["open files"].found and {"GPUs", "CPU", "memory", "/dev/shm"} <= {*found}


@pytest.mark.parametrize(("visible", "hides"), [(None, False), ("0,1", False), ("1", True), ("", True)])
def test_gpus_are_hidden_only_where_some_are(monkeypatch: pytest.MonkeyPatch, visible: str | None, hides: bool) -> None:
    """As on a machine with two GPUs."""
    monkeypatch.setattr("distlm.devices.glob.glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = {one.subject: one for one in check_hardware()}
    assert ("CUDA_VISIBLE_DEVICES hides some" in found["GPUs"].found) is hides


def test_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hidden-word@127.0.0.1:{port}/x")
        found = {one.subject: one for one in check_surroundings(tmp_path)}
        assert found["RAY_ADDRESS"].verdict == found["MLFLOW_TRACKING_URI"].verdict == "ok"
    found = {one.subject: one for one in check_surroundings(tmp_path)}
    assert found["RAY_ADDRESS"].verdict == "missing", "runs would train there"
    assert found["MLFLOW_TRACKING_URI"].verdict == "warning", "runs train without it"
    assert "hidden-word" not in str(found)
    for address in ("auto", "127.0.0.1:99999", "[::1]:1", "http://[broken", "\udcff:5"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"} <= {one.subject for one in check_surroundings(tmp_path)}


def test_the_port_of_the_ui(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 5000))
            other.listen()
        except OSError:
            pass  # somebody else has it: all the same
        found = {one.subject: one for one in check_surroundings(tmp_path)}
    assert (found["port 5000"].verdict, found["port 5000"].advice) == ("warning", "distlm ui --port 5001")


def test_a_runs_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    found = {one.subject: one for one in check_surroundings(tmp_path / "runs")}
    assert found["runs folder"].verdict == "missing"
    done = distlm("doctor", "--json", cwd=tmp_path)
    assert done.returncode == ExitCode.INFRASTRUCTURE and json.loads(done.stdout)


@pytest.fixture
def short_temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for Ray."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_what_killed_runs_have_left(short_temporary: Path, tmp_path: Path) -> None:
    killed, new = short_temporary / "distlm-killed one", short_temporary / "distlm-new"
    for folder in (killed, new, short_temporary / "another"):
        folder.mkdir()
    (killed / ".made-by-distlm").touch()
    with temporary_root() as used:
        assert used.parent == short_temporary
        for folder in (killed, used):
            os.utime(folder, (0, 0))
        assert list(stale_temporary_roots()) == [killed]
        (finding,) = [one for one in check_surroundings(tmp_path) if one.subject == "killed runs"]
        assert (finding.verdict, finding.advice) == ("warning", f"rm -r '{killed}'")
    assert not used.exists() and list(stale_temporary_roots()) == [killed]


def test_a_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_root() as root:
        pass
    assert root.parent == Path("/tmp") and len(str(root)) <= 43


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with GPUs where pip has installed a CPU build of torch, which is what is installed here."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("this is a CUDA build")
    monkeypatch.setattr("distlm.doctor.hardware.visible_gpu_count", lambda: 2)
    found = {one.subject: one for one in check_hardware()}
    assert found["torch on this machine"].verdict == "warning" and "CUDA build" in found["torch on this machine"].advice
