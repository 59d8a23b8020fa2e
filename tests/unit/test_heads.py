"""Pretrained models with heads of their own, none, or for other labels: what is kept and what is drawn anew; and the
preparation of a run that trains one, twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForTokenClassification,
)

from distlm.config.load import load_tree
from distlm.config.resolve import contradictions
from distlm.config.schema import RunConfig
from distlm.data import labelled, letter_case
from distlm.errors import InputError
from distlm.run_folder import RunFolder
from distlm.worker.model import (
    Head,
    build_model_config,
    head_names,
    initial_model,
    labels_of,
    load_model,
    pretrained_config,
    save_initial_model,
)
from distlm.worker.prepare import prepare_run

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 32}  # fmt: skip
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##x"]
IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": 2, "sep_token_id": 3}
LABELS = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}


def write(folder: Path, model_class: type[PreTrainedModel], config_class: Any = BertConfig, **config: Any) -> Path:
    torch.manual_seed(1)
    model = model_class(config_class(vocab_size=len(VOCABULARY), **{**TINY, **config}))
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is 0, as a fresh bias would be
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def run_config(base: Path, task: dict[str, Any], **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(base)},
        "data": {"train": [{"source": "files", "paths": ["none.csv"]}], "max_seq_length": 16},
        "training": {"max_steps": 2, "global_train_batch_size": 8},
        "resources": {"device": "cpu"},
    }
    return load_tree({**tree, **sections}).config


TEXT, WORDS = {"type": "text-classification"}, {"type": "token-classification"}


def begun(base: Path, task: dict[str, Any], labels: Sequence[str], seed: int = 42) -> tuple[Any, list[str]]:
    config = run_config(base, task, seed=seed)
    is_text = task["type"] == "text-classification"
    head = Head(labels, task.get("problem_type", "single_label_classification") if is_text else None)
    return initial_model(config, build_model_config(config, len(VOCABULARY), IDS, head))


def kept(model: Any, base: Path, model_class: type[PreTrainedModel]) -> set[str]:
    """Weights that are those of the pretrained model."""
    before = dict(model_class.from_pretrained(base, dtype=torch.float32).named_parameters())
    return {
        name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])
    }  # fmt: skip


# --- labels_of -------------------------------------------------------------------------------------------------------


def test_the_labels_that_a_model_knows(tmp_path: Path) -> None:
    many = {"id2label": {i: f"l{i}" for i in range(12)}, "label2id": {f"l{i}": i for i in range(12)}}
    folders = {
        "named": write(tmp_path / "named", BertForSequenceClassification, **LABELS),
        "many": write(tmp_path / "many", BertForTokenClassification, **many),
        "unnamed": write(tmp_path / "unnamed", BertForSequenceClassification, num_labels=3),
        "masked": write(tmp_path / "masked", BertForMaskedLM, **LABELS),
    }

    def known(name: str, task: str) -> list[str]:
        return labels_of(pretrained_config(str(folders[name]), task), task)

    assert known("named", "text-classification") == ["no", "yes"]
    assert known("named", "token-classification") == [], "of another task"
    assert known("many", "token-classification") == [f"l{i}" for i in range(12)], "l10 after l9"
    assert known("unnamed", "text-classification") == [], "LABEL_0 is no name"
    assert known("masked", "text-classification") == []
    assert known("named", "masked-lm") == []


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_head_for_the_same_labels_is_kept(tmp_path: Path) -> None:
    base = write(tmp_path, BertForSequenceClassification, **LABELS)
    model, drawn = begun(base, TEXT, ["no", "yes"])
    assert drawn == []
    assert kept(model, base, BertForSequenceClassification) == {name for name, _ in model.named_parameters()}
    assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("labels", [["yes", "no"], ["no", "maybe"], ["no", "yes", "maybe"]])
def test_a_head_for_other_labels_is_drawn_anew(tmp_path: Path, labels: list[str]) -> None:
    base = write(tmp_path, BertForSequenceClassification, **LABELS)
    model, drawn = begun(base, TEXT, labels)
    assert drawn == ["classifier.bias", "classifier.weight"]
    assert head_names(model, drawn) == ["classifier"]
    everything = {name for name, _ in model.named_parameters()}
    assert kept(model, base, BertForSequenceClassification) == everything - set(drawn)
    assert model.classifier.weight.shape == (len(labels), 16)
    assert not model.classifier.bias.any() and 0.005 < float(model.classifier.weight.std()) < 0.05, "as BERT draws it"
    again, _ = begun(base, TEXT, labels)
    other, _ = begun(base, TEXT, labels, seed=43)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    assert [model.config.id2label[i] for i in range(len(labels))] == labels
    assert model.config.num_labels == len(labels)


def test_a_masked_lm_gets_a_head_and_a_pooler(tmp_path: Path) -> None:
    base = write(tmp_path, BertForMaskedLM)
    model, drawn = begun(base, TEXT, ["a", "b"])
    assert set(drawn) == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert head_names(model, drawn) == ["classifier", "bert.pooler"]
    words, drawn = begun(base, WORDS, ["a", "b", "c"])
    assert drawn == ["classifier.bias", "classifier.weight"] and head_names(words, drawn) == ["classifier"]


def test_the_head_of_a_regression_gives_one_number(tmp_path: Path) -> None:
    task = {**TEXT, "problem_type": "regression"}
    base = write(tmp_path / "classifier", BertForSequenceClassification, **LABELS)
    model, drawn = begun(base, task, [])
    assert drawn == ["classifier.bias", "classifier.weight"] and model.classifier.weight.shape == (1, 16)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    numbers = write(tmp_path / "numbers", BertForSequenceClassification, num_labels=1, problem_type="regression")
    assert begun(numbers, task, [])[1] == []


# --- token types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_token_type_for_each_class_of_words(tmp_path: Path, family: str) -> None:
    if family == "bert":
        base = write(tmp_path, BertForTokenClassification, **LABELS)
    else:
        base = write(
            tmp_path, RobertaForTokenClassification, RobertaConfig, type_vocab_size=1, pad_token_id=0, **LABELS
        )
    model, drawn = begun(base, {**WORDS, "case_feature": True}, ["no", "yes"])
    name = f"{family}.embeddings.token_type_embeddings"
    assert drawn == [f"{name}.weight"] and head_names(model, drawn) == ["classifier", name]
    table = model.get_submodule(name).weight
    before = pretrained(base).get_submodule(name).weight
    assert table.shape == (letter_case.NUM_TOKEN_TYPES, 16) == (model.config.type_vocab_size, 16)
    assert torch.equal(table[0], before[0])
    distances = (table[1:] - before[0]).norm(dim=1)
    assert 0 < float(distances.min()) and float(distances.max()) < 0.2, "near the one that all tokens have had"
    assert len(torch.unique(table, dim=0)) == len(table)
    saved = tmp_path / "saved"
    save_initial_model(model, saved)
    again = load_model(saved, None, task="token-classification")
    assert torch.equal(again.get_submodule(name).weight, table)
    types = torch.full((1, 4), letter_case.NUM_TOKEN_TYPES - 1)
    assert torch.isfinite(again(input_ids=torch.tensor([[2, 5, 6, 3]]), token_type_ids=types).logits).all()
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (saved / file).write_bytes((base / file).read_bytes())
    model, drawn = begun(saved, {**WORDS, "case_feature": True}, ["no", "yes"])
    assert drawn == [], "it has them already"
    assert torch.equal(model.get_submodule(name).weight, table)


def pretrained(base: Path) -> Any:
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(base, dtype=torch.float32)


def test_a_model_without_token_types_is_refused(tmp_path: Path) -> None:
    tiny = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    base = write(tmp_path, DistilBertForTokenClassification, DistilBertConfig, **tiny)
    with pytest.raises(InputError) as error:
        begun(base, {**WORDS, "case_feature": True}, ["no", "yes"])
    assert error.value.problems[0].key == "task.case_feature" and "has no token types" in str(error.value)


# --- preparing twice -------------------------------------------------------------------------------------------------


def prepared_twice(tmp_path: Path, change: Callable[[dict[str, Any]], None] = lambda tree: None) -> tuple[Any, Any]:
    base = write(tmp_path / "base", BertForMaskedLM)
    (tmp_path / "train.csv").write_text("text,label\n" + "good film,yes\nbad film,no\n" * 8)
    tree: dict[str, Any] = {
        "task": TEXT,
        "model": {"name_or_path": str(base)},
        "peft": {"peft_type": "lora", "r": 2},
        "data": {
            "train": [{"source": "files", "paths": [str(tmp_path / "train.csv")]}],
            "validation_fraction": 0.0,
            "max_seq_length": 16,
        },
        "training": {"max_steps": 2, "global_train_batch_size": 8},
        "resources": {"device": "cpu"},
    }
    run = RunFolder.create(tmp_path / "runs", "run")
    first = prepare_run(load_tree(copy.deepcopy(tree), check=contradictions).config, run)
    change(tree)
    return first, prepare_run(load_tree(tree, check=contradictions).config, run)


def test_a_run_with_labels_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume prepares it again, and finds what is there. Its samples have a format of their own."""
    monkeypatch.setattr(labelled, "FORMAT_VERSION", 7)
    first, again = prepared_twice(tmp_path)
    assert again == replace(first, data_was_cached=True)
    assert first.labels == ["no", "yes"] and first.num_labels == 2
    assert 0 < first.num_trainable_parameters < first.num_parameters
    assert set(first.drawn_weights) == {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias",
    }  # fmt: skip
    assert first.base_name_or_path == str(tmp_path / "base")


def test_a_run_does_not_go_on_with_other_labels(tmp_path: Path) -> None:
    def swap(tree: dict[str, Any]) -> None:
        path = tmp_path / "train.csv"
        path.write_text(path.read_text().replace(",yes", ",maybe"))

    with pytest.raises(InputError, match="is not what this run began with") as error:
        prepared_twice(tmp_path, swap)
    assert [problem.key for problem in error.value.problems] == ["data.train"]
