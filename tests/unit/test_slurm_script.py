"""The batch script that follows from a config, what is refused before one is made, and what bash makes of it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distlm.config.load import load_config
from distlm.config.schema import RunConfig, SlurmConfig, slurm_time_s
from distlm.errors import InputError, Problem
from distlm.launchers.base import Job
from distlm.launchers.slurm import SlurmLauncher
from distlm.launchers.slurm_script import cpus_per_node
from distlm.run_folder import RunFolder

TEXT = """\
name: tiny
model:
  config: {model_type: bert, hidden_size: 64, num_attention_heads: 2}
tokenizer:
  train: {vocab_size: 1000}
data:
  train:
    - {source: python-docs}
  max_seq_length: 64
training:
  max_steps: 10
  global_train_batch_size: 64
  per_device_train_batch_size: 1
resources:
  target: slurm
"""
FAKE_PYTHON = """\
#!/bin/sh
printf '%s\\0' "$PWD" "$@" > "$(dirname "$0")/arguments"
"""
AWKWARD = (
    "run 1.yaml",
    "it's",
    'a "name"',
    "$HOME `id` $(id)",
    "name=two words",
    "a;b & c | d > e",
    "#no comment",
    "\\",
)


def load(tmp_path: Path, *overrides: str, text: str = TEXT) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, SlurmLauncher().check).config


def override(key: str, value: Any) -> str:
    """JSON is YAML."""
    return f"{key}={json.dumps(value)}"


def problems(tmp_path: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load(tmp_path, *overrides)
    return list(caught.value.problems)


def build(tmp_path: Path, *overrides: str, run: str = "run-1") -> str:
    """The script of a run in a folder of that name."""
    request = SlurmLauncher().build(load(tmp_path, *overrides), RunFolder(tmp_path / run))
    assert request.command == ("sbatch", "--parsable")
    return str(request)


def render(tmp_path: Path, what: Sequence[str], prologue: str, name: str = "tiny") -> str:
    """The script of a config's path and overrides."""
    path, *overrides = what
    config = load(tmp_path, override("slurm.prologue", prologue), override("name", name))
    return str(SlurmLauncher().render(config, Path(path), overrides))


def directives(script: str) -> list[str]:
    """As sbatch reads them: up to the first line that is no comment, without quotes."""
    found = []
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            found += shlex.split(line.removeprefix("#SBATCH "))
        elif not line.startswith("#"):
            break
    return found


def run_script(script: str, folder: Path) -> list[str]:
    """The folder and the arguments that the script gives to a Python in `folder`/bin."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(FAKE_PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    path = folder / "job.sh"
    path.write_text(script)
    subprocess.run(("bash", "-n", str(path)), check=True)
    done = subprocess.run(("bash", str(path)), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return (folder / "bin" / "arguments").read_text().split("\0")[:-1]


# --- directives ------------------------------------------------------------------------------------------------------

KEYS: dict[str, tuple[Any, str]] = {
    "partition": ("gpu,long", "--partition=gpu,long"),
    "account": ("lab-7", "--account=lab-7"),
    "qos": ("high", "--qos=high"),
    "nodes": (4, "--nodes=4"),
    "cpus_per_node": (12, "--cpus-per-task=12"),
    "gpus_per_node": (8, "--gpus-per-node=8"),
    "memory_gib_per_node": (1.5, "--mem=1536M"),
    "time": ("2-00:30", "--time=2-00:30"),
    "max_requeues": (0, "--no-requeue"),
    "constraint": ("[rack1 & fast]|a100", "--constraint=[rack1 & fast]|a100"),
    "exclusive": (True, "--exclusive"),
    "directives": (["--mail-type=END"], "--mail-type=END"),
    "prologue": ("module load cuda", "module load cuda"),
}


def test_a_script_of_defaults_leaves_everything_to_the_cluster(tmp_path: Path) -> None:
    assert directives(build(tmp_path)) == [
        "--job-name=tiny", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--signal=B:USR2@60", "--requeue",
        "--open-mode=append", f"--output={tmp_path}/run-1/slurm-%j.log",
    ]  # fmt: skip


def test_there_is_a_case_for_every_key() -> None:
    assert set(KEYS) == set(SlurmConfig.model_fields)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_one_line(tmp_path: Path, key: str) -> None:
    value, line = KEYS[key]
    workers = "resources.num_workers=4"
    before, after = build(tmp_path, workers), build(tmp_path, workers, override(f"slurm.{key}", value))
    new = [line for line in after.splitlines() if line not in before.splitlines()]
    unquoted = [shlex.split(one.removeprefix("#SBATCH "))[0] if one.startswith("#SBATCH") else one for one in new]
    assert line in unquoted
    # CPUs follow from nodes, or are all; a prologue says which Python it is.
    others = {"nodes": "--cpus-per-task=1", "prologue": f"exec python -m distlm.slurm {tmp_path}/run-1"}
    assert sorted(unquoted) == sorted([line, *([others[key]] if key in others else [])])


def test_all_keys_together(tmp_path: Path) -> None:
    overrides = [override(f"slurm.{key}", value) for key, (value, _) in KEYS.items()]
    script = build(tmp_path, *overrides, "resources.num_workers=32", "resources.time_to_save_s=90.5")
    assert directives(script) == [
        "--job-name=tiny", "--partition=gpu,long", "--account=lab-7", "--qos=high", "--nodes=4", "--ntasks-per-node=1",
        "--cpus-per-task=12", "--gpus-per-node=8", "--mem=1536M", "--time=2-00:30", "--constraint=[rack1 & fast]|a100",
        "--exclusive", "--signal=B:USR2@91", "--no-requeue", "--open-mode=append",
        f"--output={tmp_path}/run-1/slurm-%j.log", "--mail-type=END",
    ]  # fmt: skip


@pytest.mark.parametrize(("gib", "line"), [("0", "--mem=0M"), ("4", "--mem=4096M"), ("0.25", "--mem=256M")])
def test_memory_is_in_gib(tmp_path: Path, gib: str, line: str) -> None:
    assert line in directives(build(tmp_path, f"slurm.memory_gib_per_node={gib}"))


@pytest.mark.parametrize(
    ("workers", "nodes", "others", "per_node", "cpus"),
    [
        ("1", 1, [], 1, 1),
        ("8", 2, [], 4, 4),
        ("8", 3, [], 3, 3),  # 3, 3 and 2
        ("[2, 8]", 4, [], 2, 2),
        ("8", 2, ["resources.cpus_per_worker=6"], 4, 24),
        ("8", 2, ["slurm.cpus_per_node=64"], 4, 64),
        ("8", 2, ["slurm.cpus_per_node=64", "slurm.exclusive=true"], 4, 64),
        ("8", 2, ["slurm.exclusive=true"], 4, None),
        ("8", 2, ["slurm.exclusive=true", "resources.cpus_per_worker=6"], 4, None),
    ],
)
def test_the_cpus_of_a_node_follow_from_its_workers(
    tmp_path: Path, workers: str, nodes: int, others: Sequence[str], per_node: int, cpus: int | None
) -> None:
    overrides = [f"resources.num_workers={workers}", f"slurm.nodes={nodes}", *others]
    config = load(tmp_path, *overrides)
    assert (config.resources.workers_per_host(config.slurm.nodes), cpus_per_node(config)) == (per_node, cpus)
    asked = [line for line in directives(build(tmp_path, *overrides)) if line.startswith("--cpus")]
    assert asked == ([] if cpus is None else [f"--cpus-per-task={cpus}"])


# --- quoting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "job_name"),
    [
        ("tiny", "tiny"),
        ("bert-base_v1.2", "bert-base_v1.2"),
        ('it\'s a "name" #1', "it-s-a-name-1"),
        ("a --exclusive", "a---exclusive"),
        ("日本", "-"),
    ],
)
def test_a_job_has_the_name_of_the_run_without_what_needs_quotes(tmp_path: Path, name: str, job_name: str) -> None:
    assert directives(build(tmp_path, override("name", name)))[0] == f"--job-name={job_name}"


@pytest.mark.parametrize("name", ["the user's runs", 'a "quoted" run', "a;b&c", "$HOME", "#1"])
def test_the_folder_of_a_run_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    prologue = f"export PATH={shlex.quote(str(tmp_path))}/bin:$PATH"
    script = build(tmp_path, override("slurm.prologue", prologue), run=f"{name}/run-1")
    assert f"--output={folder}/run-1/slurm-%j.log" in directives(script)
    assert run_script(script, tmp_path) == [str(tmp_path), "-m", "distlm.slurm", f"{folder}/run-1"]


def test_what_a_job_prints_is_found_where_the_script_sends_it(tmp_path: Path) -> None:
    run, job = RunFolder(tmp_path / "run-1"), Job("slurm", "17")
    assert SlurmLauncher().output(job, run) == "", "nothing so far"
    (output,) = (line for line in directives(build(tmp_path)) if line.startswith("--output="))
    run.path.mkdir()
    Path(output.removeprefix("--output=").replace("%j", job.id)).write_bytes(b"of the prologue\n\xff\n")
    assert SlurmLauncher().output(job, run) == "of the prologue\n\ufffd\n"


def test_a_percent_sign_in_the_folder_stands_for_itself(tmp_path: Path) -> None:
    """In --output sbatch replaces what follows one, such as %u by the user's name, but for %%."""
    assert f"--output={tmp_path}/50%%user/run-1/slurm-%j.log" in directives(build(tmp_path, run="50%user/run-1"))


def test_a_config_and_overrides_arrive_as_they_were_given(tmp_path: Path) -> None:
    script = render(tmp_path, AWKWARD, f"export PATH={tmp_path}/bin:$PATH")
    assert run_script(script, tmp_path) == [str(tmp_path), "-m", "distlm.slurm", *AWKWARD]
    assert not [line for line in directives(script) if line.startswith("--output")], "in the folder it is sent from"
    assert script.splitlines()[0] == "#!/bin/bash"
    assert f"#   distlm render {shlex.join(AWKWARD)} --target slurm" in script.splitlines()


@pytest.mark.parametrize(
    ("name", "given"),
    [("two\nlines\n", "slurm.nodes=1"), ("tiny", "slurm.prologue=module load cuda\nsource .venv/bin/activate")],
)
def test_the_lines_that_say_where_a_script_comes_from_are_all_comments(tmp_path: Path, name: str, given: str) -> None:
    script = render(tmp_path, ["run.yaml", given], f"export PATH={tmp_path}/bin:$PATH", name)
    assert run_script(script, tmp_path) == [str(tmp_path), "-m", "distlm.slurm", "run.yaml", given]
    assert len(directives(script)) == 7, "sbatch reads them up to the first line that is no comment"


def test_without_a_prologue_the_python_that_submits_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my env").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "bin" / "python"))
    script = build(tmp_path, "slurm.prologue=' '")
    assert "\nexec python " not in script
    assert run_script(script, tmp_path / "my env") == [
        str(tmp_path / "my env"), "-m", "distlm.slurm", str(tmp_path / "run-1"),
    ]  # fmt: skip


def test_a_prologue_runs_before_in_the_same_shell(tmp_path: Path) -> None:
    lines = ["export PATH=$PWD/bin:$PATH", "cd sub", "if true; then", "  touch here", "fi"]
    (tmp_path / "sub").mkdir()
    script = render(tmp_path, ["run.yaml"], "\n".join(["", *lines, ""]))
    assert "\n".join(["", *lines, ""]) in script
    assert run_script(script, tmp_path)[0] == str(tmp_path / "sub")
    assert (tmp_path / "sub" / "here").exists()


def test_the_exit_code_of_the_job_is_that_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexit 75\n")
    (tmp_path / "python").chmod(0o755)
    script = render(tmp_path, ["run.yaml"], f"export PATH={tmp_path}:$PATH")
    assert subprocess.run(("bash", "-s"), input=script, text=True).returncode == 75


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "value", "words"),
    [
        (["slurm.nodes=2"], "slurm.nodes", "2", "resources.num_workers is 1"),
        (["slurm.nodes=5", "resources.num_workers=[2, 4]"], "slurm.nodes", "5", "resources.num_workers is [2, 4]"),
        (["resources.device=cuda"], "slurm.gpus_per_node", "0", "each node needs 1"),
        (
            ["resources.device=cuda", "resources.num_workers=8", "slurm.nodes=2"],
            "slurm.gpus_per_node",
            "0",
            "each node needs 4",
        ),
        (["resources.device=cpu", "slurm.gpus_per_node=2"], "slurm.gpus_per_node", "2", "would have nothing to do"),
        (["slurm.gpus_per_node=2", "resources.num_workers=4"], "slurm.gpus_per_node", "2", "4 workers"),
        (
            ["resources.device=cuda", "slurm.gpus_per_node=3", "resources.num_workers=8", "slurm.nodes=2"],
            "slurm.gpus_per_node",
            "3",
            "4 workers",
        ),
        (["slurm.cpus_per_node=3", "resources.num_workers=4"], "slurm.cpus_per_node", "3", "need 4"),
        (
            ["slurm.cpus_per_node=7", "resources.num_workers=4", "resources.cpus_per_worker=2", "slurm.exclusive=true"],
            "slurm.cpus_per_node",
            "7",
            "resources.cpus_per_worker = 2 need 8",
        ),
        (["slurm.time=2:59"], "slurm.time", "2:59", "resources.time_to_save_s = 60 s"),
        (["slurm.time=10", "resources.time_to_save_s=481"], "slurm.time", "10", "resources.time_to_save_s = 481 s"),
        (["training.max_steps=null"], "training.max_steps", "", "neither is given"),
    ],
)
def test_keys_that_contradict_each_other(
    tmp_path: Path, overrides: Sequence[str], key: str, value: str, words: str
) -> None:
    (problem,) = problems(tmp_path, *overrides)
    assert problem.key == key and words in problem.message
    assert value in problem.value


@pytest.mark.parametrize(
    "overrides",
    [
        ["slurm.nodes=4", "resources.num_workers=4"],
        ["slurm.nodes=4", "resources.num_workers=[2, 4]"],
        ["resources.device=cuda", "slurm.gpus_per_node=4", "resources.num_workers=8", "slurm.nodes=2"],
        ["slurm.gpus_per_node=8", "resources.num_workers=4"],
        ["slurm.cpus_per_node=4", "resources.num_workers=4"],
        ["slurm.time=3:00"],
        ["slurm.time=10", "resources.time_to_save_s=480"],
    ],
)
def test_what_is_just_enough_is_not_refused(tmp_path: Path, overrides: Sequence[str]) -> None:
    assert load(tmp_path, *overrides).resources.target == "slurm"


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path, "slurm.nodes=2", "resources.device=cuda", "slurm.time=1", "slurm.cpus_per_node=1",
        "resources.cpus_per_worker=2",
    )  # fmt: skip
    keys = {"slurm.nodes", "slurm.gpus_per_node", "slurm.cpus_per_node", "slurm.time"}
    assert {problem.key for problem in found} == keys


def test_files_are_looked_for_only_where_they_are_to_be(tmp_path: Path) -> None:
    """Who renders a script may be on another machine than who submits it."""
    config = load(tmp_path, "model.name_or_path=./no-such-model", "model.config=null", "tokenizer.train=null")
    assert [problem.key for problem in SlurmLauncher().check_here(config)] == ["model.name_or_path"]
    scarce = load_config(tmp_path / "run.yaml", ["slurm.time=1"]).config
    assert [problem.key for problem in SlurmLauncher().check_here(scarce)] == ["slurm.time"]


# --- slurm.directives ------------------------------------------------------------------------------------------------

OWN = {
    "name": ["--job-name=x", "-J x"],
    "slurm.nodes": ["--nodes=2", "--nodes 2", "-N 2", "--ntasks=2", "-n 2", "--ntasks-per-node=2"],
    "slurm.partition": ["--partition=x", "-p x"],
    "slurm.account": ["--account=x", "-A x"],
    "slurm.qos": ["--qos=x", "-q x"],
    "slurm.time": ["--time=1:00:00", "-t 60"],
    "slurm.constraint": ["--constraint=x", "-C x"],
    "slurm.exclusive": ["--exclusive", "--exclusive=user"],
    "slurm.gpus_per_node": ["--gpus-per-node=2", "--gres=gpu:2"],
    "slurm.cpus_per_node": ["--cpus-per-task=2", "-c 2"],
    "slurm.memory_gib_per_node": ["--mem=4G"],
    "slurm.max_requeues": ["--requeue", "--no-requeue"],
    "resources.time_to_save_s": ["--signal=USR1@90"],
    "is set by distlm": [
        "--output=x", "-o x", "--error=x", "-e x", "--open-mode=truncate", "--parsable", "--wait", "-W", "--chdir=x",
        "-D x", "--wrap=true",
    ],
}  # fmt: skip


def directive_problem(tmp_path: Path, text: str) -> Problem:
    path = tmp_path / "run.yaml"
    path.write_text(f"{TEXT}slurm:\n  directives:\n    - {json.dumps(text)}\n")
    with pytest.raises(InputError) as caught:
        load_config(path, (), SlurmLauncher().check)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in OWN.items() for text in texts])
def test_an_option_that_follows_from_a_key_is_refused(tmp_path: Path, key: str, text: str) -> None:
    problem = directive_problem(tmp_path, text)
    assert problem.key == "slurm.directives.0" and problem.value == text
    assert problem.location == f"{tmp_path / 'run.yaml'}:{TEXT.count(chr(10)) + 3}"
    assert (f"set {key} for it" if "." in key or key == "name" else key) in problem.message


@pytest.mark.parametrize("text", ["-N2", "-pgpu", "-t60", "--partit=gpu", "--mail-type=END --nodes=4", "--hold -N 4"])
def test_no_other_spelling_of_it_passes(tmp_path: Path, text: str) -> None:
    assert directive_problem(tmp_path, text).key == "slurm.directives.0"


@pytest.mark.parametrize("text", ["", "mail-type=END", "#SBATCH --hold", " --hold", "--comment=a\n--hold"])
def test_what_is_no_option_is_refused(tmp_path: Path, text: str) -> None:
    problem = directive_problem(tmp_path, text)
    assert problem.key == "slurm.directives.0" and "one option of sbatch" in problem.message


def test_all_other_options_pass_in_their_order(tmp_path: Path) -> None:
    others = [
        "--mail-type=END", "--reservation=night", "--nodelist=n[1-2]", "--mem-per-cpu=2G", "--time-min=10", "-x n3",
        "--hold", "--nice=100", "--comment='two words'", "--gpu-bind=none", "--switches=1@10:00",
    ]  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(TEXT + "slurm:\n  directives:\n" + "".join(f"    - {json.dumps(text)}\n" for text in others))
    config = load_config(path, (), SlurmLauncher().check).config
    lines = str(SlurmLauncher().build(config, RunFolder(tmp_path))).splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")][-len(others) :] == [f"#SBATCH {o}" for o in others]


# --- slurm.time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("90", 5400),
        ("5:30", 330),
        ("0:05", 5),
        ("12:00:00", 43200),
        ("1:02:03", 3723),
        ("100:00:00", 360000),
        ("1-0", 86400),
        ("2-12", 216000),
        ("0-1", 3600),
        ("1-02:03", 93780),
        ("2-00:00:01", 172801),
        ("0", 0),
        ("0-0", 0),
        ("00:00:00", 0),
    ],
)
def test_a_time_in_seconds(text: str, seconds: int) -> None:
    assert slurm_time_s(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-5", "1:", ":1", "1-", "-1:00", "1:2:3:4", "1-2:3:4:5", "1.5", " 5", "5\n"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        slurm_time_s(text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("30", "30"),
        ("'30'", "30"),
        ("12:00:00", "12:00:00"),  # in YAML 1.1 a number to the base 60
        ("10:30", "10:30"),
        ("2-00", "2-00"),
        ("1-00:30:00", "1-00:30:00"),
        ("null", None),
    ],
)
def test_a_time_stays_as_it_is_written(tmp_path: Path, written: str, meant: str | None) -> None:
    assert load(tmp_path, text=f"{TEXT}slurm:\n  time: {written}\n").slurm.time == meant
    assert load(tmp_path, f"slurm.time={written}").slurm.time == meant


@pytest.mark.parametrize("written", ["0", "-5", "00:00:00", "12h", "UNLIMITED", "1.5", "true", "''", "[30]", "{a: 1}"])
def test_what_sbatch_takes_for_no_time_is_refused(tmp_path: Path, written: str) -> None:
    (problem,) = problems(tmp_path, f"slurm.time={written}")
    assert problem.key == "slurm.time" and "such as 12:00:00 or 2-00:00:00" in problem.message
