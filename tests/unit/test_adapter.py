"""Adapters in one process: what the config's `peft` may say, what is drawn, and what an exported one gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))
from tiny_adapters import draw, load_base, write_base, write_init

from distlm.config.load import load_tree
from distlm.controller.preflight import check_quantization
from distlm.errors import CheckpointError, InputError
from distlm.worker.adapter import (
    InitialTensors,
    adapter_config,
    adapter_folder,
    draw_adapter,
    earlier_config,
    head_modules,
    load_adapter,
    peft_type_of,
    rehearse,
    save_initial,
)
from distlm.worker.adapter_export import ADAPTER_WEIGHTS_NAME, export_adapter, merge, set_trained, verify_adapter

CLASSIFIER = ["classifier"]


def config(**peft: Any) -> Any:
    return adapter_config(peft, "SEQ_CLS", CLASSIFIER, head_is_new=True, total_steps=100)


def problems(error: pytest.ExceptionInfo[InputError]) -> dict[str, str]:
    return {problem.key: problem.message for problem in error.value.problems}


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [("lora", "LORA"), ("LoRA", "LORA"), ("prefix-tuning", "PREFIX_TUNING"), ("p-tuning", "P_TUNING"), ("full", None)],
)
def test_a_method_is_meant_in_any_spelling(written: str, meant: str | None) -> None:
    assert peft_type_of({"peft_type": written}) == meant


def test_unknown_methods_and_keys_tell_the_nearest_one() -> None:
    with pytest.raises(InputError, match="did you mean lora"):
        config(peft_type="lorra")
    with pytest.raises(InputError) as error:
        config(peft_type="lora", lora_alfa=8, rank=2, inference_mode=True, task_type="SEQ_CLS")
    assert "lora_alpha" in problems(error)["peft.lora_alfa"]
    assert problems(error).keys() == {"peft.lora_alfa", "peft.rank", "peft.inference_mode", "peft.task_type"}
    with pytest.raises(InputError) as error:
        peft_type_of({"peft_type": "full", "r": 8})
    assert problems(error).keys() == {"peft.r"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "sixteen"),
        ("lora_dropout", [0.1]),
        ("use_dora", "yes"),
        ("target_modules", 3),
        ("init_lora_weights", "piza"),
        ("init_lora_weights", "eva"),
        ("use_qalora", [True]),
    ],
)
def test_a_value_of_another_type_is_refused_at_its_key(key: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        config(peft_type="lora", **{key: value})
    assert problems(error).keys() == {f"peft.{key}"}


def test_values_that_peft_takes_are_taken() -> None:
    made = config(peft_type="lora", r=4, lora_alpha=8, target_modules=["query"], init_lora_weights="pissa_niter_4")
    assert (made.r, made.target_modules, made.modules_to_save) == (4, {"query"}, CLASSIFIER)
    assert (
        config(peft_type="prompt-tuning", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB").num_virtual_tokens
        == 4
    )


def test_adalora_follows_the_steps_of_the_run() -> None:
    made = config(peft_type="adalora")
    assert (made.tinit, made.tfinal, made.total_step) == (10, 30, 100)
    with pytest.raises(InputError, match="leave none of the 100 steps"):
        config(peft_type="adalora", tinit=70)
    with pytest.raises(InputError, match="smaller than init_r"):
        config(peft_type="adalora", target_r=12)
    with pytest.raises(InputError, match="follows training"):
        config(peft_type="adalora", total_step=5)


def test_what_cannot_train_a_task_is_refused() -> None:
    with pytest.raises(InputError, match="trainable_token_indices"):
        config(peft_type="trainable_tokens", token_indices=[1])
    with pytest.raises(InputError, match="num_virtual_tokens: is missing"):
        config(peft_type="prefix-tuning")
    with pytest.raises(InputError, match="masked-LM has a logit for each"):
        adapter_config({"peft_type": "p-tuning", "num_virtual_tokens": 4}, None, [], head_is_new=False, total_steps=9)


def test_a_base_in_few_bits_needs_gpus_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_tree(
        {
            "model": {"name_or_path": "bert-base-uncased", "quantization": {"load_in_4bit": True}},
            "peft": {"peft_type": "lora"},
            "data": {"train": [{"source": "python-docs"}]},
            "training": {"max_steps": 1},
        }
    ).config
    with pytest.raises(InputError, match="needs GPUs"):
        check_quantization(run, "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where it is not installed
    with pytest.raises(InputError, match="needs the package bitsandbytes"):
        check_quantization(run, "cuda")


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", None])
@pytest.mark.parametrize("peft_type", ["lora", "vera"])  # the latter has no exclude_modules
def test_all_linear_leaves_the_head_alone(tmp_path: Path, task_type: Any, peft_type: str) -> None:
    write_base(tmp_path / "model", task_type)
    adapter = draw(tmp_path, {"peft_type": peft_type, "target_modules": "all-linear"}, task_type)
    trainable = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
    prefix = f"base_model.model.{'cls' if task_type is None else 'classifier'}."
    head = {name for name in trainable if name.startswith(prefix)}
    assert head == ({f"{prefix}modules_to_save.default.{part}" for part in ("weight", "bias")} if task_type else set())
    adapted = {name.split(f".{peft_type}_")[0] for name in trainable - head}
    assert len(adapted) == (12 if task_type in ("TOKEN_CLS", None) else 13)  # 6 of each layer, and the pooler


def test_the_seed_alone_decides_over_the_weights(tmp_path: Path) -> None:
    write_base(tmp_path / "model", "SEQ_CLS")
    first, again, other = (draw(tmp_path, {"peft_type": "lora"}, "SEQ_CLS", seed).tensors for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_new_head_of_a_masked_lm_is_trained_but_for_its_tied_decoder(tmp_path: Path) -> None:
    model = load_base(write_base(tmp_path / "model", None), None)
    names = head_modules(model, ["cls"])
    assert names == ["cls.predictions.transform"]
    made = adapter_config({"peft_type": "lora"}, None, names, head_is_new=True, total_steps=9)
    adapter = draw_adapter(model, made, 1, ["cls"])
    rehearse(adapter.model, 16)
    trained = {name for name, p in adapter.model.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.split("modules_to_save.default.")[1] for name in trained} == {
        "dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias",
    }  # fmt: skip
    untied = AutoModelForMaskedLM.from_config(
        BertConfig(vocab_size=50, hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8,
                   tie_word_embeddings=False)
    )  # fmt: skip
    assert head_modules(untied, ["cls"]) == ["cls"]


# --- the rehearsal ---------------------------------------------------------------------------------------------------


def test_virtual_tokens_need_positions_of_their_own(tmp_path: Path) -> None:
    write_base(tmp_path / "model", "SEQ_CLS", num_positions=16)
    with pytest.raises(InputError, match="are more than its 16 positions"):
        draw(tmp_path, {"peft_type": "prompt-tuning", "num_virtual_tokens": 4}, "SEQ_CLS")


def test_a_method_that_the_model_does_not_run_is_refused_by_name(tmp_path: Path) -> None:
    write_base(tmp_path / "model", "SEQ_CLS")
    for peft, words in [
        ({"peft_type": "poly"}, "task_ids should not be None"),
        ({"peft_type": "lora", "target_modules": ["no_such_layer"]}, "No modules were targeted"),
        ({"peft_type": "c3a", "block_size": 7}, "block size"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            draw(tmp_path, peft, "SEQ_CLS")
        assert problems(error).keys() == {"peft.peft_type"}


def test_weights_that_nothing_uses_or_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "model", "SEQ_CLS")
    model = draw(tmp_path, {"peft_type": "lora"}, "SEQ_CLS").model
    model.register_parameter("forgotten", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(InputError, match="are not used, such as forgotten"):
        rehearse(model, 16)
    model = draw(tmp_path, {"peft_type": "lora"}, "SEQ_CLS").model
    next(p for name, p in model.named_parameters() if "lora_A" in name).data.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite"):
        rehearse(model, 16)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter to train"):
        rehearse(model, 16)


# --- files -----------------------------------------------------------------------------------------------------------


def trained(init: Path, task_type: str | None) -> tuple[Any, dict[str, torch.Tensor]]:
    """The adapter of init/ with weights as after some training."""
    model = load_adapter(load_base(init / "model", task_type), init / "adapter")
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    set_trained(model, tensors)
    return model.eval(), tensors


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 21).view(2, 8)).logits[:, -8:]


EXPORTED = [
    {"peft_type": "lora"},
    {"peft_type": "lora", "target_modules": "all-linear", "init_lora_weights": "pissa"},
    {"peft_type": "lora", "target_modules": "all-linear", "init_lora_weights": "olora", "use_dora": True},
    {"peft_type": "lora", "init_lora_weights": "pissa", "use_rslora": True},
    {"peft_type": "adalora"},
    {"peft_type": "ia3"},
    {"peft_type": "vera"},
    {"peft_type": "prefix-tuning", "num_virtual_tokens": 4, "prefix_projection": True},
    {"peft_type": "p-tuning", "num_virtual_tokens": 4},
    {"peft_type": "vblora", "vector_length": 16, "num_vectors": 32},
]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("peft", EXPORTED, ids=lambda peft: "-".join(map(str, peft.values())))
def test_an_exported_adapter_predicts_the_same_with_the_original_model(
    tmp_path: Path, peft: dict[str, Any], task_type: str
) -> None:
    original = load_base(write_base(tmp_path / "original", task_type), task_type)
    init = write_init(tmp_path / "init", peft, task_type)
    model, tensors = trained(init, task_type)
    before = logits(model)
    (folder := tmp_path / "adapter").mkdir()
    export_adapter(model, folder, "org/base", InitialTensors(init / "adapter"))
    verify_adapter(folder, tensors)
    reloaded = PeftModel.from_pretrained(original, folder)
    torch.testing.assert_close(logits(reloaded), before, rtol=0, atol=1e-5)
    assert reloaded.peft_config["default"].base_model_name_or_path == "org/base"
    if "num_virtual_tokens" in peft:
        with pytest.raises(InputError, match="cannot be merged"):
            merge(model)
    else:
        merged = merge(model)
        torch.testing.assert_close(logits(merged), before, rtol=0, atol=1e-4)
        assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({name: torch.zeros_like(tensors[name])}), "is zero"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1]}), "has the shape"),
        (lambda tensors, name: tensors.update({name: tensors[name].bfloat16()}), "is torch.bfloat16"),
        (lambda tensors, name: tensors.update({name: tensors[name] + 1e-3}), "differs by up to 0.001"),
        (lambda tensors, name: tensors.clear(), "10 of 10 differ"),
    ],
)
def test_a_saved_adapter_that_is_not_the_trained_one_is_found(tmp_path: Path, damage: Any, words: str) -> None:
    init = write_init(tmp_path / "init", {"peft_type": "lora"}, "SEQ_CLS")
    model, live = trained(init, "SEQ_CLS")
    export_adapter(model, tmp_path, "base", InitialTensors(init / "adapter"))
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS_NAME)
    damage(tensors, next(name for name in tensors if "lora_A" in name))
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=words):
        verify_adapter(tmp_path, live)


def test_init_of_another_model_or_torn_is_refused(tmp_path: Path) -> None:
    init = write_init(tmp_path / "init", {"peft_type": "lora"}, "SEQ_CLS")
    path = init / "adapter" / "adapter.safetensors"
    tensors, metadata = load_file(path), {"seed": "3", "changed_base": "false"}
    name = next(iter(tensors))
    save_file({name: tensors.pop(name)[:1], **tensors}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"in it and \[.*\] torch.float32 in the model"):
        load_adapter(load_base(init / "model", "SEQ_CLS"), init / "adapter")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"only the model has {name}"):
        load_adapter(load_base(init / "model", "SEQ_CLS"), init / "adapter")
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(load_base(init / "model", "SEQ_CLS"), init / "adapter")


def test_an_earlier_adapter_is_trained_further(tmp_path: Path) -> None:
    init = write_init(tmp_path / "init", {"peft_type": "lora", "r": 4, "target_modules": "all-linear"}, "SEQ_CLS")
    model, tensors = trained(init, "SEQ_CLS")
    before = logits(model)
    (folder := tmp_path / "earlier").mkdir()
    export_adapter(model, folder, "base", InitialTensors(init / "adapter"))
    found, method = adapter_folder(str(folder))
    assert (found, peft_type_of({"peft_type": method})) == (folder, "LORA")  # the config need not name it

    assert adapter_folder(str(folder)) == (folder, "LORA"), "the method need not be told again"
    settings = {"peft_type": "lora", "r": 4, "target_modules": "all-linear"}
    earlier = earlier_config(folder, settings, config(**settings))
    adapter = draw_adapter(load_base(init / "model", "SEQ_CLS"), earlier, 9, CLASSIFIER, source=folder)
    rehearse(adapter.model, 16)
    assert torch.equal(logits(adapter.model), before)
    save_initial(adapter, tmp_path / "next")
    again = load_adapter(load_base(init / "model", "SEQ_CLS"), tmp_path / "next" / "adapter")
    assert torch.equal(logits(again), before)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == tensors.keys()

    with pytest.raises(InputError) as error:
        earlier_config(folder, settings | {"r": 8, "lora_alpha": 3}, config(**settings | {"r": 8, "lora_alpha": 3}))
    assert problems(error).keys() == {"peft.r", "peft.lora_alpha"}
    with pytest.raises(InputError, match="the run asks for ia3"):
        earlier_config(folder, {"peft_type": "ia3"}, config(peft_type="ia3"))
    with pytest.raises(InputError, match="is no PEFT adapter"):
        earlier_config(tmp_path / "nothing", settings, config(**settings))
    (folder / ADAPTER_WEIGHTS_NAME).unlink()
    save_file({"other": torch.ones(1)}, folder / ADAPTER_WEIGHTS_NAME)
    with pytest.raises(InputError):
        draw_adapter(load_base(init / "model", "SEQ_CLS"), earlier, 9, CLASSIFIER, source=folder)


@pytest.mark.parametrize("peft_type", ["prompt-tuning", "p-tuning"])
def test_virtual_tokens_are_trained_further_where_peft_has_saved_them_whole(tmp_path: Path, peft_type: str) -> None:
    settings = {"peft_type": peft_type, "num_virtual_tokens": 4}
    init = write_init(tmp_path / "init", settings, "SEQ_CLS")
    model, _ = trained(init, "SEQ_CLS")
    before = logits(model)
    export_adapter(model, tmp_path, "base", InitialTensors(init / "adapter"))
    earlier = earlier_config(tmp_path, settings, config(**settings))
    base = load_base(init / "model", "SEQ_CLS")
    if peft_type == "p-tuning":
        with pytest.raises(InputError, match="cannot be trained further"):
            draw_adapter(base, earlier, 9, CLASSIFIER, source=tmp_path)
    else:
        adapter = draw_adapter(base, earlier, 9, CLASSIFIER, source=tmp_path)
        rehearse(adapter.model, 16)
        assert torch.equal(logits(adapter.model), before)


def test_no_method_changes_the_compilers_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "my-compiler")
    write_base(tmp_path / "model", "SEQ_CLS")
    draw(tmp_path, {"peft_type": "boft"}, "SEQ_CLS")
    assert "CC" not in os.environ and os.environ["CXX"] == "my-compiler", "torch.compile needs them"
