"""What an attempt records of its code, packages and data, and how the records of two attempts differ."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distlm.config.attempt import Attempt
from distlm.controller.differences import AttemptRecord, differences
from distlm.controller.provenance import Provenance
from distlm.controller.recorder import Recorder
from distlm.run_folder import RunFolder, read_json, write_json
from distlm.tracking.records import read_lines

TIMEOUT_S = 60.0


def split(digest: str) -> dict[str, Any]:
    return {"num_documents": 3, "num_tokens": 70, "num_blocks": 2, "content_sha256": digest}


def data_info(digest: str = "t" * 64) -> dict[str, Any]:
    return {
        "format_version": 2, "fingerprint": "f", "max_seq_length": 32, "vocab_size": 300, "train": split(digest),
        "validation": split("v" * 64),
        "sources": {"train": [{"name": "a.txt", "content_sha256": digest}], "validation": []},
        "tokenizer_fingerprint": "k" * 64, "seconds": 1.0,
    }  # fmt: skip


MakeRun = Callable[..., RunFolder]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """Runs with what their preparation leaves, started in the folder of a repository."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text("seed: 1\n")
    (project / ".gitignore").write_text("runs/\n")
    for arguments in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-qm", "first")):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=project, check=True)
    monkeypatch.chdir(project)

    def make(number: int, reproduces: str = "", digest: str = "t" * 64, weights: bytes = b"weights") -> RunFolder:
        run = RunFolder.create(project / "runs", f"20260101-00000{number}-aaaaaa")
        Attempt("local", "0", reproduces=reproduces).write(run.new_attempt())
        (run.init / "model").mkdir(parents=True)
        (run.init / "model" / "model.safetensors").write_bytes(weights)
        write_json(run.init / "prepared.json", {"data_info": data_info(digest)})
        return run

    return make


def collect(run: RunFolder) -> tuple[list[str], list[dict[str, Any]]]:
    """What the user is told about the newest attempt, and the messages that are recorded of it."""
    attempt, said = run.attempts()[-1], list[str]()
    provenance = Provenance(run, attempt, said.append)
    with Recorder(run, attempt) as recorder:
        provenance.record(recorder)
        assert not said, "nothing is handed on before all is there"
        provenance.prepared(recorder)
        provenance.record(recorder, TIMEOUT_S)
        provenance.record(recorder, TIMEOUT_S)  # does nothing
    return said, [message for _, message in read_lines(attempt.metrics_jsonl)]


def test_an_attempt_records_with_what_it_runs(make_run: MakeRun) -> None:
    run = make_run(1)
    Path("config.yaml").write_text("seed: 2\n")
    os.environ["A_SECRET_OF_THIS_TEST"] = "hidden-value"
    try:
        said, messages = collect(run)
    finally:
        del os.environ["A_SECRET_OF_THIS_TEST"]
    (attempt,) = run.attempts()
    assert said == []
    code = read_json(attempt.code_json)
    commit = code["working_directory"]["commit"]
    assert len(commit) == 40 and code["working_directory"]["branch"] == "main"
    diff = (attempt.code / "working_directory.diff").read_text()
    assert diff.endswith("-seed: 1\n+seed: 2\n")
    data = read_json(attempt.data_json)
    assert data["train"] == split("t" * 64) and data["tokenizer_sha256"] == "k" * 64
    assert data["initial_weights_sha256"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert "\npydantic==" in attempt.environment_txt.read_text()
    assert not any("hidden-value" in file.read_text() for file in attempt.path.rglob("*") if file.is_file())
    (tags,) = (message["tags"] for message in messages if message["kind"] == "tags")
    assert tags == dict.fromkeys(("distlm.git_commit", "mlflow.source.git.commit"), f"{commit}-dirty")
    sent = {(m["artifact_path"], Path(m["path"]).name) for m in messages if m["kind"] == "artifact"}
    assert sent >= {
        ("attempts/001/code", "code.json"), ("attempts/001/code", "working_directory.diff"),
        ("attempts/001", "environment.txt"), ("attempts/001", "data.json"),
    }  # fmt: skip
    assert len(sent) == len([m for m in messages if m["kind"] == "artifact"])


def test_the_code_of_distlm_is_recorded_where_it_runs_from_another_checkout(make_run: MakeRun) -> None:
    run = make_run(1)
    collect(run)
    root = Path(__file__).parents[2]
    is_checkout = subprocess.run(["git", "ls-files", "--error-unmatch", "distlm/cli.py"], cwd=root, capture_output=True)
    recorded = read_json(run.attempts()[0].code_json)["distlm"]
    if is_checkout.returncode:
        assert recorded is None
    else:
        assert recorded["folder"] == str(root) and len(recorded["commit"]) == 40


def test_what_cannot_be_recorded_is_a_warning(make_run: MakeRun) -> None:
    run = make_run(1)
    (run.init / "prepared.json").unlink()
    run.attempts()[0].code.write_text("a file is in the way of the folder")
    said, messages = collect(run)
    assert [line.partition(": ")[0] for line in said] == ["warning"] * 2
    assert "cannot record the code: FileExistsError" in said[0] and "cannot record the data: TypeError" in said[1]
    assert [m["path"] for m in messages if m["kind"] == "artifact"] == ["attempts/001/environment.txt"]


def test_a_run_that_is_to_equal_another_is_compared_with_it(make_run: MakeRun) -> None:
    original = make_run(1)
    collect(original)
    equal = make_run(2, str(original.path))
    said, messages = collect(equal)
    assert said == [f"code, packages, machine and data are those of run {original.run_id}"]
    assert {"distlm.reproduces": original.run_id}.items() <= next(
        m["tags"] for m in messages if m["kind"] == "tags"
    ).items()

    Path("config.yaml").write_text("seed: 2\n")
    environment = original.attempts()[0].environment_txt
    text = environment.read_text().replace("\npydantic==", "\npydantic==0.", 1)
    environment.write_text(text)
    said, _ = collect(make_run(3, str(original.path), digest="u" * 64, weights=b"others"))
    name = f"run {original.run_id}"
    assert said == [
        f"warning: code of the working directory: the uncommitted changes are not those of {name}",
        f"warning: 1 other package is not as in {name}: pydantic (environment.txt)",
        f"warning: data.train: the text is not that of {name} (a.txt)",
        f"warning: initial weights: they are not those of {name}",
    ]


def test_a_resume_of_such_a_run_is_compared_as_well(make_run: MakeRun) -> None:
    original = make_run(1)
    collect(original)
    Attempt("local", "0").write(original.new_attempt())  # which has no records, as of an older distlm
    equal = make_run(2, str(original.path))
    Attempt("local", "0").write(equal.new_attempt())
    said, messages = collect(equal)
    name = f"run {original.run_id}, attempt 2"
    assert said == [
        f"warning: {what}: {name} has no record of it, so it is not compared"
        for what in ("code", "environment", "data")
    ]
    assert any(m["kind"] == "tags" and m["tags"].get("distlm.reproduces") == original.run_id for m in messages)


def test_an_original_that_is_gone_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    said, _ = collect(make_run(1, str(tmp_path / "gone" / "20260101-000000-bbbbbb")))
    assert said == ["warning: run 20260101-000000-bbbbbb has no records any more, so nothing is compared with it"]


def code(commit: str | None, diff: str | None = "d", distlm: Any = "working_directory") -> dict[str, Any]:
    return {"working_directory": {"commit": commit, "diff_sha256": diff}, "distlm": distlm}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (code("a" * 40), code("a" * 40), ""),
        (code(None, None, None), code(None, None, None), ""),
        (code("a" * 40), code("b" * 40), f"the working directory: commit {'a' * 12} (run X: {'b' * 12})"),
        (code(None, None, None), code("b", "d", None), "the working directory: commit none (run X: b)"),
        (code("a", None), code("a"), "the working directory: whether uncommitted changes are the same is not known"),
        # From the checkout of distlm itself, and from elsewhere.
        (
            code("a"), code(None, None, {"commit": "a", "diff_sha256": "d"}),
            "the working directory: commit a (run X: none)",
        ),
        (
            code("a", "d", {"commit": "c", "diff_sha256": "d"}), code("a", "d", {"commit": "c", "diff_sha256": "e"}),
            "distlm: the uncommitted changes are not those of run X",
        ),
    ],
)  # fmt: skip
def test_differences_of_the_code(ours: dict[str, Any], theirs: dict[str, Any], expected: str) -> None:
    found = [*differences(AttemptRecord(ours, None, None), AttemptRecord(theirs, None, None), "run X")]
    assert found == [f"code of {expected}"] * bool(expected)


def test_differences_of_packages_and_machine() -> None:
    ours = "# python: CPython 3.12.1\n# cpu: A\ntorch==2.9\nray==2\n" + "".join(f"p{n}==1\n" for n in range(7))
    theirs = "# python: CPython 3.11.7\n# cpu: A\n# cuda: 12.8\ntorch==2.8\n"
    theirs += "# Editable install with no version control (other==1)\n-e /somewhere\n"
    found = [*differences(AttemptRecord(None, ours, None), AttemptRecord(None, theirs, None), "run X")]
    assert found == [
        "python: CPython 3.12.1 (run X: CPython 3.11.7)",
        "cuda: none (run X: 12.8)",
        "package ray: ray==2 (run X: not installed)",
        "package torch: torch==2.9 (run X: torch==2.8)",
        "8 other packages are not as in run X: other, p0, p1, p2, p3, ... (environment.txt)",
    ]


def test_differences_of_the_data() -> None:
    ours: dict[str, Any] = {
        "train": split("a"), "validation": None, "tokenizer_sha256": "t", "initial_weights_sha256": {"m": "1"},
        "sources": {
            "train": [{"name": "x", "content_sha256": "1"}, {"name": "y", "content_sha256": "2"}], "validation": [],
        },
    }  # fmt: skip
    theirs = json.loads(json.dumps(ours))
    record, other = AttemptRecord(None, None, ours), AttemptRecord(None, None, theirs)
    assert not [*differences(record, other, "run X")]
    theirs["train"]["content_sha256"], theirs["sources"]["train"][1]["content_sha256"] = "b", "3"
    theirs["validation"], theirs["tokenizer_sha256"], theirs["initial_weights_sha256"] = split("c"), "u", {"m": "2"}
    assert [*differences(record, other, "run X")] == [
        "data.train: the text is not that of run X (y)",
        "data.validation: the text is not that of run X",
        "tokenizer: it is not that of run X",
        "initial weights: they are not those of run X",
    ]
