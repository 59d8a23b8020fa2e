"""The config of a run that is to equal another one, and run.yaml as a config of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distlm.cli import main
from distlm.config.attempt import Attempt, begin_attempt, changed_config, create_run
from distlm.config.load import load_config, parse_yaml
from distlm.config.reproduce import original_of, reproduce
from distlm.config.resolve import contradictions, resolved_tree
from distlm.errors import ExitCode, InputError
from distlm.launchers.local import LocalLauncher
from distlm.run_folder import RunFolder, dump_yaml, read_yaml, write_json

CONFIG = """\
model: {config: {model_type: bert, hidden_size: 64, num_attention_heads: 2}}
tokenizer: {train: {vocab_size: 1000}}
data: {train: [{source: files, paths: [corpus.txt]}], max_seq_length: 64}
training: {max_steps: 10, global_train_batch_size: 32, per_device_train_batch_size: 4}
tracking: {experiment_name: "${EXPERIMENT}"}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with config and data, which is the current one."""
    monkeypatch.setenv("EXPERIMENT", "mine")
    path = tmp_path / "project"
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG)
    (path / "corpus.txt").write_text("Some text.\n")
    monkeypatch.chdir(path)
    return path


def make_run(*overrides: str) -> RunFolder:
    loaded = load_config(Path("config.yaml"), overrides, contradictions)
    run = RunFolder.create(Path("runs"), "20260101-000000-aaaaaa")
    create_run(loaded, run)
    begin_attempt(loaded, run, list(overrides))
    return run


def test_the_config_is_that_of_the_run() -> None:
    run = make_run("seed=7", "training.lr_scheduler_type=constant")
    Path("config.yaml").unlink()
    equal = reproduce(run, [], contradictions)
    assert (equal.changed, equal.warnings) == ([], [])
    assert resolved_tree(equal.loaded.config, equal.loaded.raw) == read_yaml(run.run_yaml)
    assert equal.loaded.config.seed == 7 and equal.loaded.config.tracking.experiment_name == "mine"
    assert equal.loaded.raw["tracking"]["experiment_name"] == "${EXPERIMENT}"


def test_changes_of_resumes_are_in_it_and_overrides_come_last() -> None:
    run = make_run("resources.num_workers=2")
    changes = ["training.max_steps=20", "resources.num_workers=4"]
    Attempt("local", "0", changes=changes, working_directory=str(Path.cwd())).write(run.new_attempt())
    equal = reproduce(run, ["training.learning_rate=1e-4", "training.max_steps=30"], contradictions)
    training = equal.loaded.config.training
    assert (training.max_steps, training.learning_rate, equal.loaded.config.resources.num_workers) == (30, 1e-4, 4)
    assert equal.changed == ["training.learning_rate = 0.0001 (was 0.0005)", "training.max_steps = 30 (was 20)"]
    (warning,) = equal.warnings
    assert "had workers 2, 4" in warning and "the same up to rounding" in warning


def test_what_an_elastic_run_has_computed_is_the_same_up_to_rounding() -> None:
    run = make_run("resources.num_workers=[1,4]")
    equal = reproduce(run, [], contradictions)
    assert equal.loaded.config.resources.num_workers == [1, 4]
    (warning,) = equal.warnings
    assert "had workers [1, 4]" in warning and "the same up to rounding" in warning


def test_a_problem_is_located_where_the_key_was_written() -> None:
    run = make_run()
    Attempt("local", "0", changes=["training.eval_steps=many"]).write(run.new_attempt())
    text = run.run_yaml.read_text()
    run.run_yaml.write_text(text.replace("seed: 42", "seed: 42\nflux_capacitor: true"))
    line = text.splitlines().index("seed: 42") + 2
    with pytest.raises(InputError) as caught:
        reproduce(run, ["training.max_stepz=3"], contradictions)
    place = f"runs/{run.run_id}"
    assert [(problem.location, problem.key) for problem in caught.value.problems] == [
        ("command line", "training.max_stepz"),
        (f"{place}/attempts/002/attempt.yaml", "training.eval_steps"),
        (f"{place}/run.yaml:{line}", "flux_capacitor"),
        ("", ""),
    ]
    assert str(caught.value.problems[-1]).startswith(f"run {run.run_id} was made by distlm 0, and this is ")


def test_an_attempt_of_a_newer_distlm_is_refused_by_name() -> None:
    run = make_run()
    attempt = run.attempts()[0].attempt_yaml
    attempt.write_text(attempt.read_text().replace("distlm_version: ", "distlm_version: 9") + "flux: 1\n")
    with pytest.raises(InputError, match=r"attempt\.yaml was written by distlm 9.*has keys that this one.*: flux;"):
        reproduce(run, [], contradictions)


def test_missing_data_names_the_folder_that_the_run_was_started_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        reproduce(run, [], LocalLauncher().check_here)
    first, second = caught.value.problems
    assert first.key == "data.train.0" and first.location.startswith("project/runs/")
    assert "no such file" in first.message and str(tmp_path) in first.message
    assert f"was started in {folder}, where its relative paths begin" in second.message
    (tmp_path / "corpus.txt").write_text("Other text.\n")
    (warning,) = reproduce(run, [], LocalLauncher().check_here).warnings
    assert f"was started in {folder}" in warning
    monkeypatch.chdir(folder)
    (folder / "corpus.txt").unlink()
    with pytest.raises(InputError) as caught:
        reproduce(run, [], LocalLauncher().check_here)
    assert len(caught.value.problems) == 1, "here, another folder is not the cause"


def test_a_run_remembers_the_run_that_it_equals() -> None:
    original = make_run()
    run = RunFolder.create(Path("runs"), "20260101-000001-bbbbbb")
    equal = reproduce(original, [], contradictions)
    create_run(equal.loaded, run)
    begin_attempt(equal.loaded, run, [], reproduces=str(original.path))
    begin_attempt(equal.loaded, run, [])
    assert original_of(original) is None and original_of(run) == original


def test_errors_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["submit", *arguments]) == ExitCode.BAD_INPUT
        return capsys.readouterr().err

    assert "there is no run nothing in runs (newest runs: none)" in refused("run:nothing")
    run = make_run()
    assert f"newest runs: {run.run_id}" in refused("run:nothing")
    assert "there is no run last in elsewhere" in refused("run:last", "--runs-dir", "elsewhere")
    run.run_yaml.unlink()
    for name in (run.run_id, f"runs/{run.run_id}"):
        assert f"runs/{run.run_id} has no run.yaml" in refused(f"run:{name}")
    assert [path.name for path in Path("runs").iterdir()] == [run.run_id]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.validation=[{source: python-docs}]"],
        ["training.lr_scheduler_type=constant"],
        ["deepspeed.zero_stage=3", "deepspeed.offload_param_device=cpu"],
        ["training.max_steps=null", "training.num_train_epochs=2"],
        ["name='1e5'", "data.train.0.text_column='08'", "tracking.registered_model_name='12_3'"],
    ],
)
def test_run_yaml_is_a_config_of_its_own(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As downloaded from MLflow, or printed by a dry run."""
    run = make_run(*overrides)
    downloaded = tmp_path / "downloaded.yaml"
    downloaded.write_bytes(run.run_yaml.read_bytes())
    again = load_config(downloaded, [], contradictions)
    assert again.config == load_config(Path("config.yaml"), overrides, contradictions).config
    assert again.raw == read_yaml(run.run_yaml)
    assert main(["validate", str(downloaded)]) == ExitCode.SUCCEEDED
    assert "valid. 32 samples per step" in capsys.readouterr().out
    assert main(["submit", "--dry-run", str(downloaded)]) == ExitCode.SUCCEEDED
    printed = capsys.readouterr().out
    assert main(["submit", "--dry-run", f"run:{run.run_id}"]) == ExitCode.SUCCEEDED
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree == yaml.safe_load(printed) == again.raw


def test_a_resolved_config_can_be_changed_by_overrides() -> None:
    """And defaults that follow from other keys change with these."""
    run = make_run()
    equal = reproduce(run, ["data.validation=[{source: python-docs}]"], contradictions)
    assert equal.changed == ["data.validation = [{'source': 'python-docs'}] (was [])"]
    assert equal.loaded.config.data.validation_fraction == 0
    equal = reproduce(run, ["training.lr_scheduler_type=constant"], contradictions)
    assert equal.loaded.config.training.warmup_steps == 0


def test_a_run_of_an_older_version_is_taken_as_a_resume_takes_it() -> None:
    """Its run.yaml holds defaults that have no meaning beside other keys, and lacks keys that are new."""
    run = make_run("data.validation=[{source: python-docs}]", "training.lr_scheduler_type=constant", "name='1e5'")
    tree = read_yaml(run.run_yaml)
    tree["data"]["validation_fraction"], tree["training"]["warmup_steps"] = 0.01, 0.06
    del tree["data"]["num_proc"], tree["data"]["train"][0]["weight"]
    run.run_yaml.write_text(yaml.safe_dump(tree))  # the name without quotes
    Attempt("local", "0", changes=["runs_dir=elsewhere"], working_directory=str(Path.cwd())).write(run.new_attempt())
    resumed, _ = changed_config(run, [], contradictions)
    equal = reproduce(run, [], contradictions)
    assert equal.loaded.config == resumed.config and equal.loaded.config.name == "1e5"
    assert (equal.changed, equal.warnings) == ([], [])
    assert reproduce(run, ["seed=7"], contradictions).changed == ["seed = 7 (was 42)"]


@pytest.mark.parametrize("text", ["", "[1, 2]", "a", "{"])
def test_a_damaged_run_yaml_is_refused(text: str) -> None:
    run = make_run()
    run.run_yaml.write_text(text)
    for load in (lambda: reproduce(run, [], contradictions), lambda: changed_config(run, [], contradictions)):
        with pytest.raises(InputError, match=r"run\.yaml"):
            load()


def test_defaults_that_depend_on_other_keys() -> None:
    def config(*overrides: str) -> tuple[float, float]:
        loaded = load_config(Path("config.yaml"), overrides, contradictions).config
        return loaded.data.validation_fraction, loaded.training.warmup_steps

    assert config() == (0.01, 0.06)
    assert config("data.validation=[{source: python-docs}]") == (0.0, 0.06)
    assert config("training.lr_scheduler_type=constant") == (0.01, 0.0)


@pytest.mark.parametrize(
    "text", ["1e5", "08", "12345e7", "1_000", ".5", "+1", "1.", "no", "null", "2024-01-01", "0x1f"]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    dumped = dump_yaml({"key": text, "list": [text, 1e-6, 5e22, 7, None]})
    assert yaml.safe_load(dumped) == parse_yaml(dumped, "")[0] == {"key": text, "list": [text, 1e-6, 5e22, 7, None]}


def test_sources_on_the_hub_keep_the_commit_of_the_run_to_equal() -> None:
    """As a resume does; unless an override names another data set."""
    from distlm.worker.prepare import _commits_to_reproduce

    sources = "[{source: datasets, path: some/corpus}, {source: datasets, path: other/corpus, revision: v1}]"
    original = make_run(f"data.train={sources}")
    told = [
        {"source": "datasets", "path": "some/corpus", "revision": None, "commit": "a" * 40},
        {"source": "datasets", "path": "other/corpus", "revision": "v1", "commit": "b" * 40},
        {"source": "files", "paths": ["corpus.txt"]},
    ]
    original.init.mkdir()
    write_json(original.init / "prepared.json", {"data_info": {"sources": {"train": told, "validation": []}}})

    def commits(number: int, *overrides: str) -> dict[str, str]:
        run = RunFolder.create(Path("runs"), f"20260101-00000{number}-cccccc")
        loaded = reproduce(original, overrides, contradictions).loaded
        begin_attempt(loaded, run, [], reproduces=str(original.path))
        return _commits_to_reproduce(loaded.config, run)

    assert commits(1) == {"data.train.0": "a" * 40, "data.train.1": "b" * 40}
    assert commits(2, "data.train.1.revision=v2") == {"data.train.0": "a" * 40}
    assert commits(3, "data.train=[{source: datasets, path: third/corpus}]") == {}
    assert _commits_to_reproduce(load_config(Path("config.yaml")).config, original) == {}
