"""The model: initial weights drawn once for a run, and loaded from there by every worker at every ZeRO stage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from distlm.config.resolve import nearest_name
from distlm.config.schema import RunConfig
from distlm.data import letter_case
from distlm.data.foreign import reason
from distlm.errors import InputError, Problem
from distlm.run_folder import whole_folder


@dataclass(frozen=True)
class ModelKind:
    """The class of model that a task trains."""

    auto_class: Any
    """Of transformers, with `from_pretrained` and `from_config`."""
    model_types: Mapping[str, str]
    """Architectures that have such a class."""
    called: str
    """For people: a ... model."""


MODEL_KINDS = {
    "masked-lm": ModelKind(AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked-LM"),
    "text-classification": ModelKind(
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "sequence-classification",
    ),
    "token-classification": ModelKind(
        AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "token-classification"
    ),
}
"""By the task's name."""


@dataclass(frozen=True)
class Head:
    """What the head of a classifier is to tell."""

    labels: Sequence[str]
    """By their ids; empty for a regression."""
    problem_type: str | None
    """Of transformers' config; None for words, whose labels are of one kind."""

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of transformers' config."""
        if not self.labels:
            return {"num_labels": 1, "problem_type": self.problem_type}
        names = dict(enumerate(self.labels))
        settings = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        return settings | ({"problem_type": self.problem_type} if self.problem_type else {})


def pretrained_config(name_or_path: str, task: str) -> PretrainedConfig:
    """The config of a pretrained model. Raises InputError where there is none, or one that the task cannot train."""
    key = "model.name_or_path"
    try:
        model_config: PretrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - broken files make transformers raise errors of many kinds
        raise InputError(Problem(f"is no model: {reason(error)}", key, name_or_path)) from None
    if "/" in str(model_config._attn_implementation):  # transformers would download it
        message = (
            "asks for an attention kernel of its own, which is never run; remove attn_implementation from its config"
        )
        raise InputError(Problem(message, key, name_or_path))
    _require_kind(model_config, task, key, name_or_path)
    return model_config


def labels_of(model_config: PretrainedConfig, task: str) -> list[str]:
    """The labels that a pretrained model tells apart, by their ids; empty: it has no head for the task, or none with
    names."""
    suffix = {"text-classification": "ForSequenceClassification", "token-classification": "ForTokenClassification"}
    classes = model_config.architectures or []
    if task not in suffix or not any(name.endswith(suffix[task]) for name in classes):
        return []
    names = [model_config.id2label[number] for number in sorted(model_config.id2label)]
    return [] if names[:1] == ["LABEL_0"] else names


def build_model_config(
    config: RunConfig, vocab_size: int, special_token_ids: dict[str, int | None], head: Head | None = None
) -> PretrainedConfig:
    """The transformers config of the run's model. Raises InputError for keys and values that it does not take."""
    model_config = _model_config(config, vocab_size, special_token_ids)
    if head is not None:
        for name, value in head.settings.items():
            setattr(model_config, name, value)
    if getattr(model_config, "pad_token_id", None) is None:  # classifiers of causal models look for the last token
        model_config.pad_token_id = special_token_ids["pad_token_id"]
    return model_config


def _model_config(config: RunConfig, vocab_size: int, special_token_ids: dict[str, int | None]) -> PretrainedConfig:
    task = config.task.type
    if name := config.model.name_or_path:
        model_config = pretrained_config(name, task)
        if vocab_size > model_config.vocab_size:
            raise InputError(
                Problem(
                    f"has {model_config.vocab_size} token embeddings, fewer than the tokenizer's {vocab_size} tokens; "
                    "use the model's own tokenizer",
                    "model.name_or_path",
                    name,
                )
            )
        return model_config

    keys = dict(config.model.config or {})
    model_type = str(keys.pop("model_type"))
    if model_type not in MODEL_KINDS[task].model_types:
        raise InputError(_no_such_kind(model_type, task, "model.config.model_type", model_type))
    defaults = AutoConfig.for_model(model_type)
    legal = {name for name in defaults.to_dict() if not name.startswith("_")} | set(type(defaults).attribute_map)
    if problems := [*_unknown_keys(keys, legal, model_type), *_unknown_activations(keys)]:
        raise InputError(*problems)
    multiple = config.model.pad_vocab_to_multiple_of
    keys.setdefault("vocab_size", -(-vocab_size // multiple) * multiple)
    if keys["vocab_size"] < vocab_size:
        raise InputError(
            Problem(
                f"is smaller than the tokenizer's {vocab_size} tokens; leave it out and it follows the tokenizer",
                "model.config.vocab_size",
                str(keys["vocab_size"]),
            )
        )
    for name, token_id in special_token_ids.items():
        if name in legal:
            keys.setdefault(name, token_id)
    try:
        model_config = AutoConfig.for_model(model_type, **keys)
    except StrictDataclassFieldValidationError as error:
        field = re.search(r"'(\w+)'", str(error))
        key = f"model.config.{field[1]}" if field else "model.config"
        raise InputError(Problem(reason(error.__cause__ or error), key)) from None
    except Exception as error:  # noqa: BLE001 - transformers' validators raise errors of many kinds, all about these keys
        raise InputError(Problem(f"{model_type}: {reason(error)}", "model.config")) from None
    _require_kind(model_config, task, "model.config", "")
    return model_config


def _unknown_keys(keys: dict[str, Any], legal: set[str], model_type: str) -> Iterator[Problem]:
    for name, value in keys.items():
        if name not in legal:
            advice = nearest_name(name, legal)
            yield Problem(f"unknown key of a {model_type} config; {advice}", f"model.config.{name}", str(value))


def _unknown_activations(keys: dict[str, Any]) -> Iterator[Problem]:
    for name, value in keys.items():
        is_activation = name.endswith(("act", "activation", "activation_function")) and isinstance(value, str)
        if is_activation and value not in ACT2FN:
            yield Problem(f"unknown activation; {nearest_name(value, ACT2FN)}", f"model.config.{name}", value)


def _require_kind(model_config: PretrainedConfig, task: str, key: str, value: str) -> None:
    """Refuse what transformers has no class for, and for masked-LM what does not look at both sides."""
    if model_config.model_type not in MODEL_KINDS[task].model_types:
        raise InputError(_no_such_kind(model_config.model_type, task, key, value))
    if task != "masked-lm":
        return
    for flag in ("is_encoder_decoder", "is_decoder"):
        if getattr(model_config, flag, False):
            raise InputError(Problem(f"masked-LM trains encoders, and this {model_config.model_type} has {flag}: true",
                                     key, value))  # fmt: skip


def _no_such_kind(model_type: str, task: str, key: str, value: str) -> Problem:
    kind = MODEL_KINDS[task]
    advice = nearest_name(model_type, kind.model_types)
    return Problem(f"transformers has no {kind.called} model of the type {model_type}; {advice}", key, value)


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


def initial_model(config: RunConfig, model_config: PretrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    """The model that training starts from, and the names of those of its pretrained weights that were drawn anew: of
    the head, where the pretrained model has none, or one for other labels.

    The weights that training starts from: drawn from the seed in fp32, outside DeepSpeed, or the pretrained
    ones. Every stage and world size then starts from the same numbers (`from_config` under ZeRO-3 would not).

    Raises InputError where transformers cannot build the model, or it cannot compute a sample.
    """
    torch.manual_seed(config.seed)
    attn = config.model.attn_implementation
    auto_class = MODEL_KINDS[config.task.type].auto_class
    drawn: list[str] = []
    try:
        if config.model.name_or_path:
            model, report = auto_class.from_pretrained(
                config.model.name_or_path,
                config=model_config,
                dtype=torch.float32,
                attn_implementation=attn,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=config.task.type != "masked-lm",  # the head's, where it is for other labels
            )
            drawn = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
            _require_pretrained(model, drawn)
            if config.task.type != "masked-lm" and not drawn and not _knows_labels(config, model_config):
                drawn = _draw_head_anew(model)
        else:
            model = auto_class.from_config(
                model_config, dtype=torch.float32, attn_implementation=attn, trust_remote_code=False
            )
        if config.task.type == "token-classification" and config.task.case_feature:
            drawn += _enlarge_token_types(model)
        if attn != "flash_attention_2":  # that one runs on GPUs only
            _require_logits(model, config)
    except InputError:
        raise
    except Exception as error:  # the constructors of models raise errors of many kinds
        if "attention implementation" in str(error) or "Flash" in str(error):
            message = f"a {model_config.model_type} in transformers does not have it here; leave it out, or use eager"
            raise InputError(Problem(message, "model.attn_implementation", attn or "")) from error
        key = "model.name_or_path" if config.model.name_or_path else "model.config"
        raise InputError(Problem(f"transformers cannot build this model: {reason(error)}", key)) from error
    return model, drawn


def save_initial_model(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights that `load_model` reads."""
    with whole_folder(folder, replace=True) as temporary:
        # In the module's own names, which checkpoints use, too: some architectures have others on the Hub, and weights
        # there that are several in the module. `from_pretrained` reads both.
        model.save_pretrained(temporary, save_original_format=False)


_TOKEN_TYPES = "token_type_embeddings"
_TOKEN_TYPE_NOISE = 0.02  # standard deviation, as BERT's initializer_range


def _enlarge_token_types(model: PreTrainedModel) -> list[str]:
    """Give a model a token type for each class of words; names of the weights that were drawn. The new ones begin as
    the type that all tokens have had, but for some noise. One that has them already stays as it is."""
    name = next((name for name, _ in model.named_modules() if name.endswith(_TOKEN_TYPES)), None)
    if name is None:
        message = f"this {model.config.model_type} has no token types; leave it out, or take a cased model"
        raise InputError(Problem(message, "task.case_feature", "true"))
    table = model.get_submodule(name)
    assert isinstance(table, nn.Embedding)
    if table.num_embeddings == letter_case.NUM_TOKEN_TYPES:
        return []
    enlarged = nn.Embedding(letter_case.NUM_TOKEN_TYPES, table.embedding_dim)
    with torch.no_grad():
        enlarged.weight.copy_(table.weight[0] + _TOKEN_TYPE_NOISE * torch.randn_like(enlarged.weight))
        enlarged.weight[0] = table.weight[0]
    model.set_submodule(name, enlarged)
    model.config.type_vocab_size = letter_case.NUM_TOKEN_TYPES
    return [f"{name}.weight"]


def _knows_labels(config: RunConfig, model_config: PretrainedConfig) -> bool:
    """Whether the pretrained head is one for the labels of the run, and not only for as many."""
    before = pretrained_config(str(config.model.name_or_path), config.task.type)
    if getattr(model_config, "problem_type", None) == "regression":
        return before.num_labels == 1
    names = [model_config.id2label[number] for number in sorted(model_config.id2label)]
    return labels_of(before, config.task.type) == names


def _draw_head_anew(model: PreTrainedModel) -> list[str]:
    """Names of the weights that were drawn."""
    names = head_names(model, ())
    for name in names:
        for module in model.get_submodule(name).modules():
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            model._init_weights(module)
    return sorted(name for name, _ in model.named_parameters() if name.startswith(tuple(f"{n}." for n in names)))


def head_names(model: PreTrainedModel, drawn: Iterable[str]) -> list[str]:
    """Modules that are trained for the task whatever the method: all that is not the base model, and of that what was
    drawn anew, its pooler or its token types."""
    base = model.base_model_prefix
    names = [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]
    if any(name.startswith(f"{base}.pooler.") for name in drawn):
        names.append(f"{base}.pooler")
    return [*names, *(name.rpartition(".")[0] for name in drawn if f".{_TOKEN_TYPES}." in name)]


def _require_pretrained(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """A new head may be drawn at random; the encoder may not, but for its pooler, which is a part of the head."""
    base = f"{model.base_model_prefix}."
    if names := sorted(name for name in missing if name.startswith(base) and not name.startswith(f"{base}pooler.")):
        raise InputError(
            Problem(
                f"lacks {len(names)} weights of a {model.config.model_type}, such as {names[0]}", "model.name_or_path"
            )
        )


def _require_logits(model: PreTrainedModel, config: RunConfig) -> None:
    """Have the model compute one full sample, so that whatever it cannot do is found before any worker starts."""
    max_seq_length = config.data.max_seq_length
    token_id = 1 if model.config.pad_token_id != 1 else 2
    input_ids = torch.full((1, max_seq_length), token_id)
    with torch.no_grad():
        logits = model.train()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    expected = (1,) if config.task.type == "text-classification" else input_ids.shape
    if logits.shape[:-1] != expected or not torch.isfinite(logits).all():
        raise ValueError("it gives no finite numbers for a sample of data.max_seq_length")


def load_model(
    folder: Path,
    attn_implementation: str | None,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
    task: str = "masked-lm",
    quantization: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load saved weights in fp32, or in the few bits of a BitsAndBytesConfig, `quantization`, on a GPU. Under ZeRO-3
    (once the Accelerator exists) each rank keeps its part only."""
    others: dict[str, Any] = {}
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        others = {
            "quantization_config": BitsAndBytesConfig(**quantization),
            "device_map": {"": torch.cuda.current_device()},
        }
    model: PreTrainedModel = MODEL_KINDS[task].auto_class.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **others,
    )
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if torch_compile:
        # The encoder alone, in place, so that no name changes: the head sees another number of tokens at each call.
        model.base_model.compile()
    model.train()
    return model


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    # The reentrant variant loses gradients of inputs that need none; the other one is torch's recommendation.
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def parameter_aliases(folder: Path, task: str) -> dict[str, list[str]]:
    """Every name of each trainable parameter of a saved model, tied ones included, by each of its names.

    Computes no weight, and holds none: the model is built from its config on torch's meta device.
    """
    model_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = MODEL_KINDS[task].auto_class.from_config(model_config, trust_remote_code=False)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}
