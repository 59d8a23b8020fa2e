"""Configs of fine-tuning: what contradicts itself is refused at its key, in words that say what to do."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from distlm.config.load import LoadedConfig, load_config
from distlm.config.metrics import METRICS
from distlm.config.resolve import LORA_KEYS, contradictions, has_adapter, problem_kind
from distlm.errors import InputError, Problem

TEXT = """\
task: {type: text-classification}
model: {name_or_path: base}
peft: {peft_type: lora}
data:
  train: [{source: files, paths: [train.csv]}]
training: {max_steps: 10, global_train_batch_size: 32}
"""
WORDS = TEXT.replace("text-classification", "token-classification")
ONE, SEVERAL, NUMBER = (
    "task.problem_type=single_label_classification",
    "task.problem_type=multi_label_classification",
    "task.problem_type=regression",
)


def load(folder: Path, text: str, *overrides: str, gpu_count: int | None = 0) -> LoadedConfig:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides), lambda config: contradictions(config, gpu_count=gpu_count))


def problems(folder: Path, text: str, *overrides: str, gpu_count: int | None = 0) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides, gpu_count=gpu_count)
    return list(caught.value.problems)


@pytest.mark.parametrize("text", [TEXT, WORDS])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["peft=null"],
        ["peft={peft_type: full}"],
        ["peft={adapter_name_or_path: run:last}"],
        ["peft={peft_type: LoRA, r: 4, target_modules: all-linear}"],
        ["peft={peft_type: adalora}"],
        ["training.eval_steps=2", "training.early_stopping_patience=2", "training.early_stopping_threshold=0.1"],
        ["task.labels=[a, b]", "task.class_weights={a: 2.0}"],
        ["task.class_weights=balanced", "task.label_smoothing_factor=0.1"],
        ["training.metric_for_best_model=f1"],
    ],
)
def test_valid_configs(tmp_path: Path, text: str, overrides: list[str]) -> None:
    config = load(tmp_path, text, *overrides).config
    assert has_adapter(config) is (overrides not in (["peft=null"], ["peft={peft_type: full}"]))
    assert problem_kind(config) == ("single_label_classification" if text is TEXT else "token-classification")
    patience = config.training.early_stopping_patience
    assert config.training.load_best_model_at_end is (patience is not None), "the best one is what was waited for"


QUANTIZED = "model.quantization={load_in_4bit: true}"


@pytest.mark.parametrize(
    ("text", "overrides", "key", "words"),
    [
        # The task and its metrics
        (TEXT, ["training.metric_for_best_model=f1macro"], "training.metric_for_best_model", "did you mean f1_macro?"),
        (TEXT, [NUMBER, "training.metric_for_best_model=f1"], "training.metric_for_best_model", "no metric of this"),
        (TEXT, [SEVERAL, "training.metric_for_best_model=f1"], "training.metric_for_best_model", "f1_micro"),
        (WORDS, ["training.metric_for_best_model=perplexity"], "training.metric_for_best_model", "no metric of this"),
        (TEXT, ["tokenizer.train={vocab_size: 1000}"], "tokenizer.train", "is for masked-lm only"),
        (TEXT, ["task.labels=[a, b, a]"], "task.labels", "names a label twice"),
        (TEXT, ["task.labels=[a]"], "task.labels", "nothing to tell apart"),
        (WORDS, ["task.labels=[O]"], "task.labels", "nothing to tell apart"),
        (TEXT, ["task.labels=[a, b]", "task.class_weights={aa: 1}"], "task.class_weights.aa", "did you mean a?"),
        (TEXT, ["task.label_separator=;"], "task.label_separator", "multi_label_classification only"),
        (TEXT, [NUMBER, "task.label_separator=;"], "task.label_separator", "multi_label_classification only"),
        (TEXT, [SEVERAL, "task.label_smoothing_factor=0.1"], "task.label_smoothing_factor", "single_label"),
        (TEXT, [NUMBER, "task.label_smoothing_factor=0.1"], "task.label_smoothing_factor", "single_label"),
        (TEXT, [NUMBER, "task.labels=[a, b]"], "task.labels", "a regression predicts a number"),
        (TEXT, [NUMBER, "task.class_weights=balanced"], "task.class_weights", "a regression predicts a number"),
        (TEXT, ["data.train.0.document_column=d"], "data.train.0.document_column", "only with task.context: document"),
        (WORDS, ["data.train.0.document_column=d"], "data.train.0.document_column", "only with task.context: document"),
        # Evaluations
        (TEXT, ["data.validation_fraction=0", "training.eval_steps=2"], "training.eval_steps", "nothing to evaluate"),
        (TEXT, ["training.early_stopping_patience=2"], "training.early_stopping_patience", "needs training.eval_steps"),
        (TEXT, ["training.early_stopping_threshold=0.1"], "training.early_stopping_threshold", "without training."),
        (
            TEXT,
            ["data.validation_fraction=0", "training.load_best_model_at_end=true"],
            "training.load_best_model_at_end",
            "nothing to evaluate",
        ),
        # Adapters
        (TEXT, ["peft={r: 8}"], "peft", "needs peft_type"),
        (TEXT, ["peft={}"], "peft", "needs peft_type"),
        (TEXT, ["peft={peft_type: full, r: 8}"], "peft.peft_type", "no other key has a meaning"),
        (TEXT, ["peft.lora_alfa=8"], "peft.lora_alfa", "did you mean lora_alpha?"),
        (TEXT, ["peft={peft_type: LORA, rank: 8}"], "peft.rank", "unknown key of PEFT's LoraConfig"),
        (TEXT, ["peft.task_type=SEQ_CLS"], "peft.task_type", "unknown key of PEFT's LoraConfig"),
        (TEXT, ["peft.runtime_config={}"], "peft.runtime_config", "unknown key of PEFT's LoraConfig"),
        (TEXT, [QUANTIZED, "peft=null"], "model.quantization", "give peft, too"),
        (TEXT, [QUANTIZED, "deepspeed.zero_stage=3"], "model.quantization", "deepspeed.zero_stage to 0, 1 or 2"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path: Path, text: str, overrides: list[str], key: str, words: str) -> None:
    found = problems(tmp_path, text, *overrides, gpu_count=8)
    assert [problem.key for problem in found] == [key], found
    assert words in found[0].message
    assert found[0].location


def test_what_needs_a_gpu(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, TEXT, QUANTIZED)
    assert found.key == "model.quantization" and "needs GPUs and bitsandbytes" in found.message
    (found,) = problems(tmp_path, TEXT, "peft.peft_type=adalora", "training.mixed_precision=fp16", gpu_count=1)
    assert found.key == "peft.peft_type" and "set training.mixed_precision to bf16" in found.message


def test_an_adapter_stands_beside_pretrained_weights(tmp_path: Path) -> None:
    tree = yaml.safe_load(TEXT)
    tree["model"] = {"config": {"model_type": "bert"}}
    tree["tokenizer"] = {"name_or_path": "base"}
    (found,) = problems(tmp_path, yaml.safe_dump(tree))
    assert found.key == "peft" and "give model.name_or_path, or leave peft out" in found.message
    load(tmp_path, yaml.safe_dump(tree), "peft=null")


def test_documents_are_looked_at_where_the_task_wants_them(tmp_path: Path) -> None:
    load(tmp_path, WORDS, "task.context=document", "data.train.0.document_column=d")
    masked_lm = WORDS.replace("token-classification", "masked-lm")
    (found,) = problems(tmp_path, masked_lm, "data.train.0.document_column=d")
    assert found.key == "data.train.0.document_column" and "which reads text alone" in found.message


def test_early_stopping_and_no_evaluation_is_one_problem(tmp_path: Path) -> None:
    found = problems(
        tmp_path, TEXT, "data.validation_fraction=0", "training.eval_steps=2", "training.early_stopping_patience=2"
    )
    assert {problem.key for problem in found} == {"training.eval_steps", "training.early_stopping_patience"}


def test_every_kind_of_task_can_choose_its_best_model(tmp_path: Path) -> None:
    for kind, metrics in METRICS.items():
        if kind == "masked-lm":
            continue
        text, overrides = (WORDS, []) if kind == "token-classification" else (TEXT, [f"task.problem_type={kind}"])
        for name in metrics:
            load(tmp_path, text, *overrides, f"training.metric_for_best_model={name}")


def test_the_keys_of_lora_are_those_of_peft() -> None:
    """All that are the user's; `adapter_config` says of the others whose they are."""
    from peft import LoraConfig

    from distlm.worker.adapter import _OURS

    of_peft = {field.name for field in fields(LoraConfig) if field.init}
    assert LORA_KEYS == (of_peft - _OURS.keys()) | {"peft_type", "adapter_name_or_path"}
