"""`run:RUN@STEP` in a config: which checkpoint it means, what is refused, and that a run keeps what it began with."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import fabricated
import pytest
from made_runs import CONFIG, clean_environment, distlm, make_attempt, make_run

from distlm.checkpoint.store import CheckpointStore
from distlm.config.load import load_tree
from distlm.errors import ExitCode, InputError
from distlm.run_folder import RunFolder, dump_yaml
from distlm.run_reference import check_references, pin_references, resolve_reference
from distlm.worker.model_source import with_local_weights

LOSSES = {10: 0.5, 20: 0.3, 30: 0.4}


def saved_run(runs_dir: Path, minutes: int = 0, losses: dict[int, float] | None = None, **sections: Any) -> RunFolder:
    """A run with checkpoints, evaluated at each of these steps."""
    run = make_run(runs_dir, minutes, **sections)
    store = CheckpointStore(run.checkpoints)
    store.clean()
    for step, loss in (LOSSES if losses is None else losses).items():
        fabricated.write(store, step, metrics={"eval/loss": loss} if loss else None)
    return run


def found(text: str, runs_dir: Path) -> tuple[str, int]:
    reference = resolve_reference(text, runs_dir)
    assert reference is not None
    return reference.run.run_id, reference.step


def test_runs_by_id_name_folder_and_last(tmp_path: Path) -> None:
    old = saved_run(tmp_path, 0, name="base")
    run = saved_run(tmp_path, 1, name="base")
    other = saved_run(tmp_path, 2, name="base@home")
    make_attempt(run)
    for name in (run.run_id, str(run.path)):
        assert found(f"run:{name}", tmp_path) == (run.run_id, 30)
        assert found(f"run:{name}@10", tmp_path) == (run.run_id, 10)
    assert found("run:base", tmp_path) == (run.run_id, 30), "the newest of that name"
    assert found(f"run:{old.run_id}@20", tmp_path) == (old.run_id, 20)
    assert found("run:last@best", tmp_path) == (other.run_id, 20)
    assert found("run:base@home@10", tmp_path) == (other.run_id, 10)
    for plain in ("bert-base-uncased", "./run:x", "runs/run", "RUN:last"):
        assert resolve_reference(plain, tmp_path) is None


@pytest.mark.parametrize(
    ("step", "expected"), [("", 30), ("@last", 30), ("@best", 20), ("@10", 10), ("@00000020", 20), ("@30", 30)]
)
def test_steps(tmp_path: Path, step: str, expected: int) -> None:
    run = saved_run(tmp_path)
    assert found(f"run:{run.run_id}{step}", tmp_path)[1] == expected


def test_the_final_model_of_a_run_may_be_its_best(tmp_path: Path) -> None:
    kept = {"max_steps": 100, "load_best_model_at_end": True}
    run = saved_run(tmp_path, training=kept)
    assert found(f"run:{run.run_id}", tmp_path)[1] == 20
    assert found(f"run:{run.run_id}@last", tmp_path)[1] == 30
    greater = saved_run(tmp_path, 1, training={**kept, "metric_for_best_model": "accuracy"})
    with pytest.raises(InputError, match=r"no checkpoint of run .* was evaluated; use @last or the number of a step"):
        resolve_reference(f"run:{greater.run_id}", tmp_path)


def test_best_as_a_resume_has_left_it(tmp_path: Path) -> None:
    run = saved_run(tmp_path, losses={10: 0.1, 20: 0.2})
    make_attempt(run, "training.load_best_model_at_end=true")
    assert found(f"run:{run.run_id}", tmp_path)[1] == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run:nothing", "there is no run nothing"),
        ("run:{run}@15", "has no checkpoint 15; it has the steps 10, 20, 30, last and best"),
        ("run:{run}@newest", "has no checkpoint newest"),
        ("run:{run}@-1", "has no checkpoint -1"),
        ("run:{empty}", "has no checkpoint"),
        ("run:{blind}@best", "was evaluated; use @last"),
        ("run:", "run"),
        ("run:2026", "is the beginning of 3 runs"),
    ],
)
def test_what_is_not_there_is_refused_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    names = {
        "run": saved_run(tmp_path, 0).run_id,
        "empty": saved_run(tmp_path, 1, losses={}).run_id,
        "blind": saved_run(tmp_path, 2, losses={10: 0.0}).run_id,
    }
    tree = copy.deepcopy(CONFIG) | {"model": {"name_or_path": text.format(**names)}, "runs_dir": str(tmp_path)}
    (problem,) = check_references(load_tree(tree).config)
    assert words in problem.message
    assert (problem.key, problem.value) == ("model.name_or_path", text.format(**names))


def with_references(runs_dir: Path, model: str, adapter: str | None = None) -> dict[str, Any]:
    tree = copy.deepcopy(CONFIG) | {"model": {"name_or_path": model}, "runs_dir": str(runs_dir)}
    tree["tokenizer"] = {}
    tree["task"] = {"type": "text-classification"}
    return tree | ({"peft": {"adapter_name_or_path": adapter}} if adapter else {})


def test_a_run_keeps_what_it_began_with(tmp_path: Path) -> None:
    run, other = saved_run(tmp_path, name="base"), saved_run(tmp_path, 1, name="earlier")
    loaded = load_tree(with_references(tmp_path, "run:base@best", "run:earlier"))
    pinned = pin_references(loaded)
    assert pinned.config.model.name_or_path == f"run:{run.run_id}@20"
    assert pinned.config.peft == {"adapter_name_or_path": f"run:{other.run_id}@30"}
    assert pinned.raw["model"]["name_or_path"] == f"run:{run.run_id}@20", "this is what run.yaml is made of"
    fabricated.write(CheckpointStore(run.checkpoints), 40, metrics={"eval/loss": 0.1})
    saved_run(tmp_path, 2, name="base")
    assert pin_references(pinned).config == pinned.config
    plain = load_tree(with_references(tmp_path, "bert-base-uncased", "some/adapter"))
    assert pin_references(plain) is plain


def test_a_run_in_another_folder_is_kept_with_its_folder(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "others")
    make_attempt(run)
    (tmp_path / "mine").mkdir()
    pinned = pin_references(load_tree(with_references(tmp_path / "mine", f"run:{run.path}@best")))
    assert pinned.config.model.name_or_path == f"run:{run.path}@20"
    assert not list(check_references(pinned.config))


def test_what_was_exported_outlives_the_run_that_it_is_of(tmp_path: Path) -> None:
    run = saved_run(tmp_path, name="base")
    pinned = pin_references(load_tree(with_references(tmp_path, "run:base@best"))).config
    shutil.rmtree(run.path)
    (problem,) = check_references(pinned)
    assert "there is no run" in problem.message
    exported = tmp_path / "cache" / f"model-{run.run_id}-20" / "exported"
    exported.mkdir(parents=True)
    assert not list(check_references(pinned))
    assert with_local_weights(pinned, RunFolder(tmp_path / "new")).model.name_or_path == str(exported)


def test_the_commands_refuse_and_pin(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "runs", name="base")
    tree = with_references(Path("runs"), "run:base")
    tree["resources"] = {"num_workers": 1, "device": "cpu"}
    tree["data"] = {"train": [{"source": "python-docs", "packages": ["json"], "label_column": "package"}]}
    tree["training"] = {"max_steps": 10, "global_train_batch_size": 8}
    (tmp_path / "c.yaml").write_text(dump_yaml(tree))
    environment = clean_environment(tmp_path)
    done = distlm("submit", "c.yaml", "--dry-run", cwd=tmp_path, env=environment)
    assert done.returncode == ExitCode.SUCCEEDED, done.stderr
    assert f"name_or_path: run:{run.run_id}@30" in done.stdout
    done = distlm("validate", "c.yaml", "model.name_or_path=run:base@5", cwd=tmp_path, env=environment)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "model.name_or_path" in done.stderr and "it has the steps 10, 20, 30" in done.stderr
