"""Configs: what is accepted, and that everything else is refused with place, key, value and remedy, all at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml

from distlm.config.attempt import Attempt, changed_config, create_run, load_attempt
from distlm.config.load import LoadedConfig, load_config, parse_yaml
from distlm.config.resolve import (
    at_world_size,
    batch_plan,
    contradictions,
    flatten,
    possible_world_sizes,
    resolved_tree,
    semantic_params,
    warmup_steps,
)
from distlm.errors import ExitCode, InputError, Problem
from distlm.run_folder import RunFolder, write_json

ROOT = Path(__file__).parents[2]
VALID = """\
model:
  config: {model_type: bert, hidden_size: 64, num_attention_heads: 2}
tokenizer:
  train: {vocab_size: 1000}
data:
  train:
    - {source: files, paths: [corpus.txt]}
  max_seq_length: 64
training:
  max_steps: 10
  global_train_batch_size: 32
  per_device_train_batch_size: 4
"""


def load(tmp_path: Path, text: str = VALID, *overrides: str, **environ: str) -> LoadedConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides), lambda config: contradictions(config, gpu_count=0), environ)


def problems(tmp_path: Path, text: str = VALID, *overrides: str, **environ: str) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides, **environ)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    return list(caught.value.problems)


def test_a_valid_config_is_frozen_and_complete(tmp_path: Path) -> None:
    config = load(tmp_path).config
    assert config.training.max_steps == 10
    assert config.task.mlm_probability == 0.30 and config.task.eval_mlm_probability == 0.15
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_shipped_configs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a machine without GPUs, the recipes on the node of 8 that they are for."""
    monkeypatch.setenv("DATA", "/data")  # where some find theirs
    names = set()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        gpu_count = 0 if path.name == "pretrain.yaml" else 8
        load_config(path, [], partial(contradictions, gpu_count=gpu_count))
        names.add(path.name)
    assert {"pretrain.yaml", "pretrain-bert-base.yaml"} <= names


@pytest.mark.parametrize(
    ("text", "line", "key", "advice"),
    [
        ("training:\n  max_step: 3\n", 2, "training.max_step", "did you mean training.max_steps?"),
        ("learning_rate: 3\n", 1, "learning_rate", "did you mean training.learning_rate?"),
        ("task: {mlm_probabilty: 0.2}\n", 1, "task.mlm_probabilty", "did you mean task.mlm_probability?"),
        ("data:\n  train:\n  - source: files\n    path: [a]\n", 4, "data.train.0.path", "data.train.0.paths"),
        (
            "data:\n  train:\n  - source: file\n",
            3,
            "data.train.0.source",
            "'files', 'parallel', 'datasets', 'python-docs'",
        ),
        ("training: {mixed_precision: bf32}\n", 1, "training.mixed_precision", "'no', 'bf16' or 'fp16'"),
        ("training:\n  max_steps: many\n", 2, "training.max_steps", "must be a valid integer"),
        ("training:\n  max_steps: 1.5\n", 2, "training.max_steps", "must be a valid integer"),
        ("training:\n  max_steps: true\n", 2, "training.max_steps", "must be a valid integer"),
        ("training:\n  gradient_checkpointing: yes\n", 2, "training.gradient_checkpointing", "true or false"),
        ("training:\n  learning_rate: .nan\n", 2, "training.learning_rate", "finite"),
        ("training:\n  learning_rate: -1\n", 2, "training.learning_rate", "greater than 0"),
        ("task:\n  mlm_probability: 1.5\n", 2, "task.mlm_probability", "less than 1"),
        ("deepspeed:\n  zero_stage: 4\n", 2, "deepspeed.zero_stage", "0, 1, 2 or 3"),
        ("data: 3\n", 1, "data", "valid dictionary"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, key: str, advice: str
) -> None:
    tree = yaml.safe_load(VALID)
    (section,) = yaml.load(text, yaml.BaseLoader)
    tree.pop(section, None)
    found = problems(tmp_path, text + yaml.safe_dump(tree))
    matching = [problem for problem in found if problem.key == key]
    assert matching, found
    assert matching[0].location == f"{tmp_path / 'run.yaml'}:{line}"
    assert advice in matching[0].message


@pytest.mark.parametrize(
    ("overrides", "key", "advice"),
    [
        (["training.global_train_batch_size=30"], "training.global_train_batch_size", "no multiple of"),
        (["resources.num_workers=3"], "training.global_train_batch_size", "workers that divide it: 1, 2, 4, 8"),
        (["deepspeed.offload_param_device=cpu"], "deepspeed.offload_param_device", "zero_stage 3 only, not 2"),
        (
            ["deepspeed.offload_optimizer_device=cpu", "deepspeed.zero_stage=0"],
            "deepspeed.offload_optimizer_device",
            "not 0",
        ),
        (["training.mixed_precision=fp16"], "training.mixed_precision", "needs a GPU"),
        (["model.attn_implementation=flash_attention_2"], "model.attn_implementation", "needs a GPU"),
        (["resources.device=cuda"], "resources.device", "no GPU"),
        (["resources.time_limit_s=60"], "resources.time_limit_s", "resources.time_to_save_s = 60 before that"),
        (
            ["resources.time_limit_s=9", "resources.time_to_save_s=10"],
            "resources.time_limit_s",
            "nothing could be trained",
        ),
        (["data.max_seq_length=1024"], "data.max_seq_length", "max_position_embeddings = 512"),
        (["model.config.max_position_embeddings=32"], "data.max_seq_length", "max_position_embeddings = 32"),
        (["model.config.hidden_size=65"], "model.config.hidden_size", "no multiple"),
        (["model.config.hiden_size=64"], "model.config.hiden_size", "did you mean hidden_size?"),
        (["model.config.num_hidden_layers=0"], "model.config.num_hidden_layers", "above 0"),
        (["model.config.vocab_size=500"], "model.config.vocab_size", "smaller than"),
        (["model.name_or_path=bert-base-uncased"], "model", "both are given"),
        (["model.config=null"], "model", "neither is given"),
        (["tokenizer.train=null"], "tokenizer", "needs a tokenizer"),
        (["training.num_train_epochs=1.0"], "training.max_steps", "both are given"),
        (["training.max_steps=null"], "training.max_steps", "neither is given"),
        (["training.warmup_steps=11"], "training.warmup_steps", "longer than"),
        (["training.warmup_steps=1.5"], "training.warmup_steps", "whole number"),
        (["training.eval_steps=5", "data.validation_fraction=0.0"], "training.eval_steps", "nothing to evaluate on"),
        (
            ["tracking.registered_model_name=m", "tracking.log_model=false"],
            "tracking.registered_model_name",
            "log_model",
        ),
        (["tokenizer.train.type=bpe", "tokenizer.train.vocab_size=260"], "tokenizer.train.vocab_size", "bpe needs 261"),
        (
            ["data.train.0.encoding=utf-9"],
            "data.train.0.encoding",
            "must be an encoding that Python knows, such as utf-8",
        ),
        (["data.train.0.encoding=base64"], "data.train.0.encoding", "must be an encoding that Python knows"),
        (["data.train.0.encoding_errors=ignore"], "data.train.0.encoding_errors", "'replace' or 'strict'"),
        (["data.train.0.weight=0"], "data.train.0.weight", "greater than 0"),
        (
            ["data.validation=[{source: files, paths: [v.txt], weight: 1}]"],
            "data.validation.0.weight",
            "validation sources have no weight",
        ),
        (
            ["data.train=[{source: python-docs, weight: 2}, {source: python-docs}]"],
            "data.train.1.weight",
            "this one needs one, too",
        ),
        (
            ["data.train=[{source: datasets, path: a/b, split: 'train[:5%]'}]"],
            "data.train.0.split",
            "set streaming: false",
        ),
        (["data.train.0.label_column=label"], "data.train.0.label_column", "no meaning for the task masked-lm"),
        (
            ["data.validation=[{source: python-docs, text_pair_column: b}]"],
            "data.validation.0.text_pair_column",
            "no meaning for the task masked-lm",
        ),
        (["data.train=[{source: parallel, columns: {text: a}}]"], "data.train.0.source", "is for tasks with labels"),
        (["data.train.0.format=conll"], "data.train.0.format", "words with labels"),
        (["data.train.0.delimiter=ab"], "data.train.0.delimiter", "must be one character"),
        (["data.train.0.path=a"], "data.train.0.path", "did you mean data.train.0.paths?"),
        (
            ["data.train=[{source: datasets, path: a/b, textcolumn: b}]"],
            "data.train.0.textcolumn",
            "did you mean data.train.0.text_column?",
        ),
        (
            ["training.lr_scheduler_type=constant", "training.warmup_steps=5"],
            "training.warmup_steps",
            "constant_with_warmup",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, overrides: list[str], key: str, advice: str) -> None:
    found = problems(tmp_path, VALID, *overrides)
    assert [problem.key for problem in found] == [key], found
    assert advice in found[0].message
    assert found[0].location


def test_all_problems_are_listed_at_once_also_those_between_keys(tmp_path: Path) -> None:
    text = VALID.replace("max_steps: 10", "max_stepz: 10\n  learning_rate: fast").replace(
        "max_seq_length", "  - {source: fils}\n  max_seq_length"
    )
    keys = {problem.key for problem in problems(tmp_path, text, "deepspeed.offload_param_device=cpu", "nonsense")}
    assert keys == {
        "training.max_stepz",
        "training.learning_rate",
        "data.train.1.source",
        "deepspeed.offload_param_device",
        "",
        "training.max_steps",
    }


@pytest.mark.parametrize(
    ("text", "line", "advice"),
    [
        ("", None, "empty"),
        ("- a\n- b\n", None, "must be a mapping"),
        ("a: [1\nb: 2\n", 2, "not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", 1, "no tags that create objects"),
        ("seed: 1\nname: x\nseed: 2\n", 3, "given twice, first in line 1"),
        ("a: &x [*x]\n", None, "refers to itself"),
        ("a: \x00\n", 1, "not valid YAML"),
        ("a: !!int x\n", 1, "not valid YAML: invalid literal for int"),
        ("a: 1\nb: !!timestamp 2024-99-99\n", 2, "not valid YAML: month must be in 1..12"),
        (f"a: {'9' * 5000}\n", 1, "not valid YAML: Exceeds the limit"),
        (f"a: {'[' * 200}{']' * 200}\n", None, "nested too deeply"),
        (f"a: {'[' * 5000}\n", None, "nested too deeply"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(tmp_path: Path, text: str, line: int | None, advice: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.location == f"{tmp_path / 'run.yaml'}" + (f":{line}" if line else "")
    assert advice in problem.message


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a UTF-8 text file"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        load_config(tmp_path)


def test_scalars_are_those_of_yaml_1_2() -> None:
    tree, _ = parse_yaml("a: 1e-4\nb: no\nc: 1_000\nd: 010\ne: .5\nf: on\ng: ~\nh: 12:30\ni: -3\n", "x")
    assert tree == {"a": 1e-4, "b": "no", "c": 1000, "d": 10, "e": 0.5, "f": "on", "g": None, "h": "12:30", "i": -3}


def test_overrides_win_and_reach_into_lists(tmp_path: Path) -> None:
    config = load(
        tmp_path, VALID, "training.max_steps=7", "data.train.0.paths=[b.txt]", "training.learning_rate=1e-3"
    ).config
    assert config.training.max_steps == 7
    assert config.data.train[0].paths == ["b.txt"]  # type: ignore[union-attr]
    assert config.training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("training", "write key.sub=value"),
        ("=3", "write key.sub=value"),
        ("training.max_steps.x=3", "plain value"),
        ("data.train.9.source=x", "list of 1"),
        ("training.max_steps=[1", "not valid YAML"),
        ("traning.max_steps=1", "did you mean training?"),
        ("seed=!!int x", "not valid YAML"),
        ("name=!!timestamp 2024-99-99", "not valid YAML"),
        (f"seed={'9' * 5000}", "not valid YAML"),
        ("data.train={a: &x [*x]}", "refers to itself"),
        (f"name={'[' * 5000}", "nested too deeply"),
        (f"model.config.a={'[' * 200}{']' * 200}", "nested too deeply"),
        (f"name{'.x' * 2000}=1", "write key.sub=value"),
        ("model.config={a: 1, a: 2}", "is given twice"),
        ("data.train.\u00b2=1", "list of 1"),
        (f"data.train.{'9' * 5000}=1", "list of 1"),
        ("name=!!python/name:os.system x", "no tags"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, advice: str) -> None:
    found = problems(tmp_path, VALID, override)
    assert found[0].location == "command line"
    assert advice in found[0].message


@pytest.mark.parametrize("value", ["!!int x", "9" * 5000, "[" * 5000, "&x [*x]"])
def test_what_an_environment_variable_holds_is_refused_as_text(tmp_path: Path, value: str) -> None:
    (problem,) = problems(tmp_path, VALID, "training.max_steps=${STEPS}", STEPS=value)
    assert (problem.key, problem.value) == ("training.max_steps", "${STEPS}")


def test_keys_that_look_like_numbers(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, VALID + "\u00b2: 1\n")
    assert problem.key == "\u00b2" and "unknown key" in problem.message


def test_environment_variables_are_expanded_where_used_and_kept_where_stored(tmp_path: Path) -> None:
    text = VALID + "tracking: {tracking_uri: 'https://me:${PASSWORD}@host'}\n"
    loaded = load(tmp_path, text, "training.max_steps=${STEPS}", PASSWORD="s3cret", STEPS="25")
    assert loaded.config.tracking.tracking_uri == "https://me:s3cret@host"
    assert loaded.config.training.max_steps == 25
    run = RunFolder(tmp_path / "20260101-000000-aaaaaa")
    run.path.mkdir()
    create_run(loaded, run)
    stored = run.run_yaml.read_text()
    assert "s3cret" not in stored and "${PASSWORD}" in stored and "${STEPS}" in stored
    assert "s3cret" not in str(semantic_params(yaml.safe_load(stored)))


def test_an_unset_variable_and_a_refused_secret_are_reported_without_the_secret(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, VALID, "name=${NOT_SET}")
    assert (problem.key, problem.value) == ("name", "${NOT_SET}") and "NOT_SET is not set" in problem.message
    (problem,) = problems(tmp_path, VALID, "training.learning_rate=${TOKEN}", TOKEN="hunter2")
    assert problem.value == "${TOKEN}" and "hunter2" not in str(problem)
    for key in ("training.max_steps", "tracking.tracking_uri"):
        found = problems(tmp_path, VALID, f"{key}=https://user:hunter2@host")
        assert any(problem.key == key and "write ${NAME}" in problem.message for problem in found)
        assert "hunter2" not in str(found)


def test_the_batch_is_divided_exactly(tmp_path: Path) -> None:
    plan = batch_plan(load(tmp_path, VALID, "resources.num_workers=2").config)
    assert (plan.micro_batches, plan.accumulation_steps) == (8, 4)


def test_an_elastic_run_has_a_range_of_workers_and_a_plan_for_each_size(tmp_path: Path) -> None:
    loaded = load(tmp_path, VALID, "resources.num_workers=[2,7]")
    resources = loaded.config.resources
    assert (resources.is_elastic, resources.min_workers, resources.max_workers) == (True, 2, 7)
    assert resolved_tree(loaded.config, loaded.raw)["resources"]["num_workers"] == [2, 7]
    assert possible_world_sizes(loaded.config) == [2, 4], "of 8 micro batches"
    plans = [batch_plan(at_world_size(loaded.config, size)) for size in (2, 4)]
    assert [(plan.world_size, plan.accumulation_steps) for plan in plans] == [(2, 4), (4, 2)]
    assert loaded.config.resources == resources, "a copy has the other size"
    with pytest.raises(TypeError, match="at_world_size"):
        batch_plan(loaded.config)


def test_a_plain_number_of_workers_stays_one(tmp_path: Path) -> None:
    loaded = load(tmp_path, VALID, "resources.num_workers=4")
    resources = loaded.config.resources
    assert not resources.is_elastic
    assert resources.min_workers == resources.max_workers == resources.world_size == 4
    assert resolved_tree(loaded.config, loaded.raw)["resources"]["num_workers"] == 4
    assert possible_world_sizes(loaded.config) == [4]


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ("[4,2]", "the smaller number comes first: [2, 4]"),
        ("[2]", "a list of two, [MIN, MAX], for an elastic run; this list has 1"),
        ("[1,2,3]", "this list has 3"),
        ("[0,2]", "a whole number above 0, or two of them, [MIN, MAX]"),
        ("[1.0,2]", "a whole number above 0, or two of them, [MIN, MAX]"),
        ("[true,2]", "a whole number above 0, or two of them, [MIN, MAX]"),
        ("2-4", "a whole number above 0, or two of them, [MIN, MAX]"),
        ("0", "a whole number above 0, or two of them, [MIN, MAX]"),
    ],
)
def test_what_is_no_number_of_workers_is_told_what_is(tmp_path: Path, value: str, advice: str) -> None:
    (problem,) = problems(tmp_path, VALID, f"resources.num_workers={value}")
    assert problem.key == "resources.num_workers" and problem.location == "command line"
    assert advice in problem.message


def test_a_range_without_any_legal_number_of_workers_names_the_legal_ones(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, VALID, "resources.num_workers=[5,7]")
    assert problem.key == "training.global_train_batch_size"
    assert "resources.num_workers = [5, 7]; workers that divide it: 1, 2, 4, 8" in problem.message


def test_of_a_range_the_smallest_size_needs_a_gpu_for_each_worker(tmp_path: Path) -> None:
    config = load(tmp_path, VALID, "resources.num_workers=[3,8]").config
    for gpu_count, is_refused in ((3, True), (4, False)):  # 4 divides the micro batches, 3 does not
        found = [problem for problem in contradictions(config, gpu_count) if problem.key == "resources.num_workers"]
        assert bool(found) == is_refused


def test_the_ends_of_a_range_may_come_from_the_environment(tmp_path: Path) -> None:
    text = VALID + 'resources: {num_workers: ["${LEAST}", "${MOST}"]}\n'
    loaded = load(tmp_path, text, LEAST="1", MOST="4")
    assert loaded.config.resources.num_workers == [1, 4]
    assert loaded.raw["resources"]["num_workers"] == ["${LEAST}", "${MOST}"]
    (problem,) = problems(tmp_path, text, LEAST="1", MOST="many")
    assert "two of them, [MIN, MAX]" in problem.message


def test_warmup_is_steps_or_a_share(tmp_path: Path) -> None:
    assert warmup_steps(load(tmp_path, VALID, "training.warmup_steps=0.25").config, 200) == 50
    assert warmup_steps(load(tmp_path, VALID, "training.warmup_steps=7").config, 200) == 7
    assert warmup_steps(load(tmp_path, VALID, "training.warmup_steps=0").config, 200) == 0


def test_params_are_what_is_trained_and_not_where(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    params = semantic_params(loaded.config.model_dump())
    assert params["training.max_steps"] == "10" and params["model.config.hidden_size"] == "64"
    assert not any(key.startswith(("resources.", "tracking.")) for key in params)


def test_every_key_has_a_docstring() -> None:
    def undocumented(schema: dict, path: str = "") -> list[str]:  # type: ignore[type-arg]
        return [
            f"{path}.{name}" for name, field in schema.get("properties", {}).items() if not field.get("description")
        ]

    from distlm.config.schema import RunConfig

    schema = RunConfig.model_json_schema()
    assert not undocumented(schema)
    for name, section in schema["$defs"].items():
        assert not undocumented(section, name) and section["description"]


class TestResume:
    def make_run(self, tmp_path: Path) -> RunFolder:
        loaded = load(tmp_path)
        run = RunFolder.create(tmp_path / "runs", "20260101-000000-aaaaaa")
        create_run(loaded, run)
        Attempt("local", "0", origins=loaded.origins).write(run.new_attempt())
        return run

    def test_some_keys_may_change_and_stay_changed(self, tmp_path: Path) -> None:
        run = self.make_run(tmp_path)
        loaded, changes = changed_config(run, ["training.max_steps=20"], contradictions)
        assert loaded.config.training.max_steps == 20
        Attempt("local", "0", changes=changes).write(run.new_attempt())
        loaded, changes = changed_config(run, ["resources.num_workers=2"], contradictions)
        assert (loaded.config.training.max_steps, loaded.config.resources.num_workers) == (20, 2)
        Attempt("local", "0", changes=changes).write(attempt := run.new_attempt())
        assert load_attempt(run, attempt).config == loaded.config

    @pytest.mark.parametrize(
        "overrides",
        [
            ["data.validation=[{source: python-docs}]"],
            ["training.lr_scheduler_type=constant"],
            ["deepspeed.zero_stage=3", "deepspeed.offload_param_device=cpu"],
        ],
    )
    def test_what_can_be_submitted_can_be_resumed(self, tmp_path: Path, overrides: list[str]) -> None:
        """Though run.yaml holds all keys, also those that have no meaning beside others that were given."""
        loaded = load(tmp_path, VALID, *overrides)
        run = RunFolder.create(tmp_path / "runs", "20260101-000000-bbbbbb")
        create_run(loaded, run)
        again, changes = changed_config(run, ["training.max_steps=20"], contradictions)
        assert changes == ["training.max_steps=20"]
        assert again.config.model_copy(update={"training": loaded.config.training}) == loaded.config

    def test_changes_that_were_refused_are_not_in_force(self, tmp_path: Path) -> None:
        run = self.make_run(tmp_path)
        for changes, code in ((["training.max_steps=20"], 3), (["training.max_steps=20", "seed=7"], 2)):
            attempt = run.new_attempt()
            Attempt("local", "0", changes=changes).write(attempt)
            write_json(attempt.result_json, {"exit_code": code})
        run.new_attempt()  # without an attempt.yaml
        assert changed_config(run, ["resources.num_workers=2"], contradictions)[1] == [
            "training.max_steps=20",
            "resources.num_workers=2",
        ]

    @pytest.mark.parametrize(
        ("key", "override"),
        [
            ("training.learning_rate", "training.learning_rate=0.1"),
            ("seed", "seed=1"),
            ("data.max_seq_length", "data.max_seq_length=32"),
            ("name", "name=other"),
            ("model.config.hidden_size", "model.config.hidden_size=128"),
            ("data.train", "data.train.0.max_documents=7"),
        ],
    )
    def test_all_others_are_refused_by_name(self, tmp_path: Path, key: str, override: str) -> None:
        with pytest.raises(InputError, match=rf"{key}.*cannot be changed on resume"):
            changed_config(self.make_run(tmp_path), [override], contradictions)

    def test_a_run_stays_in_its_folder(self, tmp_path: Path) -> None:
        run = self.make_run(tmp_path)
        with pytest.raises(InputError, match=r"runs_dir: cannot be changed on resume.* move .*distlm resume NEW/"):
            changed_config(run, ["runs_dir=elsewhere"], contradictions)
        # An older version took it, and went on in the same folder.
        Attempt("local", "0", changes=["runs_dir=elsewhere", "training.max_steps=20"]).write(run.new_attempt())
        loaded, changes = changed_config(run, ["resources.num_workers=2"], contradictions)
        assert changes == ["training.max_steps=20", "resources.num_workers=2"]
        assert loaded.config.runs_dir == "runs"

    def test_run_yaml_holds_every_key(self, tmp_path: Path) -> None:
        stored = flatten(yaml.safe_load(self.make_run(tmp_path).run_yaml.read_text()))
        assert stored["training.adam_beta2"] == 0.98 and stored["seed"] == 42


def test_problems_survive_pickling() -> None:
    import pickle

    error = InputError(Problem("wrong", "a.b", "3", "x.yaml:1"), "and this")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert again.problems == error.problems and str(again) == str(error)


def test_an_encoding_is_known_by_its_other_names(tmp_path: Path) -> None:
    names = {"UTF8": "utf-8", "Latin-1": "iso8859-1", "GB18030": "gb18030", "utf_16": "utf-16"}
    for given, name in names.items():
        (source,) = load(tmp_path, VALID, f"data.train.0.encoding={given}").config.data.train
        assert source.source == "files" and source.encoding == name


def test_a_resume_may_change_the_number_of_tokenizing_processes_and_no_weight(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    run = RunFolder(tmp_path / "runs" / "20260101-000000-abcdef")
    create_run(loaded, run)
    tree = yaml.safe_load(run.run_yaml.read_text())
    # As an older version has written it: without the keys that are new.
    del tree["data"]["num_proc"], tree["data"]["train"][0]["weight"], tree["data"]["train"][0]["encoding"]
    del tree["tokenizer"]["train"]["type"]
    run.run_yaml.write_text(yaml.safe_dump(tree))
    assert changed_config(run, ["data.num_proc=7"], contradictions)[0].config.data.num_proc == 7
    with pytest.raises(InputError, match=r"data\.train: cannot be changed on resume"):
        changed_config(run, ["data.train.0.weight=2.0"], contradictions)
    assert not any(key.startswith("data.num_proc") for key in semantic_params(tree | {"data": {"num_proc": 3}}))
