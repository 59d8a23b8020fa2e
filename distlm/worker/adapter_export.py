"""Trained adapters in PEFT's own format, and models that an adapter is merged into; in one process, on the CPU.

    peft_model = load_adapter(load_model(run.init / "model"), run.init / "adapter")
    set_trained(peft_model, tensors)                         # from a checkpoint
    export_adapter(peft_model, folder, "bert-base-uncased", InitialTensors(run.init / "adapter"))
    verify_adapter(folder, tensors)
    model = merge(peft_model)

An adapter that has changed the base weights when it was drawn (PiSSA, OLoRA) is exported for the unchanged ones:
W0 = W + s B0 A0, so what is learned is W + s B A - W0 = s [B, -B0] [A; A0], with factors of twice the rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from distlm.errors import CheckpointError, InputError, Problem
from distlm.run_folder import follow_umask
from distlm.worker.adapter import InitialTensors

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

_NUM_TOLD = 3  # differences that an error names
_MERGE_TOLERANCE = 1e-3  # of the largest logit


def set_trained(peft_model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Copy the trained tensors, in the module's own names, into a model. Raises CheckpointError unless they are all of
    its trainable ones, and no others."""
    live = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    if differing := sorted(live.keys() ^ tensors.keys()):
        raise CheckpointError(f"{len(differing)} trainable tensors differ, such as {differing[0]}")
    for name, parameter in live.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(f"{name} has the shape {list(tensors[name].shape)}, not {list(parameter.shape)}")
        parameter.data.copy_(tensors[name])


def export_adapter(peft_model: PeftModel, folder: Path, base_name_or_path: str, initial: InitialTensors) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder.

    `PeftModel.from_pretrained(base, folder)` with the base model of that name then predicts what `peft_model` does.

    Args:
        initial: the adapter as it was drawn.
    """
    # Otherwise PEFT asks the Hub for the base model, to see whether its vocabulary has grown.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    config = copy.deepcopy(peft_model.peft_config["default"])
    config.base_model_name_or_path = base_name_or_path
    config.inference_mode = True
    if config.peft_type == "ADALORA":
        config.rank_pattern = None  # the full factors are saved, with zeros as the singular values that are gone
    if initial.changed_base:
        tensors = _for_unchanged_base(tensors, dict(initial), config)
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS_NAME,
              metadata={"format": "pt"})  # fmt: skip
    follow_umask(folder / ADAPTER_WEIGHTS_NAME)
    base_class = type(peft_model.get_base_model())
    mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)


def _for_unchanged_base(
    tensors: dict[str, Tensor], initial: dict[str, Tensor], config: PeftConfig
) -> dict[str, Tensor]:
    """Factors of twice the rank; changes the config accordingly."""
    first = {_peft_name(name): tensor for name, tensor in initial.items()}
    converted = dict(tensors)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensor, first[name]], dim=0)
        elif ".lora_B." in name:
            converted[name] = torch.cat([tensor, -first[name]], dim=1)
    # The scale, lora_alpha / r or lora_alpha / sqrt(r), stays.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return converted


def _peft_name(name: str) -> str:
    """The name in PEFT's file of a tensor of the module: without the name of the adapter."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def verify_adapter(folder: Path, live: dict[str, Tensor]) -> None:
    """Read an exported adapter back, and compare it with the trained tensors, in the module's own names.

    What PEFT saves of a prompt encoder is what it computes, so of that only the presence is compared.

    Raises:
        CheckpointError: it cannot be read, or something is missing, of another shape or dtype, or has another value.
    """
    path = folder / ADAPTER_WEIGHTS_NAME
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    differences = list(_differences(saved, live))
    if differences:
        told = "; ".join(differences[:_NUM_TOLD])
        raise CheckpointError(f"{path} is not what was trained: {len(differences)} of {len(live)} differ: {told}")


def _differences(saved: dict[str, Tensor], live: dict[str, Tensor]) -> Iterator[str]:
    if not live:
        yield "nothing was trained"
    for name, tensor in live.items():
        found = saved.get("prompt_embeddings" if name.startswith("prompt_encoder.") else _peft_name(name))
        if found is None:
            # Of weights that layers share, PEFT's file has one copy, under a name of its own.
            if not any(torch.equal(other, tensor.to("cpu")) for other in saved.values()):
                yield f"{name} is missing"
        elif found.dtype != tensor.dtype:
            yield f"{name} is {found.dtype}, not {tensor.dtype}"
        elif name.startswith("prompt_encoder."):
            if not found.any():
                yield f"{name} gives zeros only"
        else:
            yield from _compare(name, _first_factor(found, name, tensor), tensor.to("cpu"))


def _first_factor(found: Tensor, name: str, tensor: Tensor) -> Tensor:
    """The part of a factor of twice the rank that was trained."""
    if ".lora_A." in name and found.shape[0] == 2 * tensor.shape[0]:
        return found[: len(tensor)]
    if ".lora_B." in name and found.shape[-1] == 2 * tensor.shape[-1]:
        return found[:, : tensor.shape[1]]
    return found


def _compare(name: str, found: Tensor, tensor: Tensor) -> Iterator[str]:
    if found.shape != tensor.shape:
        yield f"{name} has the shape {list(found.shape)}, not {list(tensor.shape)}"
    elif not torch.equal(found, tensor):
        kind = "is zero" if not found.any() else f"differs by up to {(found - tensor).abs().max():.3g}"
        yield f"{name} {kind}"


def merge(peft_model: PeftModel) -> PreTrainedModel:
    """The model with the adapter in its weights, which needs no PEFT any more. Uses `peft_model` up.

    Raises:
        InputError: the method is none that can be merged, or what it gives is not what the adapter computes.
    """
    kind = peft_model.peft_config["default"].peft_type.value
    key, advice = "peft.peft_type", "export the adapter itself"
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        raise InputError(Problem(f"{kind} cannot be merged into a model; {advice}", key, kind.lower()))
    wanted = _sample_logits(peft_model)
    try:
        model: PreTrainedModel = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise InputError(Problem(f"PEFT cannot merge {kind}: {error}; {advice}", key, kind.lower())) from error
    if (_sample_logits(model) - wanted).abs().max() > _MERGE_TOLERANCE * wanted.abs().max():
        raise InputError(Problem(f"merged, {kind} predicts something else; {advice}", key, kind.lower()))
    return model


@torch.no_grad()
def _sample_logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    input_ids = torch.randint(3, vocab_size, (2, 8), generator=generator).to(model.device)
    logits: Tensor = model.eval()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return logits.float()
