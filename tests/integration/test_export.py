"""`distlm export`: folders for from_pretrained, with the bits of the checkpoint, in bounded memory; or nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from saved_state import saved_weights
from tiny_runs import english
from transformers import AutoModelForMaskedLM, AutoTokenizer

from distlm.checkpoint.manifest import KINDS, Fragment, Manifest, Optimizer, Parameter, Progress
from distlm.checkpoint.store import Checkpoint, CheckpointStore
from distlm.checkpoint.tensor_file import CHUNK_BYTES, write_tensor_file
from distlm.config.attempt import begin_attempt, create_run
from distlm.config.load import LoadedConfig, load_config
from distlm.errors import CheckpointError, ExitCode
from distlm.run_folder import RunFolder, read_json, write_json
from distlm.worker.export import choose_checkpoint, export_checkpoint, export_run
from distlm.worker.model import build_model_config, initial_model, load_model, save_initial_model
from distlm.worker.prepare import prepare_run

WORLD_SIZE = 3
CONFIG = """
name: tiny
model: {config: {MODEL}, attn_implementation: eager}
tokenizer: {train: {vocab_size: 150}}
data:
  train: [{source: files, paths: ["${CORPUS}"]}]
  validation_fraction: 0.2
  max_seq_length: 32
training:
  max_steps: 4000
  global_train_batch_size: 6
  per_device_train_batch_size: 2
  mixed_precision: "no"
resources: {num_workers: 3}
tracking: {tracking_uri: "http://user:${PASSWORD}@tracking.invalid"}
"""
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "camembert": SMALL,  # the file names a tied weight otherwise than the model's parameter
    "xlm-roberta": SMALL,
    "jina_embeddings_v3": SMALL,
    "modernbert": SMALL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "gte": SMALL,  # save_pretrained writes other names, and fused weights, unless told not to
    "nomic_bert": SMALL,
    "esm": SMALL,
}


class Runs:
    """Prepared runs that share a corpus and its tokenised form."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {"CORPUS": str(folder / "corpus.txt"), "PASSWORD": "hunter2"}
        (folder / "corpus.txt").write_text(english(40, seed=3), encoding="utf-8")
        loaded, self.base = self._create("base", "bert")
        prepare_run(loaded.config, self.base)

    def _create(self, name: str, model_type: str) -> tuple[LoadedConfig, RunFolder]:
        model = {"model_type": model_type, **ARCHITECTURES[model_type]}
        config = self.folder / f"{name}.yaml"
        config.write_text(CONFIG.replace("{MODEL}", json.dumps(model)))
        loaded = load_config(config, environ=self.environ)
        run = RunFolder(self.folder / "runs" / name)
        create_run(loaded, run)
        begin_attempt(loaded, run, [])
        return loaded, run

    def make(self, name: str, model_type: str = "bert") -> Run:
        """A run whose weights have been drawn, of any architecture."""
        loaded, run = self._create(name, model_type)
        shutil.copytree(self.base.init, run.init, ignore=shutil.ignore_patterns("model"))
        tokenizer = AutoTokenizer.from_pretrained(run.init / "tokenizer")
        model_config = build_model_config(loaded.config, len(tokenizer), {"pad_token_id": tokenizer.pad_token_id})
        save_initial_model(initial_model(loaded.config, model_config)[0], run.init / "model")
        return Run(run)


@dataclass
class Run:
    folder: RunFolder

    def commit(self, step: int, **metrics: float) -> Checkpoint:
        """A checkpoint of three ranks with weights drawn from the step."""
        torch.manual_seed(step)
        model = load_model(self.folder.init / "model", "eager", gradient_checkpointing=False)
        weights = {name: torch.randn_like(parameter) * 0.05 for name, parameter in model.named_parameters()}
        return commit(self.folder, step, weights, metrics)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.folder.checkpoints)


def commit(
    run: RunFolder, step: int, weights: Mapping[str, torch.Tensor], metrics: Mapping[str, float] | None = None
) -> Checkpoint:
    """Write weights as the shards of three ranks, whose borders lie anywhere."""
    store = CheckpointStore(run.checkpoints)
    store.clean()
    parameters = [Parameter(name=name, shape=list(tensor.shape)) for name, tensor in weights.items()]
    pick = random.Random(step)
    fragments: list[list[Fragment]] = [[] for _ in range(WORLD_SIZE)]
    for number, parameter in enumerate(parameters):
        cuts = sorted(pick.randrange(parameter.numel + 1) for _ in range(WORLD_SIZE - 1))
        for rank, (start, end) in enumerate(zip([0, *cuts], [*cuts, parameter.numel], strict=True)):
            if start < end:
                fragments[rank].append(Fragment(number, start, end - start))
    shards = {}
    for rank, held in enumerate(fragments):
        parts = [
            weights[parameters[part.parameter].name].flatten()[part.start : part.start + part.numel] for part in held
        ]
        content = [memoryview((part * factor).numpy()) for factor in (1.0, 0.5, 0.25) for part in parts]
        name, shard = store.write_shard(store.temporary(step, "a"), rank, WORLD_SIZE, parameters, held, content)
        shards[name] = shard
    return store.commit(store.temporary(step, "a"), manifest(step, parameters, shards, metrics or {}))


def manifest(
    step: int, parameters: list[Parameter], shards: Mapping[str, Any], metrics: Mapping[str, float]
) -> Manifest:
    return Manifest(
        step=step,
        progress=Progress(sample_position=6 * step, epoch=0),
        seed=42,
        world_size=WORLD_SIZE,
        zero_stage=2,
        mixed_precision="bf16",
        versions={"torch": "2.13.0"},
        metrics={f"eval/{key}": value for key, value in metrics.items()},
        parameters=parameters,
        optimizer=Optimizer(adam_step=step, groups=[], loss_scaler=None),
        shards=dict(shards),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def bert(runs: Runs) -> Run:
    """With checkpoints of the steps 10, 20 (the best) and 30 (not evaluated)."""
    run = runs.make("bert")
    run.commit(10, loss=2.5, perplexity=12.18, accuracy=0.25)
    run.commit(20, loss=1.5, perplexity=4.48, accuracy=0.5)
    run.commit(30)
    return run


@pytest.fixture
def own(bert: Run, tmp_path: Path) -> Run:
    """A copy of that run, to be hurt."""
    shutil.copytree(bert.folder.path, tmp_path / "runs" / "bert")
    return Run(RunFolder(tmp_path / "runs" / "bert"))


def command(*arguments: str | Path, prefix: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """`distlm export`; with the code `prefix` run before it, in the same process as the export."""
    start = ["-m", "distlm.cli", "export"]
    if prefix:
        start = ["-c", f"import sys; {prefix}; from distlm.worker.export import main; sys.exit(main())"]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )
    assert "Traceback" not in done.stderr
    return done


def refusal(code: ExitCode, *arguments: str | Path, **options: Any) -> str:
    """The one line of an export that must fail and leave nothing."""
    done = command(*arguments, **options)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    *warnings, line = done.stderr.splitlines()
    assert all(warning.startswith("distlm: warning: ") for warning in warnings)
    assert line.startswith("distlm: ")
    return line.removeprefix("distlm: ")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def loaded(folder: Path) -> Any:
    model, report = AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def require_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> Any:
    """The folder's model, whose parameters must be exactly these."""
    model = loaded(folder)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in weights.items())
    return model


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture(runs: Runs, tmp_path: Path, model_type: str) -> None:
    run = runs.make(f"arch-{model_type}", model_type)
    checkpoint = run.commit(3)
    weights = saved_weights(checkpoint.path)
    folder = tmp_path / "model"
    export_checkpoint(run.folder, *choose_checkpoint(run.folder, "last"), folder)

    model = require_weights(folder, weights)
    expected = load_model(run.folder.init / "model", "eager", gradient_checkpointing=False).eval()
    changed = 0
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            changed += not torch.equal(parameter, weights[name])
            parameter.copy_(weights[name])
        input_ids = torch.arange(5, 29).view(2, 12)
        logits = model(input_ids=input_ids).logits
        assert torch.equal(logits, expected(input_ids=input_ids).logits) and torch.isfinite(logits).all()
    assert changed == len(weights)
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    tensors = load_file(folder / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert set(tensors) == set(load_file(run.folder.init / "model" / "model.safetensors"))


def test_the_folder_is_complete(bert: Run, runs: Runs, tmp_path: Path) -> None:
    done = command(bert.folder.path, "new/folder", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (ExitCode.SUCCEEDED, "")
    assert done.stdout == "step 30 of run bert exported to new/folder\n"
    folder = tmp_path / "new" / "folder"
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names and names_in(folder.parent) == ["folder"]
    for name, source in (("config.json", "model"), ("tokenizer.json", "tokenizer")):
        assert (folder / name).read_bytes() == (bert.folder.init / source / name).read_bytes()
    assert len(AutoTokenizer.from_pretrained(folder)) == 150


def test_initial_weights_in_several_files(own: Run, tmp_path: Path) -> None:
    initial = own.folder.init / "model"
    model = loaded(initial)
    (initial / "model.safetensors").unlink()
    model.save_pretrained(initial, max_shard_size="20KB", save_original_format=False)
    names = {path.name for path in initial.glob("model-*.safetensors")}
    assert len(names) > 3
    export_checkpoint(own.folder, *choose_checkpoint(own.folder, "10"), tmp_path / "model")
    require_weights(tmp_path / "model", saved_weights(own.folder.checkpoints / "step-00000010"))
    assert {path.name for path in (tmp_path / "model").glob("*.safetensors")} == names
    (initial / min(names)).unlink()
    refused = refusal(ExitCode.INFRASTRUCTURE, own.folder.path, tmp_path / "other")
    assert refused == f"{initial / min(names)} cannot be read: No such file or directory"


def test_what_is_not_trained_is_copied(own: Run, tmp_path: Path) -> None:
    file = own.folder.init / "model" / "model.safetensors"
    others = {
        "ids": torch.arange(7),
        "flag": torch.tensor(True),
        "half": torch.randn(3, 5).half(),
        "none": torch.empty(0, 4),
        "large": torch.arange(CHUNK_BYTES // 2 + 3, dtype=torch.int16),
    }
    trained = {name: tensor.half() for name, tensor in load_file(file).items()}  # comes out in fp32 all the same
    save_file({**trained, **others}, file)
    export_checkpoint(own.folder, *choose_checkpoint(own.folder, "10"), tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    weights = saved_weights(own.folder.checkpoints / "step-00000010")
    assert found.keys() == weights.keys() | others.keys()
    for name, tensor in {**weights, **others}.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_the_model_of_a_run_follows_its_last_checkpoint(own: Run) -> None:
    export_run(own.folder, "30")
    require_weights(own.folder.model, saved_weights(own.folder.checkpoints / "step-00000030"))
    (own.folder.model / "of_before").write_text("")
    own.commit(40)
    export_run(own.folder, "40")
    require_weights(own.folder.model, saved_weights(own.folder.checkpoints / "step-00000040"))
    assert not (own.folder.model / "of_before").exists()
    written = (own.folder.model / "model.safetensors").read_bytes()
    flip_a_byte(own.folder.checkpoints / "step-00000040" / "shard-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000040/.* was altered"):
        export_run(own.folder, "40")
    assert (own.folder.model / "model.safetensors").read_bytes() == written, "no older checkpoint in its place"
    assert not [path.name for path in own.folder.path.iterdir() if path.name.startswith(".")]


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_is_true_to_the_run(own: Run, tmp_path: Path) -> None:
    environ = {"CORPUS": "elsewhere", "PASSWORD": "hunter2"}
    tree = yaml.safe_load(own.folder.run_yaml.read_text())
    resumed = own.folder.new_attempt()
    overrides = ["training.max_steps=5000", "resources.num_workers=1"]
    attempt = {"target": "local", "distlm_version": "0", "overrides": overrides, "changes": overrides}
    resumed.attempt_yaml.write_text(yaml.safe_dump(attempt))
    assert command(own.folder.path, tmp_path / "m", "--step", "20", env={**os.environ, **environ}).returncode == 0

    text = (tmp_path / "m" / "README.md").read_text()
    prepared = json.loads((own.folder.init / "prepared.json").read_text())
    card = ModelCard.load(tmp_path / "m" / "README.md")
    told = card.data.to_dict()
    assert (told["library_name"], told["pipeline_tag"], card.data.base_model) == ("transformers", "fill-mask", None)
    assert card.data.model_name == "tiny" and {"bert", "distlm"} <= set(card.data.tags)
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"loss": 1.5, "perplexity": 4.48, "accuracy": 0.5}
    train, validation = prepared["data_info"]["train"], prepared["data_info"]["validation"]
    num_parameters = sum(tensor.numel() for tensor in saved_weights(own.folder.checkpoints / "step-00000020").values())
    for line in (
        f"A bert encoder with {num_parameters:,} trained parameters (fp32), trained by distlm with masked language "
        "modelling, from scratch.",
        "| run | `bert` |",
        "| step | 20 |",
        "| samples seen | 120 of 32 tokens each |",
        f"| epochs | {120 / prepared['num_train_samples']:.4g} |",
        f"| train | {train['num_documents']} | {train['num_tokens']:,} | {train['num_blocks']} |",
        f"| validation | {validation['num_documents']} | {validation['num_tokens']:,} | {validation['num_blocks']} |",
        "- train: `files`, paths: `['${CORPUS}']`, text_column: `text`, encoding: `utf-8`, encoding_errors: `replace`",
        "- validation: a share of 0.2 of the training documents, held out",
        "The tokenizer has 150 tokens; it was trained on the training text.",
        "| training.learning_rate | `0.0005` |",
        "| training.max_steps | `4000` |",
        "- attempt 2: `training.max_steps=5000`",
        "| perplexity | 4.48 |",
    ):
        assert line in text.splitlines(), line
    assert "written by 3 workers at ZeRO stage 2, bf16" in text and "torch 2.13.0" in text
    assert "hunter2" not in text and "elsewhere" not in text and "tracking.invalid" not in text
    assert "${PASSWORD}" in tree["tracking"]["tracking_uri"]


def test_the_card_of_a_step_that_was_not_evaluated(bert: Run, tmp_path: Path) -> None:
    export_checkpoint(bert.folder, *choose_checkpoint(bert.folder, "30"), tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    assert "Step 30 was not evaluated." in text and "| step | 30 |" in text
    assert ModelCard.load(tmp_path / "m" / "README.md").data.eval_results is None


@pytest.mark.parametrize(
    ("name", "is_from_hub", "base_model"),
    [
        ("google/bert", True, "google/bert"),
        ("models/bert", False, None),  # a folder, wherever the card is written
        ("${MODEL}", True, None),
        ("/data/bert", False, None),
        ("a`b|c", True, None),
    ],
)
def test_the_card_names_what_training_started_from(
    own: Run, tmp_path: Path, name: str, is_from_hub: bool, base_model: str | None
) -> None:
    prepared = read_json(own.folder.init / "prepared.json")
    write_json(own.folder.init / "prepared.json", prepared | {"is_from_hub": is_from_hub})
    tree = yaml.safe_load(own.folder.run_yaml.read_text())
    tree["model"] = {"name_or_path": name, "config": None, "attn_implementation": "sdpa"}
    own.folder.run_yaml.write_text(yaml.safe_dump(tree))
    export_checkpoint(own.folder, *choose_checkpoint(own.folder, "10"), tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.base_model == base_model
    assert f"starting from the weights of `{name}`." in card.text or "`" in name


def test_the_snippet_of_the_card_runs(
    bert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_checkpoint(bert.folder, *choose_checkpoint(bert.folder, "last"), tmp_path / "m")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text(), re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path / "m")
    exec(snippet[1], {})
    assert capsys.readouterr().out.count("'token_str'") == 5


# --- which checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "step"), [("last", 30), ("best", 20), ("10", 10), ("0010", 10)])
def test_the_checkpoint_that_is_asked_for(bert: Run, tmp_path: Path, wanted: str, step: int) -> None:
    done = command(bert.folder.path, tmp_path / "m", "--step", wanted)
    assert done.returncode == ExitCode.SUCCEEDED and done.stdout.startswith(f"step {step} of run bert exported")
    require_weights(tmp_path / "m", saved_weights(bert.folder.checkpoints / f"step-{step:08d}"))


def test_without_a_step_it_is_as_the_model_of_the_run(own: Run, tmp_path: Path) -> None:
    assert command(own.folder.path, tmp_path / "m").stdout.startswith("step 30 of run bert exported")
    tree = yaml.safe_load(own.folder.run_yaml.read_text())
    tree["training"]["load_best_model_at_end"] = True
    own.folder.run_yaml.write_text(yaml.safe_dump(tree))
    assert command(own.folder.path, tmp_path / "n").stdout.startswith("step 20 of run bert exported")
    for step in (10, 20):
        shutil.rmtree(own.folder.checkpoints / f"step-{step:08d}")
    assert "or use --step last" in refusal(ExitCode.BAD_INPUT, own.folder.path, tmp_path / "o")


def test_without_a_step_a_damaged_one_is_passed_over(own: Run, tmp_path: Path) -> None:
    damaged = own.folder.checkpoints / "step-00000030" / "shard-00001-of-00003.safetensors"
    flip_a_byte(damaged)
    done = command(own.folder.path, tmp_path / "m")
    assert done.returncode == ExitCode.SUCCEEDED and done.stdout.startswith("step 20 of run bert exported")
    assert done.stderr == (
        f"distlm: warning: skipping checkpoint step-00000030: {damaged} was altered: "
        "its SHA-256 is not the manifest's\n"
    )


@pytest.mark.parametrize(("wanted", "step"), [("30", 30), ("best", 20)])
def test_a_damaged_one_that_is_asked_for_is_refused(own: Run, tmp_path: Path, wanted: str, step: int) -> None:
    damaged = own.folder.checkpoints / f"step-{step:08d}" / "shard-00002-of-00003.safetensors"
    flip_a_byte(damaged)
    refused = refusal(ExitCode.INFRASTRUCTURE, own.folder.path, tmp_path / "m", "--step", wanted)
    assert refused == f"{damaged} was altered: its SHA-256 is not the manifest's"
    assert not (tmp_path / "m").exists()


def test_best_says_what_it_could_not_compare(own: Run, tmp_path: Path) -> None:
    (own.folder.checkpoints / "step-00000020" / "manifest.json").write_text("{}")
    done = command(own.folder.path, tmp_path / "m", "--step", "best")
    assert done.returncode == ExitCode.SUCCEEDED and done.stdout.startswith("step 10 of run bert exported")
    assert done.stderr.startswith("distlm: warning: checkpoint step-00000020 is not compared: ")


def test_all_damaged(own: Run, tmp_path: Path) -> None:
    for path in own.folder.checkpoints.glob("*/shard-00000-*"):
        flip_a_byte(path)
    refused = refusal(ExitCode.INFRASTRUCTURE, own.folder.path, tmp_path / "m")
    assert refused.startswith("no checkpoint can be used: ") and refused.count("was altered") == 3


def test_best_where_none_was_evaluated(own: Run, tmp_path: Path) -> None:
    for step in (10, 20):
        shutil.rmtree(own.folder.checkpoints / f"step-{step:08d}")
    refused = refusal(ExitCode.BAD_INPUT, own.folder.path, tmp_path / "m", "--step", "best")
    assert refused.startswith("no checkpoint of run bert has eval/loss: ") and "--step last" in refused


@pytest.mark.parametrize("wanted", ["15", "newest", "-1", "", "9" * 5000])
def test_a_step_that_is_not_there(bert: Run, tmp_path: Path, wanted: str) -> None:
    refused = refusal(ExitCode.BAD_INPUT, bert.folder.path, tmp_path / "m", f"--step={wanted}")
    assert "it has 10, 20, 30" in refused or "must be best, last or the number of a step" in refused
    assert names_in(tmp_path) == []


# --- refusals --------------------------------------------------------------------------------------------------------


def test_no_checkpoint(own: Run, tmp_path: Path) -> None:
    shutil.rmtree(own.folder.checkpoints)
    assert refusal(ExitCode.BAD_INPUT, own.folder.path, tmp_path / "m") == "run bert has no checkpoint to export"


def test_places_that_are_taken(bert: Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name in ("full", "full/file"):
        refused = refusal(ExitCode.BAD_INPUT, bert.folder.path, tmp_path / name)
        assert refused == f"{tmp_path / name} exists and is no empty folder; name a new one"
    assert "cannot make" in refusal(ExitCode.BAD_INPUT, bert.folder.path, tmp_path / "full/file/below")
    assert "no checkpoint of step 15" in refusal(ExitCode.BAD_INPUT, bert.folder.path, tmp_path / "a/b", "--step", "15")
    assert "cannot make" in refusal(ExitCode.BAD_INPUT, bert.folder.path, tmp_path / "link")
    (tmp_path / "empty").mkdir()
    assert "current folder" in refusal(ExitCode.BAD_INPUT, bert.folder.path, ".", cwd=tmp_path / "empty")
    assert names_in(tmp_path) == ["empty", "full", "link"] and names_in(tmp_path / "full") == ["file"]
    assert command(bert.folder.path, tmp_path / "empty").returncode == ExitCode.SUCCEEDED


def test_a_checkpoint_of_another_model(own: Run, tmp_path: Path) -> None:
    weights = saved_weights(own.folder.checkpoints / "step-00000030")
    first = next(iter(weights))
    for changed, problem in (
        ({**weights, "adapter": torch.zeros(3)}, "the checkpoint's parameter adapter has no place in"),
        ({**weights, first: torch.zeros(7)}, f"the checkpoint's parameter {first} has the shape [7], and [192, 32] in"),
        ({**weights, "cls.predictions.decoder.weight": weights[first]}, f"and its {first} have the same place in"),
    ):
        commit(own.folder, 31, changed)
        with pytest.raises(CheckpointError, match=re.escape(problem)):
            export_checkpoint(own.folder, *choose_checkpoint(own.folder, "last"), tmp_path / "m")
    assert names_in(tmp_path) == ["runs"]


@pytest.mark.parametrize(
    "lost", ["init/model/model.safetensors", "init/model/config.json", "init/tokenizer", "init/prepared.json"]
)
def test_a_run_that_lacks_something(own: Run, tmp_path: Path, lost: str) -> None:
    path = own.folder.path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused = refusal(ExitCode.BAD_INPUT, own.folder.path, tmp_path / "m")
    assert refused == f"{path} is missing: the run was never prepared, or it was deleted"
    assert names_in(tmp_path) == ["runs"]


def test_a_full_disk_leaves_nothing(bert: Run, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    refused = refusal(ExitCode.INFRASTRUCTURE, bert.folder.path, tmp_path / "m", prefix=limit)
    assert refused == f"cannot write {tmp_path / 'm'}: File too large"
    assert names_in(tmp_path) == []


def test_without_the_training_packages(bert: Run, tmp_path: Path) -> None:
    refused = refusal(
        ExitCode.BAD_INPUT, bert.folder.path, tmp_path / "m", prefix="sys.modules['huggingface_hub'] = None"
    )
    assert refused == "huggingface_hub is not installed here; run: pip install 'distlm[train]'"
    assert names_in(tmp_path) == []


# --- large models ----------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 205_001, 256  # 210 MB of fp32, no multiple of a chunk


def large_pieces() -> Iterator[np.ndarray]:
    """The weights of the large model, never all at once: row r holds r + 0, r + 1, ... mod 2**24, exact in fp32."""
    step = 1000
    for start in range(0, ROWS, step):
        rows = np.arange(start, min(start + step, ROWS))[:, None]
        yield ((rows * COLUMNS + np.arange(COLUMNS)) % 2**24).astype(np.float32)


@pytest.fixture(scope="module")
def large(bert: Run, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with one parameter of 210 MB, in two shards."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(bert.folder.path, folder / "runs" / "large", ignore=shutil.ignore_patterns("checkpoints"))
    run = RunFolder(folder / "runs" / "large")
    initial = run.init / "model" / "model.safetensors"
    initial.unlink()
    zeros = memoryview(bytearray(COLUMNS * 4))
    write_tensor_file(initial, {"embedding": ("F32", (ROWS, COLUMNS))}, (zeros for _ in range(ROWS)))
    store = CheckpointStore(run.checkpoints)
    store.clean()
    parameters, shards = [Parameter(name="embedding", shape=[ROWS, COLUMNS])], {}
    cut = 100_000 * COLUMNS
    for rank, (start, end) in enumerate(((0, cut), (cut, ROWS * COLUMNS))):
        content = (
            memoryview(piece)
            for _ in KINDS
            for number, piece in enumerate(large_pieces())
            if (number * 1000 * COLUMNS < cut) == (rank == 0)
        )
        name, shard = store.write_shard(
            store.temporary(5, "a"), rank, 2, parameters, [Fragment(0, start, end - start)], content
        )
        shards[name] = shard
    store.commit(store.temporary(5, "a"), manifest(5, parameters, shards, {}))
    yield run
    shutil.rmtree(folder)


def test_memory_is_bounded(large: RunFolder, tmp_path: Path) -> None:
    measured = (
        "import atexit, re, pathlib, distlm.worker.model_card, distlm.worker.export;"
        "status = pathlib.Path('/proc/self/status');"
        "peak = lambda: 1024 * int(re.search('VmHWM: *\\t* *([0-9]+) kB', status.read_text())[1]); before = peak();"
        "atexit.register(lambda: print(peak() - before))"
    )
    done = command(large.path, tmp_path / "m", prefix=measured)
    assert done.returncode == ExitCode.SUCCEEDED, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert CHUNK_BYTES <= grown < 4 * CHUNK_BYTES, f"{grown:,} bytes for weights of {ROWS * COLUMNS * 4:,}"
    (file,) = (tmp_path / "m").glob("*.safetensors")
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    written = np.memmap(file, np.float32, "r", offset=header_bytes, shape=(ROWS, COLUMNS))
    for number, piece in enumerate(large_pieces()):
        assert np.array_equal(written[number * 1000 : number * 1000 + len(piece)], piece)
    shutil.rmtree(tmp_path / "m")


def test_a_stopped_export_leaves_nothing(large: RunFolder, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "distlm.cli", "export", str(large.path), str(tmp_path / "m")]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any(tmp_path.iterdir()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (ExitCode.CANCELLED, "", "")
    assert names_in(tmp_path) == []
