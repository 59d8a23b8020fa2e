"""The encoders that people pretrain, from scratch and pretrained, at ZeRO stages 2 and 3 on two workers; and the
prediction head at the masked positions alone, against the head at all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny_runs import Base, Finished, make_base, train_all

from distlm.tasks import Batch
from distlm.tasks.masked_lm import IGNORED, MaskedLM
from distlm.worker.prepare import forward_flops

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {**SMALL, "max_position_embeddings": 32},
    "roberta": {**SMALL, "max_position_embeddings": 40},
    "modernbert": {
        **SMALL,
        "local_attention": 8,
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_dropout": 0.1,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 32},
    "deberta-v2": {**SMALL, "max_position_embeddings": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 40},
}
STAGES = (2, 3)
STEPS = 3


def model_section(model_type: str) -> dict[str, Any]:
    return {"config": {"model_type": model_type, **ARCHITECTURES[model_type]}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """From scratch, and ("bert, pretrained") from a folder that holds the same weights as a pretrained model."""
    bases = {}
    for model_type in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(model_type)
        scratch = bases[model_type] = make_base(folder / "scratch", model_section(model_type))
        shutil.copytree(scratch.run.init / "model", folder / "model")
        shutil.copytree(scratch.run.init / "tokenizer", folder / "model", dirs_exist_ok=True)
        section = {"name_or_path": str(folder / "model")}
        bases[f"{model_type}, pretrained"] = make_base(folder / "pretrained", section)
    return bases


@pytest.fixture(scope="module")
def trained(bases: dict[str, Base]) -> dict[str, Finished]:
    trainings = {
        f"{name} {stage}": base.training(
            f"stage-{stage}", f"deepspeed.zero_stage={stage}", f"training.max_steps={STEPS}", "training.warmup_steps=0"
        )
        for name, base in bases.items()
        for stage in STAGES
    }
    return train_all(2, trainings)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_trains_as_a_plain_loop_does(
    bases: dict[str, Base], trained: dict[str, Finished], model_type: str
) -> None:
    plain, _ = bases[model_type].plain(f"training.max_steps={STEPS}", "training.warmup_steps=0")
    assert plain.losses[-1] < plain.losses[0]
    for stage in STAGES:
        losses = trained[f"{model_type} {stage}"].losses(1, STEPS)
        assert losses == pytest.approx(plain.losses, rel=1e-5), f"stage {stage}"
        assert trained[f"{model_type}, pretrained {stage}"].losses(1, STEPS) == losses


def test_the_vocabulary_of_a_model_from_scratch_is_padded(bases: dict[str, Base]) -> None:
    base = bases["bert"]
    vocab_size = json.loads((base.run.init / "model" / "config.json").read_text())["vocab_size"]
    assert (base.prepared.vocab_size, vocab_size) == (191, 192)


# --- the head --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    loss: float
    correct: int
    gradients: dict[str, torch.Tensor]


def batch_of(rank: int) -> Batch:
    """Two samples; rank 1 has nothing to predict. Rank 0 has padding."""
    torch.manual_seed(rank)
    input_ids = torch.randint(5, 190, (2, 32))
    labels = torch.where(torch.rand(2, 32) < 0.3, input_ids, IGNORED)
    attention_mask = torch.ones_like(input_ids)
    if rank == 0:
        attention_mask[1, 20:] = 0
        labels[1, 20:] = IGNORED
    else:
        labels.fill_(IGNORED)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def losses_and_gradients(base: Base, model_type: str, stage: int, masked_only: bool) -> Gradients:
    """Loss and right predictions of this rank, and gradients over both. Collective."""
    from accelerate.state import AcceleratorState
    from deepspeed.utils import safe_get_full_grad

    from distlm.worker.engine import EngineSettings, build_optimizer, make_accelerator, parameter_groups, prepare
    from distlm.worker.model import load_model

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(EngineSettings(stage))
    model = load_model(base.run.init / "model", None)
    task = MaskedLM(base.config(f"task.masked_only_head={masked_only}".lower()).task, 0, base.prepared)
    task.attach(model)
    engine = prepare(accelerator, model, build_optimizer(parameter_groups(model, 0.0), learning_rate=0.0))
    engine.eval()  # no dropout
    batch, cpu = batch_of(torch.distributed.get_rank()), torch.device("cpu")
    with torch.no_grad():
        _, correct = task.loss(engine, batch, cpu)
    loss, _ = task.loss(engine, batch, cpu)
    engine.backward(loss)
    gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in engine.module.named_parameters()}
    return Gradients(loss.item(), int(correct), gradients)


def heads_on_rank(bases: Mapping[str, Base], stage: int) -> dict[str, tuple[float, float, list[str]]]:
    """By architecture: this rank's loss with each kind of head, and what differs between the two."""
    results = {}
    for model_type, base in bases.items():
        masked, full = (losses_and_gradients(base, model_type, stage, masked_only) for masked_only in (True, False))
        different = [] if masked.correct == full.correct else ["right predictions"]
        for name, gradient in full.gradients.items():
            tolerance = 1e-5 * float(gradient.abs().max())
            if not torch.allclose(masked.gradients[name], gradient, rtol=1e-4, atol=tolerance):
                different.append(name)
        if sum(bool(gradient.any()) for gradient in full.gradients.values()) <= len(full.gradients) / 2:
            different.append("most gradients are zero")
        results[model_type] = (masked.loss, full.loss, different)
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_masked_positions_alone_give_the_loss_and_the_gradients_of_the_full_head(
    bases: dict[str, Base], stage: int
) -> None:
    from_scratch = {name: bases[name] for name in ARCHITECTURES}
    assert all(base.prepared.masked_only_head for base in from_scratch.values())
    on_rank_0, on_rank_1 = run_on_ranks(heads_on_rank, 2, from_scratch, stage)
    for name in ARCHITECTURES:
        masked_loss, full_loss, different = on_rank_0[name]
        assert masked_loss == pytest.approx(full_loss, rel=1e-6) and masked_loss > 0
        assert on_rank_1[name][:2] == (0.0, 0.0)
        assert not different, name


def test_a_model_without_output_embeddings_computes_the_whole_head(bases: dict[str, Base]) -> None:
    from transformers import PerceiverConfig

    small = {"d_model": 32, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1, "qk_channels": 16}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    perceiver = PerceiverConfig(**small, **heads, v_channels=32, max_position_embeddings=32, vocab_size=191)
    flops, masked_only_head = forward_flops(bases["bert"].config(), perceiver, 32)
    assert not masked_only_head and flops > 2 * 32 * 32 * 191


def test_a_compiled_encoder_trains_the_same(tmp_path: Path) -> None:
    config = {**ARCHITECTURES["bert"], "num_hidden_layers": 1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = make_base(tmp_path, {"config": {"model_type": "bert", **config, **dropout}})
    steps = ("training.max_steps=3", "training.warmup_steps=0", "resources.num_workers=1", "training.eval_steps=null")
    compiled = base.training("compiled", *steps, "training.torch_compile=true")
    finished = train_all(1, {"plain": base.training("plain", *steps), "compiled": compiled})
    assert finished["compiled"].losses(1, 3) == pytest.approx(finished["plain"].losses(1, 3), rel=1e-5)
    assert finished["compiled"].weights(3).keys() == finished["plain"].weights(3).keys()
    first_step_s = [finished[name].curve("time/step_s")[1] for name in ("plain", "compiled")]
    assert first_step_s[1] > 2 * first_step_s[0], "it was compiled"
