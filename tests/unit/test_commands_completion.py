"""Completion as bash does it: the script that `distlm completion bash` prints, called as the shell calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import clean_environment, distlm, make_run, run_id

ASK = """
eval "$(distlm completion bash)"
complete -p distlm >&2 || exit 3
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${#line} COMP_TYPE=9 COMPREPLY=()
    _python_argcomplete distlm
    printf '%s\\n' "${COMPREPLY[*]}"
done
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with three runs, a config, and `distlm` on the PATH."""
    for number in range(3):
        make_run(tmp_path / "runs", number)
    make_run(tmp_path / "others", 9)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "corpus.txt").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "distlm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m distlm.cli "$@"\n')
    command.chmod(0o755)
    return tmp_path


def completions(place: Path, *lines: str) -> list[list[str]]:
    """The words that bash is given for each command line."""
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", *lines], cwd=place, env=clean_environment(place, PATH=path),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [line.split() for line in done.stdout.splitlines()]
    assert len(answers) == len(lines), (done.stdout, done.stderr)
    return answers


def test_verbs_runs_files_and_options(place: Path) -> None:
    runs = [run_id(number) for number in (2, 1, 0)]
    for line, expected in {
        "distlm sta": ["status"],
        "distlm status ": [*runs, "last"],
        "distlm status la": ["last"],
        f"distlm resume {run_id(1)[:-2]}": [run_id(1)],
        "distlm ui --runs-dir others ": [run_id(9), "last"],
        "distlm export last con": ["configs/"],
        "distlm submit conf": ["config.yaml", "configs/"],
        "distlm validate cor": [],
        "distlm completion ": ["bash", "zsh", "fish"],
        "distlm export last x --step ": ["last", "best"],
        "distlm list --": ["--help", "--limit", "--json", "--runs-dir"],
    }.items():
        (found,) = completions(place, line)
        assert (sorted(found) if "conf" in line else found) == expected, line  # the file system orders files


def test_a_copy_of_a_run_is_offered_behind_the_runs(place: Path) -> None:
    (place / "runs" / run_id(0)).rename(place / "runs" / "old-backup")
    (found,) = completions(place, "distlm status ")
    assert found == [run_id(2), run_id(1), "old-backup", "last"]


def test_overrides(place: Path) -> None:
    keys, stages, switch, optional, of_a_list, kinds, tasks, free, section = completions(
        place,
        "distlm submit config.yaml training.max_",
        "distlm submit config.yaml seed=1 deepspeed.zero_stage=",
        "distlm submit config.yaml training.torch_compile=t",
        "distlm submit config.yaml model.attn_implementation=",
        "distlm submit config.yaml data.train.0.so",
        "distlm submit config.yaml data.train.0.source=",
        "distlm submit config.yaml task.type=",
        "distlm submit config.yaml training.learning_rate=",
        "distlm submit config.yaml trai",
    )
    assert keys == ["training.max_steps=", "training.max_grad_norm=", "training.max_eval_samples="]
    # bash's own splitting of words at "=" leaves it the part behind.
    assert (stages, switch) == (["0", "1", "2", "3"], ["true"])
    assert optional == ["eager", "sdpa", "flash_attention_2", "null"]
    assert (of_a_list, free) == (["data.train.0.source="], [])
    assert kinds == ["files", "parallel", "datasets", "python-docs"]
    assert tasks == ["masked-lm", "text-classification", "token-classification"]
    assert "training=" not in section and "training.seed=" not in section and "training.save_steps=" in section


def test_a_resume_is_offered_what_it_may_change(place: Path) -> None:
    (found,) = completions(place, "distlm resume last ")
    assert "resources.num_workers=" in found and "training.max_steps=" in found
    assert "seed=" not in found and "model.name_or_path=" not in found


@pytest.mark.parametrize(
    ("shell", "text"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command")]
)
def test_every_shell_has_a_script(tmp_path: Path, shell: str, text: str) -> None:
    done = distlm("completion", shell, cwd=tmp_path)
    assert done.returncode == 0 and text in done.stdout and "distlm" in done.stdout
    assert distlm("completion", "tcsh", cwd=tmp_path).returncode == 2


def test_without_a_shell_that_asks_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from distlm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(*{'argcomplete', 'distlm.completion'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "\n")
