"""Adapters under DeepSpeed: every stage and number of ranks trains the same numbers, and what is saved is those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from ranks import run_on_ranks
from tiny_adapters import NUM_LABELS, engine_with_adapter, load_base, loss_of, train, write_base, write_init
from tiny_training import MICRO_BATCHES_PER_STEP, micro_batch, num_masked_tokens

from distlm.checkpoint.manifest import Progress
from distlm.checkpoint.store import CheckpointStore
from distlm.errors import CheckpointError
from distlm.worker.adalora import RankAllocation
from distlm.worker.adapter import InitialTensors, load_adapter
from distlm.worker.adapter_export import export_adapter, set_trained, verify_adapter
from distlm.worker.checkpoint import CheckpointSaver, load_checkpoint
from distlm.worker.zero_state import full_weights

STEPS = range(1, 6)
TOKEN_CLASSIFIER, SEQUENCE_CLASSIFIER = "TOKEN_CLS", "SEQ_CLS"
DORA = {"peft_type": "lora", "r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa", "use_dora": True}
TRAINED = {
    "lora": ({"peft_type": "lora", "r": 4, "target_modules": "all-linear"}, TOKEN_CLASSIFIER),
    "pissa-dora": (DORA, SEQUENCE_CLASSIFIER),
    "masked-lm": ({"peft_type": "lora", "r": 4, "target_modules": "all-linear"}, None),
    "prefix": ({"peft_type": "prefix-tuning", "num_virtual_tokens": 4}, SEQUENCE_CLASSIFIER),
    "deft": ({"peft_type": "deft"}, SEQUENCE_CLASSIFIER),  # reads the bias of a layer that it wraps
}


def as_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What can be sent to another process after this one has gone."""
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def train_all(root: Path, zero_stage: int) -> dict[str, Any]:
    """Losses of 5 steps, the names of what was trained, and its values, of every adapter in TRAINED."""
    found = {}
    for name, (_, task_type) in TRAINED.items():
        accelerator, engine = engine_with_adapter(root / name, task_type, zero_stage)
        initial = full_weights(engine)
        saved = dict(InitialTensors(root / name / "adapter"))
        for parameter, weight in initial.items():
            assert torch.equal(weight, saved[parameter]), f"{name}: {parameter} is not as it was drawn"
            assert weight.dtype == torch.float32
        losses = train(accelerator, engine, task_type, STEPS)
        found[name] = losses, as_arrays(full_weights(engine))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name, (peft, task_type) in TRAINED.items():
        write_base(folder / name / "original", task_type)
        write_init(folder / name, peft, task_type)
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """One rank at stage 0."""
    return run_on_ranks(train_all, 1, root, 0)[0]


@pytest.mark.parametrize(("zero_stage", "world_size"), [(0, 2), (2, 2), (3, 2)])
def test_every_stage_trains_an_adapter_the_same(
    root: Path, alone: dict[str, Any], zero_stage: int, world_size: int
) -> None:
    for found in run_on_ranks(train_all, world_size, root, zero_stage):
        for name, (losses, weights) in found.items():
            expected_losses, expected_weights = alone[name]
            assert losses == pytest.approx(expected_losses, abs=1e-5), name
            assert weights.keys() == expected_weights.keys()
            for parameter in weights:
                np.testing.assert_allclose(weights[parameter], expected_weights[parameter], rtol=0, atol=1e-4)


def test_every_weight_of_an_adapter_is_trained(root: Path, alone: dict[str, Any]) -> None:
    for name, (_, weights) in alone.items():
        initial = dict(InitialTensors(root / name / "adapter"))
        unchanged = [
            parameter
            for parameter, weight in weights.items()
            if torch.equal(torch.from_numpy(weight), initial[parameter])
        ]
        assert not unchanged, name


@pytest.mark.parametrize("peft_type", ["prompt-tuning", "p-tuning"])
def test_virtual_tokens_before_a_text_are_not_labelled(tmp_path: Path, peft_type: str) -> None:
    """PEFT gives logits [B, V + S, L]."""
    write_base(tmp_path / "original", TOKEN_CLASSIFIER)
    write_init(tmp_path, {"peft_type": peft_type, "num_virtual_tokens": 4}, TOKEN_CLASSIFIER)
    model = load_adapter(load_base(tmp_path / "model", TOKEN_CLASSIFIER), tmp_path / "adapter").eval()
    input_ids = torch.arange(5, 21).view(2, 8)
    found = model(input_ids=input_ids).logits
    model._forward_hooks.clear()
    of_peft = model(input_ids=input_ids).logits
    assert of_peft.shape == (2, 12, NUM_LABELS)
    assert torch.equal(found, of_peft[:, 4:])


def test_what_was_trained_is_exported(root: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    for name, (_, task_type) in TRAINED.items():
        weights = as_tensors(alone[name][1])
        model = load_adapter(load_base(root / name / "model", task_type), root / name / "adapter")
        set_trained(model, weights)
        (folder := tmp_path / name).mkdir()
        export_adapter(model, folder, "base", InitialTensors(root / name / "adapter"))
        verify_adapter(folder, weights)
        reloaded = PeftModel.from_pretrained(load_base(root / name / "original", task_type), folder)
        input_ids = torch.arange(5, 21).view(2, 8)
        torch.testing.assert_close(
            reloaded.eval()(input_ids=input_ids).logits, model.eval()(input_ids=input_ids).logits, rtol=0, atol=1e-5
        )
        with pytest.raises(CheckpointError, match="is not what was trained"):
            verify_adapter(folder, {parameter: weight + 1e-3 for parameter, weight in weights.items()})


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------

ADALORA = {"peft_type": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "lora_alpha": 16}  # 10 steps
CUT, LAST = 5, 10


def train_adalora(init: Path, zero_stage: int, checkpoints: Path | None = None) -> Any:
    """(losses, weights, state) of the whole run; with `checkpoints`, in two parts with a resume between them."""
    accelerator, engine = engine_with_adapter(init, SEQUENCE_CLASSIFIER, zero_stage)
    allocation = RankAllocation(engine)
    if checkpoints is None:
        losses = train(accelerator, engine, SEQUENCE_CLASSIFIER, range(1, LAST + 1))
        return losses, as_arrays(full_weights(engine)), as_arrays(allocation.state())
    losses = train(accelerator, engine, SEQUENCE_CLASSIFIER, range(1, CUT + 1))
    store = CheckpointStore(checkpoints)
    saver = CheckpointSaver(engine, store, seed=1, asynchronous=False)
    saver.save(CUT, Progress(sample_position=CUT, epoch=0))
    saver.wait()
    state = allocation.state()

    accelerator, engine = engine_with_adapter(init, SEQUENCE_CLASSIFIER, 3 - zero_stage)
    allocation = RankAllocation(engine)
    load_checkpoint(engine, store.checkpoints()[-1], seed=1)
    allocation.load_state(state)
    losses += train(accelerator, engine, SEQUENCE_CLASSIFIER, range(CUT + 1, LAST + 1))
    return losses, as_arrays(full_weights(engine)), as_arrays(allocation.state())


def plain_adalora(init: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """What PEFT does in plain PyTorch, with the loss and its penalty as its documentation has them."""
    from tiny_training import LEARNING_RATE, adamw

    model = load_adapter(load_base(init / "model", SEQUENCE_CLASSIFIER), init / "adapter")
    optimizer = adamw(model)
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE
    losses = []
    for step in range(1, LAST + 1):
        batches = [micro_batch(step, index) for index in range(MICRO_BATCHES_PER_STEP)]
        loss = sum(loss_of(SEQUENCE_CLASSIFIER)(model, *batch) for batch in batches) / num_masked_tokens(batches)
        losses.append(float(loss))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name]
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return losses, as_arrays({name: p for name, p in model.named_parameters() if p.requires_grad})


@pytest.fixture(scope="module")
def adalora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adalora")
    write_base(folder / "model", SEQUENCE_CLASSIFIER)
    return write_init(folder, ADALORA, SEQUENCE_CLASSIFIER)


@pytest.fixture(scope="module")
def adalora_alone(adalora: Path) -> Any:
    return run_on_ranks(train_adalora, 1, adalora, 0)[0]


def kept_ranks(weights: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: int(np.count_nonzero(weight)) for name, weight in weights.items() if "lora_E" in name}


def test_adalora_reduces_ranks_as_peft_does(adalora: Path, adalora_alone: Any) -> None:
    losses, weights, _ = adalora_alone
    expected_losses, expected_weights = run_on_ranks(plain_adalora, 1, adalora)[0]
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert sum(kept_ranks(weights).values()) == 2 * 4  # target_r for each of query and value in two layers
    assert kept_ranks(weights) == kept_ranks(expected_weights)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_adalora_is_the_same_at_every_stage(adalora: Path, adalora_alone: Any, zero_stage: int) -> None:
    expected_losses, expected_weights, expected_state = adalora_alone
    for losses, weights, state in run_on_ranks(train_adalora, 2, adalora, zero_stage):
        assert losses == pytest.approx(expected_losses, abs=1e-5)
        assert kept_ranks(weights) == kept_ranks(expected_weights)
        assert state.keys() == expected_state.keys()


def test_adalora_goes_on_after_a_resume_as_if_there_had_been_none(
    adalora: Path, adalora_alone: Any, tmp_path: Path
) -> None:
    losses, weights, _ = run_on_ranks(train_adalora, 2, adalora, 1, tmp_path)[0]
    assert losses == pytest.approx(adalora_alone[0], abs=1e-5)
    assert kept_ranks(weights) == kept_ranks(adalora_alone[1])


def test_adalora_keeps_its_factors_orthogonal(adalora: Path) -> None:
    """The gradient of the penalty, against autograd."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    model = load_adapter(load_base(adalora / "model", SEQUENCE_CLASSIFIER), adalora / "adapter")
    input_ids = torch.arange(5, 13).view(1, 8)
    (model(input_ids=input_ids).logits * 0).sum().backward()
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    factors = [rows for layer in layers for rows in (layer.lora_A["default"], layer.lora_B["default"])]
    found = [factor.grad.clone() for factor in factors]
    model.zero_grad()
    penalty = sum(
        torch.norm((f @ f.T if f.shape[0] < f.shape[1] else f.T @ f) - torch.eye(min(f.shape))) for f in factors
    )
    (0.5 * penalty / len(factors)).backward()
    assert len(factors) == 8
    for factor, gradient in zip(factors, found, strict=True):
        torch.testing.assert_close(gradient, factor.grad)
