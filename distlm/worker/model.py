"""The model: initial weights drawn once for a run, and loaded from there by every worker at every ZeRO stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from distlm.config.resolve import nearest_name
from distlm.config.schema import RunConfig
from distlm.errors import InputError, Problem


def build_model_config(
    config: RunConfig, vocab_size: int, special_token_ids: dict[str, int | None]
) -> PretrainedConfig:
    """The transformers config of the run's model. Raises InputError for keys and values that it does not take."""
    if config.model.name_or_path:
        try:
            model_config = AutoConfig.from_pretrained(config.model.name_or_path)
        except (OSError, ValueError) as error:
            raise InputError(Problem(_first_line(error), "model.name_or_path", config.model.name_or_path)) from None
        if vocab_size > model_config.vocab_size:
            raise InputError(
                Problem(
                    f"has {model_config.vocab_size} token embeddings, fewer than the tokenizer's {vocab_size} tokens; "
                    "use the model's own tokenizer",
                    "model.name_or_path",
                    config.model.name_or_path,
                )
            )
        return model_config

    keys = dict(config.model.config or {})
    model_type = str(keys.pop("model_type"))
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError:
        known = AutoModelForMaskedLM._model_mapping.keys()
        types = {cls.model_type for cls in known}
        raise InputError(
            Problem(
                f"transformers has no such architecture; {nearest_name(model_type, types)}",
                "model.config.model_type",
                model_type,
            )
        ) from None
    legal = {name for name in defaults.to_dict() if not name.startswith("_")} | set(type(defaults).attribute_map)
    unknown = [
        Problem(
            f"unknown key of a {model_type} config; {nearest_name(name, legal)}", f"model.config.{name}", str(value)
        )
        for name, value in keys.items()
        if name not in legal
    ]
    if unknown:
        raise InputError(*unknown)
    keys.setdefault("vocab_size", vocab_size)
    if keys["vocab_size"] < vocab_size:
        raise InputError(
            Problem(
                f"is smaller than the tokenizer's {vocab_size} tokens; leave it out and it follows the tokenizer",
                "model.config.vocab_size",
                str(keys["vocab_size"]),
            )
        )
    for name, token_id in special_token_ids.items():
        if name in legal and token_id is not None:
            keys.setdefault(name, token_id)
    try:
        return AutoConfig.for_model(model_type, **keys)
    except Exception as error:  # noqa: BLE001 - transformers' validators raise errors of many kinds, all about these keys
        raise InputError(Problem(f"{model_type}: {_first_line(error)}", "model.config")) from None


def check_positions(model_config: PretrainedConfig, max_seq_length: int) -> None:
    """Raise InputError if the model has fewer positions than a sample has tokens."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is None:
        return
    # RoBERTa and its relatives count positions from the padding index on (fairseq's convention).
    offset = (model_config.pad_token_id or 0) + 1 if model_config.model_type in _PADDED_POSITIONS else 0
    if max_seq_length > positions - offset:
        raise InputError(
            Problem(
                f"{max_seq_length} tokens are more than the {positions - offset} positions of the model "
                f"({model_config.model_type})",
                "data.max_seq_length",
                str(max_seq_length),
            )
        )


_PADDED_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "camembert",
    "xlm-roberta-xl",
    "data2vec-text",
    "roberta-prelayernorm",
    "longformer",
    "xmod",
    "mpnet",
}


def save_initial_model(config: RunConfig, model_config: PretrainedConfig, folder: Path) -> None:
    """Write the weights that training starts from: drawn from the seed in fp32, outside DeepSpeed, or the pretrained
    ones. Every stage and world size then starts from the same numbers (`from_config` under ZeRO-3 would not)."""
    torch.manual_seed(config.seed)
    attn = config.model.attn_implementation
    try:
        if config.model.name_or_path:
            model = AutoModelForMaskedLM.from_pretrained(
                config.model.name_or_path, config=model_config, dtype=torch.float32, attn_implementation=attn
            )
        else:
            model = AutoModelForMaskedLM.from_config(model_config, dtype=torch.float32, attn_implementation=attn)
    except Exception as error:  # the constructors of models raise errors of many kinds
        key = "model.name_or_path" if config.model.name_or_path else "model.config"
        raise InputError(Problem(f"transformers cannot build this model: {_first_line(error)}", key)) from error
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    os.replace(temporary, folder)


def load_model(folder: Path, attn_implementation: str, gradient_checkpointing: bool) -> PreTrainedModel:
    """Load saved weights in fp32. Under ZeRO-3 (once the Accelerator exists) each rank keeps its part only."""
    model: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attn_implementation, local_files_only=True
    )
    if gradient_checkpointing:
        # The reentrant variant loses gradients of inputs that need none; the other one is torch's recommendation.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def export_model(initial: Path, parameters: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `folder` in Hugging Face format: the architecture of `initial` with the trained fp32 `parameters`."""
    model: Any = AutoModelForMaskedLM.from_pretrained(initial, dtype=torch.float32, local_files_only=True)
    names = {name for name, _ in model.named_parameters()}
    if names != parameters.keys():
        different = sorted(names ^ parameters.keys())
        raise ValueError(f"the checkpoint and the model differ in {len(different)} parameters, such as {different[0]}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
