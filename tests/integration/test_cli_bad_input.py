"""What a hostile first user tries: every bad config, file or model is refused with one clear message and exit code 2,
before any worker starts and before MLflow hears of it."""

# ruff: noqa: E501 - tables of cases read best in one line each

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

from distlm.cli import main
from distlm.config.load import load_config
from distlm.config.resolve import contradictions
from distlm.data.train_tokenizer import train_tokenizer
from distlm.errors import ExitCode, InputError
from distlm.run_folder import RunFolder, new_run_id, read_json
from distlm.worker.prepare import Prepared, prepare_run

CONFIG = """\
name: small
model:
  config: {model_type: bert, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}
tokenizer:
  train: {vocab_size: 200}
data:
  train:
    - {source: files, paths: [corpus.jsonl]}
  max_seq_length: 32
  validation_fraction: 0.1
training:
  max_steps: 20
  global_train_batch_size: 16
  per_device_train_batch_size: 4
resources:
  num_workers: 2
"""
TEXT = "the quick brown fox jumps over the lazy dog and runs away from all of the other animals in the wood"
GOOD_LINE = json.dumps({"text": TEXT}) + "\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a good config and corpus."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "NOT_SET"):
        monkeypatch.delenv(name, raising=False)
    Path("run.yaml").write_text(CONFIG)
    Path("corpus.jsonl").write_text(GOOD_LINE * 100)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *overrides: str, verb: str = "validate") -> list[str]:
    """The lines on stderr of a command that must refuse its input and leave nothing behind."""
    assert main([verb, "run.yaml", *overrides]) == ExitCode.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and not Path("runs").exists()
    lines = captured.err.splitlines()
    assert lines and all(line.startswith("distlm: ") for line in lines)
    return [line.removeprefix("distlm: ") for line in lines]


def test_the_config_that_the_others_break_is_valid(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "run.yaml"]) == ExitCode.SUCCEEDED
    assert capsys.readouterr().out == (
        "run.yaml: valid. 16 samples per step = 4 per forward pass x 2 workers x 2 accumulation steps; "
        "ZeRO stage 2, bf16\n"
    )


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text])
def test_windows_line_ends_and_byte_order_marks_are_fine(place: Path, change: Callable[[str], str]) -> None:
    Path("run.yaml").write_bytes(change(CONFIG).encode())
    assert main(["validate", "run.yaml"]) == ExitCode.SUCCEEDED


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("training:", "trainnig:", "run.yaml:11: trainnig: unknown key; did you mean training?"),
        ("max_steps:", "max_step:", "run.yaml:12: training.max_step = 20: unknown key; did you mean training.max_steps?"),
        ("paths:", "path:", "run.yaml:8: data.train.0.path: unknown key; did you mean data.train.0.paths?"),
        ("hidden_size:", "hiden_size:", "run.yaml:3: model.config.hiden_size = 32: unknown key; did you mean hidden_size?"),
        ("name: small", "größe: 3", "run.yaml:1: größe = 3: unknown key; allowed here: name, seed, task, model, peft, "
         "tokenizer, data, training, deepspeed, resources, ray, slurm, kubernetes, recovery, tracking, profile, runs_dir, env"),
        ("source: files, ", "", "run.yaml:8: data.train.0: needs the key 'source'"),
        ("source: files", "source: fils", "run.yaml:8: data.train.0.source = fils: must be one of 'files', 'parallel', 'datasets', 'python-docs'"),
        ("[corpus.jsonl]", "corpus.jsonl", "run.yaml:8: data.train.0.paths = corpus.jsonl: must be a list, such as [a, b]"),
        ("[corpus.jsonl]", "[]", "run.yaml:8: data.train.0.paths: must not be an empty list"),
        ("name: small", "name: 2026", "run.yaml:1: name = 2026: must be text; put it in quotes"),
        ("name: small", "3: small", "run.yaml:1: 3 = small: must be text: keys are names"),
        ("name: small", "training.seed: 3", "run.yaml:1: training.seed: keys have no dots; write a: {b: ...} for a.b, which "
         "is meant for the command line"),
        ("  max_steps: 20\n", "\tmax_steps: 20\n", "run.yaml:12: not valid YAML: found character '\\t' that cannot start any "
         "token"),
        ("name: small", "name: \x00", "run.yaml:1: not valid YAML: the character U+0000 is not allowed"),
        ("name: small", "name: small\nname: big", "run.yaml:2: name: is given twice, first in line 1"),
        ("name: small", "name: a\n---\nname: b", "run.yaml:2: not valid YAML: but found another document"),
        ("name: small", "name: !!python/name:os.system ''", "run.yaml:1: not valid YAML: could not determine a constructor "
         "for the tag 'tag:yaml.org,2002:python/name:os.system'; only plain YAML is read, no tags that create objects"),
        ("name: small", "name: ${NOT_SET}", "run.yaml:1: name = ${NOT_SET}: environment variable NOT_SET is not set"),
        ("name: small", "name: ${NOT SET}", "run.yaml:1: name = ${NOT SET}: has a '${' that does not begin a ${NAME} of "
         "letters, digits and underscores"),
        ("max_steps: 20", f"max_steps: {10**30}", f"run.yaml:12: training.max_steps = {10**30}: must be less than 2147483648"),
        ("name: small", f"seed: {2**63}", f"run.yaml:1: seed = {2**63}: must be less than {2**63}"),
        ("hidden_size: 32", "hidden_size: big", "run.yaml:3: model.config.hidden_size = big: must be a whole number above 0"),
        ("num_workers: 2", "target: lsf", "run.yaml:16: resources.target = lsf: must be 'local', 'ray', 'slurm' or 'kubernetes'"),
    ],
)  # fmt: skip
def test_a_broken_config_is_refused_with_its_line(
    place: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, expected: str
) -> None:
    assert old in CONFIG
    Path("run.yaml").write_text(CONFIG.replace(old, new, 1))
    assert expected in refusal(capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "'training.max_steps' is not an override; write key.sub=value"),
        ("max_steps=3", "max_steps = 3: unknown key; did you mean training.max_steps?"),
        ("training.max_steps.x=3", "training.max_steps.x = 3: training.max_steps is a plain value and has no keys below it"),
        ("data.train.1.paths=[a]", "data.train.1.paths = [a]: data.train is a list of 1; use an index below that"),
        ("data.train.0.paths=[*.txt]", "data.train.0.paths = [*.txt]: the value is not valid YAML; quote it (expected alphabetic or numeric "
         "character, but found '.')"),
        (r'training.max_steps="a\n\e[31mb"', r"training.max_steps = a\x0a\x1b[31mb: must be a valid integer"),
        ("training=null", "training: must be a valid dictionary of keys and values"),
        ("training.lr_scheduler_kwargs={power: [1]}", "training.lr_scheduler_kwargs.power: must be a valid number"),
        ("training.mixed_precision=false", "training.mixed_precision = false: must be 'no', 'bf16' or 'fp16'"),
        ("tracking.report_to=[wandb]", "tracking.report_to.0 = wandb: must be 'mlflow'"),
        ("runs_dir=run.yaml", "runs_dir = run.yaml: run.yaml is a file, and a folder is needed"),
        ("runs_dir=~/runs", "runs_dir = ~/runs: '~' is not expanded here; write ${HOME} for it"),
        ("model={name_or_path: ./nope}", "model.name_or_path = ./nope: there is no such folder"),
        ("tokenizer={name_or_path: ~/tokenizer}", "tokenizer.name_or_path = ~/tokenizer: '~' is not expanded here; write "
         "${HOME} for it"),
    ],
)  # fmt: skip
def test_a_bad_override_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert f"command line: {message}" in refusal(capsys, override)


def test_more_workers_than_memory_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusal(capsys, "resources.num_workers=1000000", "training.global_train_batch_size=8000000")
    assert "resources.num_workers = 1000000: each worker needs 0.5 GiB of memory" in line


def test_the_divisors_of_a_large_batch_are_found_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = "training.global_train_batch_size=1000000001"
    (line,) = refusal(capsys, large, "training.per_device_train_batch_size=1", "resources.num_workers=2")
    assert line.endswith("workers that divide it: 1, 7, 11, 13, 19, 77, 91, 133, 143, 209, 247, 1001")


@pytest.mark.parametrize("verb", ["validate", "submit"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the config is empty"),
        (b"# only this\n", "the config is empty"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], verb: str, content: bytes, message: str
) -> None:
    Path("run.yaml").write_bytes(content)
    (line,) = refusal(capsys, verb=verb)
    assert line.startswith(f"run.yaml: {message}")


def test_a_runs_folder_that_cannot_be_made_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusal(capsys, "runs_dir=/proc/self/runs", verb="submit")
    assert "command line: runs_dir = /proc/self/runs: " in line
    assert "nothing can be written to the folder /proc/self" in line or "cannot create the folder of the run" in line


def test_a_run_that_does_not_exist_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("resume", "sync"):
        assert main([verb, "last"]) == ExitCode.BAD_INPUT
        assert "there is no run last in runs (newest runs: none)" in capsys.readouterr().err
    assert main(["resume", "."]) == ExitCode.BAD_INPUT, "a folder with a run.yaml is not yet a run"
    assert "there is no run . in runs" in capsys.readouterr().err
    assert main(["ui"]) == ExitCode.BAD_INPUT
    assert "there is no embedded MLflow store in runs" in capsys.readouterr().err


def test_overrides_may_stand_after_options(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "run.yaml", "seed=7", "--dry-run", "training.max_steps=5"]) == ExitCode.SUCCEEDED
    printed = capsys.readouterr().out
    assert "seed: 7\n" in printed and "max_steps: 5\n" in printed and not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["submit", "run.yaml", "--seed=7"],
            "unrecognized arguments: --seed=7; overrides have no dashes: key.sub=value",
        ),
        (["schema", "seed=7"], "unrecognized arguments: seed=7"),
        (["submit"], "the following arguments are required: CONFIG|run:RUN\n"),
        (["train"], "invalid choice: 'train'"),
    ],
)
def test_a_bad_command_line_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- data, first record


def parquet(columns: dict[str, Any]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("corpus.json", b"[]", "data.train.0 = corpus.json: unsupported suffix; use one of .txt"),
        ("a.jsonl", b"", "data.train.0: a.jsonl: the file is empty; remove it"),
        ("a.txt", b"\n \n", "data.train.0: a.txt: the file holds no records"),
        ("a.jsonl", b'{"text": \n', "data.train.0: a.jsonl:1: the line is not JSON (Expecting value, column 1)"),
        ("a.jsonl", b'["a"]\n', "data.train.0: a.jsonl:1: the line holds a list"),
        ("a.jsonl", b'{"txt": "a"}\n', "data.train.0: a.jsonl:1: no column 'text'; the columns are 'txt'; did you mean 'txt'?"),
        ("a.jsonl", b'{"text": 3}\n', "data.train.0: a.jsonl:1: column 'text' holds a number, not text"),
        ("a.txt", "größe".encode("latin1"), "data.train.0: a.txt:1: 1 of 1 documents hold bytes that are not UTF-8, so the "
         "files are probably in another encoding; set encoding to it"),
        ("a.txt", bytes(range(128, 256)), "data.train.0: a.txt:1: 1 of 1 documents hold bytes that are not UTF-8"),
        ("a.jsonl", GOOD_LINE.encode("utf-16"), "data.train.0: a.jsonl:1: the file begins as UTF-16 does; set encoding: utf-16"),
        ("a.jsonl", gzip.compress(GOOD_LINE.encode(), mtime=0), "data.train.0: a.jsonl: the file is compressed; give it a name that ends in .gz"),
        ("a.jsonl.gz", GOOD_LINE.encode(), "data.train.0: a.jsonl.gz: the compressed file is damaged or cut short (Not a gzipped "
         "file"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE.encode(), mtime=0)[:-20], "data.train.0: a.jsonl.gz: the compressed file is damaged or cut "
         "short (Compressed file ended before the end-of-stream marker was reached); copy or make it again"),
        ("a.parquet.gz", b"", "data.train.0 = a.parquet.gz: Parquet compresses its columns itself; unpack the file"),
        ("a.gz", b"", "data.train.0 = a.gz: unsupported suffix; use one of .txt"),
        ("a.csv", b"id,body\n1,x\n", "data.train.0: a.csv:1: no column 'text'; the columns are 'id', 'body'"),
        ("a.csv", b"id,text\n1,a,b\n", "data.train.0: a.csv:2: the row has 3 fields and the header has 2"),
        ("a.csv", b"id,text\n", "data.train.0: a.csv: the file holds no records"),
        ("a.csv", b'id,text\n1,"abc\n', "data.train.0: a.csv:2: unexpected end of data"),
        ("a.parquet", b"hello", "data.train.0: a.parquet: not a readable Parquet file"),
        ("a.parquet", parquet({"body": ["a"]}), "data.train.0: a.parquet: no column 'text'; the columns are 'body'"),
        ("a.parquet", parquet({"text": [1]}), "data.train.0: a.parquet: column 'text' holds int64, not text"),
        ("a.parquet", parquet({"text": pa.array([], pa.string())}), "data.train.0: a.parquet: the file holds no records"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | Callable[[Path], None], expected: str
) -> None:
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        content(Path(name))
    Path("run.yaml").write_text(CONFIG.replace("corpus.jsonl", name))
    (line,) = refusal(capsys)
    assert line.startswith(f"run.yaml:8: {expected}")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("corpsu.jsonl", "data.train.0 = corpsu.jsonl: no such file or folder"),
        ("none*.jsonl", "data.train.0 = none*.jsonl: no file matches this pattern"),
        ("empty", "data.train.0 = empty: the folder holds no file with a supported suffix"),
        ("/nowhere/a.txt", "data.train.0 = /nowhere/a.txt: no such file or folder; the folder /nowhere does not exist"),
    ],
)
def test_names_that_match_nothing_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], paths: str, expected: str
) -> None:
    Path("empty").mkdir()
    Path("run.yaml").write_text(CONFIG.replace("corpus.jsonl", paths))
    (line,) = refusal(capsys)
    assert line.startswith(f"run.yaml:8: {expected}")


def test_a_package_that_is_not_installed_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = refusal(capsys, "data.train.0={source: python-docs, packages: [yamll]}")
    assert "data.train.0 = yamll: no such package is installed" in line and "did you mean 'yaml'?" in line


# ----------------------------------------------------------------------------------------------------------- preflight


def prepare(*overrides: str) -> Prepared:
    """What the controller does before it starts workers."""
    config = load_config(Path("run.yaml"), overrides, lambda config: contradictions(config, gpu_count=0)).config
    return prepare_run(config, RunFolder.create(Path("runs"), new_run_id()))


def model_config(**keys: Any) -> str:
    return f"model.config={json.dumps(keys)}"


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["model.config.hidden_act=geluu"], "model.config.hidden_act", "unknown activation; did you mean gelu?"),
        (["model.config.hidden_act=3"], "model.config.hidden_act", "expected str, got int"),
        (["model.config.layer_norm_eps=tiny"], "model.config.layer_norm_eps", "expected float, got str"),
        (["model.config.layer_norm_eps=-1.0"], "model.config", "it gives no finite numbers for a sample"),
        (["model.config.hidden_dropout_prob=1.5"], "model.config", "dropout probability has to be between 0 and 1"),
        (["model.config.is_decoder=true"], "model.config", "masked-LM trains encoders, and this bert has is_decoder: true"),
        (["model.config.hidden_size=100000000"], "model.config", "allocate memory"),
        ([model_config(model_type="berd")], "model.config.model_type", "no masked-LM model of the type berd; did you mean "),
        ([model_config(model_type="gpt2")], "model.config.model_type", "no masked-LM model of the type gpt2; allowed: "),
        ([model_config(model_type="bart")], "model.config", "masked-LM trains encoders, and this bart has is_encoder_decoder"),
        ([model_config(model_type="roberta", hiden_size=32)], "model.config.hiden_size", "did you mean hidden_size?"),
        ([model_config(model_type="distilbert", dim=32, n_heads=3)], "model.config", "must divide config.dim 32 evenly"),
        # RoBERTa's positions begin after that of the padding token, which is 0 here.
        ([model_config(model_type="roberta", max_position_embeddings=32, **SMALL)], "data.max_seq_length",
         "32 tokens are more than the 31 positions of the model (roberta)"),
        ([model_config(model_type="deberta-v2", **SMALL), "model.attn_implementation=sdpa"], "model.attn_implementation",
         "does not have it here; leave it out, or use eager"),
        (["training.lr_scheduler_type=cosine", "training.lr_scheduler_kwargs={power: 2}"], "training.lr_scheduler_kwargs",
         "unexpected keyword argument 'power'"),
        (["training.lr_scheduler_type=cosine_with_min_lr"], "training.lr_scheduler_kwargs", "min_lr or min_lr_rate"),
        (["training.max_steps=null", "training.num_train_epochs=0.5", "training.warmup_steps=500"],
         "training.warmup_steps", "is longer than the "),
    ],
)  # fmt: skip
def test_a_model_or_schedule_that_cannot_be_made_is_refused(
    place: Path, overrides: list[str], key: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        prepare(*overrides)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_with_just_enough_positions_is_accepted(place: Path) -> None:
    prepared = prepare(model_config(model_type="roberta", max_position_embeddings=33, **SMALL))
    assert prepared.num_parameters > 0


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", GOOD_LINE * 5 + '{"text": oops}\n' + GOOD_LINE, "a.jsonl:6: the line is not JSON (Expecting value, column 10)"),
        ("a.jsonl", GOOD_LINE * 5 + '{"body": "x"}\n', "a.jsonl:6: no column 'text'"),
        ("a.csv", "text\na\n" + "b,c\n", "a.csv:3: the row has 2 fields and the header has 1"),
        ("a.jsonl", '{"text": ""}\n' * 9, "the training sources hold no text"),
        ("a.jsonl", GOOD_LINE, "data.train: the training text has 23 tokens, less than one sample"),
        ("a.jsonl", GOOD_LINE * 2, "data.validation_fraction = 1e-06: none of the 2 training documents"),
    ],
)  # fmt: skip
def test_data_that_turns_out_bad_is_refused(place: Path, name: str, content: str, expected: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(InputError) as caught:
        prepare(f"data.train.0.paths=[{name}]", "data.validation_fraction=1e-6")
    assert str(caught.value).startswith(expected)


def test_validation_sources_without_text_are_refused(place: Path) -> None:
    Path("empty.jsonl").write_text('{"text": " "}\n')
    Path("run.yaml").write_text(CONFIG.replace("  validation_fraction: 0.1\n", ""))
    with pytest.raises(InputError, match=r"^data\.validation: the validation sources hold no text"):
        prepare("data.validation=[{source: files, paths: [empty.jsonl]}]")


def save_tokenizer(folder: str) -> Any:
    tokenizer = train_tokenizer([TEXT], 150, lowercase=True, max_seq_length=32)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_tokenizer_that_cannot_be_used_is_refused(place: Path) -> None:
    Path("folder").mkdir()
    with pytest.raises(InputError, match=r"^tokenizer.name_or_path = \./folder: the tokenizer cannot be loaded"):
        prepare("tokenizer={name_or_path: ./folder}")
    tokenizer = save_tokenizer("maskless")
    tokenizer.mask_token = None
    tokenizer.save_pretrained("maskless")
    with pytest.raises(InputError, match=r"^tokenizer.name_or_path = \./maskless: it has no mask_token"):
        prepare("tokenizer={name_or_path: ./maskless}")


class TestPretrained:
    """`model.name_or_path`."""

    def prepare(self, *overrides: str) -> Prepared:
        return prepare("model={name_or_path: ./model}", "tokenizer=null", "tokenizer={}", *overrides)

    def save(self, model: torch.nn.Module) -> None:
        model.save_pretrained("model")  # type: ignore[operator]
        save_tokenizer("model")

    def config(self, **keys: Any) -> BertConfig:
        return BertConfig(**{"vocab_size": 150, "max_position_embeddings": 32, **SMALL, **keys})

    def refusal(self, *overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            self.prepare(*overrides)
        return str(caught.value)

    def test_a_good_one_is_accepted(self, place: Path) -> None:
        self.save(BertForMaskedLM(self.config()))
        assert self.prepare().vocab_size <= 150

    def test_a_new_head_is_accepted_and_a_new_encoder_is_not(self, place: Path) -> None:
        self.save(BertModel(self.config(), add_pooling_layer=False))
        self.prepare()
        config = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        assert "model.name_or_path: lacks 16 weights of a bert, such as bert.encoder.layer.1." in self.refusal()

    def test_a_folder_without_a_model_is_refused(self, place: Path) -> None:
        Path("model").mkdir()
        assert self.refusal().startswith("model.name_or_path = ./model: is no model: ")
        Path("model/config.json").write_text("{")
        assert "is not a valid JSON file" in self.refusal()

    def test_a_model_without_a_tokenizer_is_refused(self, place: Path) -> None:
        BertForMaskedLM(self.config()).save_pretrained("model")
        assert self.refusal() == (
            "model.name_or_path = ./model: its tokenizer: it knows special tokens only; tokenizer.json is missing"
        )

    def test_a_causal_model_is_refused(self, place: Path) -> None:
        self.save(GPT2LMHeadModel(GPT2Config(vocab_size=150, n_embd=32, n_layer=1, n_head=2)))
        assert "model.name_or_path = ./model: transformers has no masked-LM model of the type gpt2" in self.refusal()

    def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(self, place: Path) -> None:
        self.save(BertForMaskedLM(self.config(vocab_size=20)))
        assert "has 20 token embeddings, fewer than the tokenizer's" in self.refusal()

    def test_samples_longer_than_its_positions_are_refused(self, place: Path) -> None:
        self.save(BertForMaskedLM(self.config(max_position_embeddings=16)))
        assert self.refusal() == (
            "data.max_seq_length = 32: 32 tokens are more than the 16 positions of the model (bert)"
        )

    def test_weights_that_are_torn_are_refused(self, place: Path) -> None:
        self.save(BertForMaskedLM(self.config()))
        weights = Path("model/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        assert self.refusal().startswith("model.name_or_path: transformers cannot build this model: ")


# ------------------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"hidden_size: 32": "hidden_act: geluu"},
            "distlm: run.yaml:3: model.config.hidden_act = geluu: unknown activation; did you mean gelu?\n",
        ),
        (
            {"corpus.jsonl": "torn.jsonl"},
            "distlm: torn.jsonl:3: the line is not JSON (Expecting value, column 10); put one object on each line\n",
        ),
    ],
)
def test_what_preflight_refuses_is_said_as_clearly(place: Path, change: dict[str, str], expected: str) -> None:
    Path("torn.jsonl").write_text(GOOD_LINE * 2 + '{"text": oops}\n')
    Path("home").mkdir()
    text = CONFIG
    for old, new in change.items():
        text = text.replace(old, new)
    Path("run.yaml").write_text(text)
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "distlm.cli", "submit", "run.yaml"], capture_output=True, text=True, timeout=240,
        stdin=subprocess.DEVNULL, env=environ | {"HOME": str(place / "home")},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (ExitCode.BAD_INPUT, expected)
    assert "starting 2 workers" not in ended.stdout and "Traceback" not in ended.stdout
    (run,) = (RunFolder(path.parent.absolute()) for path in Path("runs").glob("*/run.yaml"))
    (attempt,) = run.attempts()
    assert not list(attempt.logs.glob("rank-*")) and not Path("runs/mlflow.db").exists()
    result = read_json(attempt.result_json)
    assert (result["state"], result["exit_code"], len(result["problems"])) == ("bad_input", 2, 1)
    assert not Path(read_json(attempt.handle_json)["temporary_root"]).exists()
    assert not list(Path("home").iterdir())
    assert yaml.safe_load(run.run_yaml.read_text())["training"]["max_steps"] == 20
