"""PEFT adapters (https://github.com/huggingface/peft): every method that PEFT registers, by its name.

    config = adapter_config(settings, "SEQ_CLS", ["classifier"], head_is_new=True, total_steps=1000)
    adapter = draw_adapter(model, config, seed=42)      # once for a run, in one process, without DeepSpeed
    rehearse(adapter.model, config, max_seq_length=128)
    save_initial(adapter, run.init)
    peft_model = load_adapter(load_model(run.init / "model"), run.init / "adapter")   # in each worker, at every stage

init/adapter holds PEFT's config and, in the module's own names, every tensor that PEFT has added to the model: also
what PEFT's own format leaves out, such as the encoder of p-tuning and random projections. So every worker at every
ZeRO stage trains the same numbers, and a checkpoint needs the trainable ones only.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distlm.config.resolve import nearest_name
from distlm.data.foreign import reason
from distlm.errors import CheckpointError, InputError, Problem
from distlm.run_folder import whole_folder
from distlm.worker.adalora import add_orthogonality_gradients

TaskType = Literal["SEQ_CLS", "TOKEN_CLS"]

FULL = "full"
"""The `peft_type` of training without an adapter."""

WEIGHTS_NAME = "adapter.safetensors"

_TYPE_KEY = "peft.peft_type"
_ALL_LINEAR = "all-linear"

_OURS = {
    "task_type": "it follows the task",
    "inference_mode": "the adapter is trained",
    "base_model_name_or_path": "it is model.name_or_path",
    "revision": "it is of the base model, model.name_or_path",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "runtime_config": "it is not part of a run",
    "megatron_config": "distlm does not train with Megatron",
    "megatron_core": "distlm does not train with Megatron",
    "total_step": "it follows training.max_steps or training.num_train_epochs",
}
_SCHEDULE = ("tinit", "tfinal", "total_step")
"""Keys of AdaLoRA that are of a run and not of an adapter."""

_NEEDS_DATA = ("eva", "corda", "lora_ga", "loftq")
"""Values of `init_lora_weights` that look at data, gradients or a quantised model, and not at the weights alone."""


def peft_type_of(settings: dict[str, Any]) -> str | None:
    """PEFT's name of the method that the config's `peft` asks for; None: none, all weights are trained.

    Raises InputError for a name that PEFT does not have, and for other keys beside `full`.
    """
    written = str(settings.get("peft_type") or "")
    names = {_plain(name): str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    if _plain(written) == FULL:
        if others := sorted(settings.keys() - {"peft_type"}):
            message = "nothing else can be set where peft_type is full: there is no adapter"
            raise InputError(*(Problem(message, f"peft.{key}", str(settings[key])) for key in others))
        return None
    if not written:
        raise InputError(Problem("is missing: the name of a PEFT method, such as lora, or full for none", _TYPE_KEY))
    if _plain(written) not in names:
        legal = sorted([FULL, *(name.lower() for name in names.values())])
        raise InputError(Problem(f"unknown method; {nearest_name(written.lower(), legal)}", _TYPE_KEY, written))
    return names[_plain(written)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def adapter_config(
    settings: dict[str, Any],
    task_type: TaskType | None,
    head_names: Sequence[str],
    *,
    head_is_new: bool,
    total_steps: int,
) -> PeftConfig:
    """PEFT's config of an adapter, from the config's `peft`.

    Args:
        task_type: None: masked LM, which PEFT has no type for.
        head_names: modules of the model that are trained as they are, beside the adapter; for masked LM see
            `head_modules`.
        head_is_new: the head is drawn at random, so it must be trained. Heads of classifiers are trained in any case.
        total_steps: optimizer steps of the run.

    Raises:
        InputError: for keys and values that PEFT does not take, or that are not the user's to set.
    """
    peft_type = peft_type_of(settings)
    assert peft_type is not None, "there is an adapter"
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    legal = {field.name for field in fields(config_class) if field.init}
    values = {name: value for name, value in settings.items() if name != "peft_type"}
    if problems := [*_illegal_keys(values, legal, peft_type), *_wrong_types(values, config_class)]:
        raise InputError(*problems)
    if str(values.get("init_lora_weights")).lower() in _NEEDS_DATA:
        message = "looks at data or at a quantised model before training, which distlm does not do; use true, "
        raise InputError(Problem(f"{message}gaussian, orthogonal, pissa or olora", "peft.init_lora_weights",
                                 str(values["init_lora_weights"])))  # fmt: skip
    if head_names and (head_is_new or task_type is not None):
        _train_head(values, head_names, legal, peft_type)
    if peft_type == "ADALORA":
        _set_schedule(values, total_steps)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keys that are not used; what matters is raised
            config: PeftConfig = config_class(task_type=task_type, **values)
    except Exception as error:
        raise InputError(_problem(error, values)) from error
    if config.is_prompt_learning and task_type is None:
        message = "puts virtual tokens before a sample, and masked-LM has a logit for each real one; use lora"
        raise InputError(Problem(message, _TYPE_KEY, str(settings["peft_type"])))
    if config.is_prompt_learning and not config.num_virtual_tokens:
        raise InputError(
            Problem(f"is missing: how many tokens {peft_type} adds, such as 20", "peft.num_virtual_tokens")
        )
    return config


def _illegal_keys(values: dict[str, Any], legal: set[str], peft_type: str) -> Iterator[Problem]:
    for name, value in values.items():
        if name not in legal:
            advice = nearest_name(name, legal - _OURS.keys())
            yield Problem(f"unknown key of {peft_type}; {advice}", f"peft.{name}", str(value))
        elif name in _OURS:
            yield Problem(f"cannot be set: {_OURS[name]}", f"peft.{name}", str(value))


def _wrong_types(values: dict[str, Any], config_class: type) -> Iterator[Problem]:
    """Values that are not of the type that PEFT's dataclass declares. PEFT itself takes them, and fails later."""
    hints = get_type_hints(config_class)
    for name, value in values.items():
        if name in hints and not _PISSA_WITH_ITERATIONS.fullmatch(str(value)):
            try:  # as JSON: a list may then stand for a tuple or a set, and a string for a member of an enum
                adapter: TypeAdapter[Any] = TypeAdapter(hints[name], config=_adapter_options(hints[name]))
                adapter.validate_json(json.dumps(value), strict=True)
            except ValidationError as error:
                wanted = "; ".join(dict.fromkeys(details["msg"] for details in error.errors()))
                yield Problem(f"{wanted[:1].lower()}{wanted[1:]}", f"peft.{name}", str(value))


_PISSA_WITH_ITERATIONS = re.compile(r"pissa_niter_\d+")  # declared as "pissa_niter_[number of iters]"


def _adapter_options(hint: Any) -> ConfigDict | None:
    return None if is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True)


def _train_head(values: dict[str, Any], head_names: Sequence[str], legal: set[str], peft_type: str) -> None:
    if "modules_to_save" not in legal:
        message = f"PEFT's {peft_type} cannot train the head of the task beside the adapter (it has no modules_to_save)"
        if peft_type == "TRAINABLE_TOKENS":
            message += "; use lora with trainable_token_indices"
        raise InputError(Problem(message, _TYPE_KEY, peft_type.lower()))
    values["modules_to_save"] = list(dict.fromkeys([*(values.get("modules_to_save") or ()), *head_names]))


def _set_schedule(values: dict[str, Any], total_steps: int) -> None:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): the first tenth of the steps trains all ranks, the last three
    tenths train those that are left; the paper's experiments take about as much."""
    values.setdefault("tinit", total_steps // 10)
    values.setdefault("tfinal", total_steps * 3 // 10)
    values["total_step"] = total_steps
    if values["tinit"] + values["tfinal"] >= total_steps:
        message = (
            f"tinit = {values['tinit']} and tfinal = {values['tfinal']} leave none of the {total_steps} steps of the "
            "run to reduce the ranks in; lower them"
        )
        raise InputError(Problem(message, "peft.tinit", str(values["tinit"])))
    if values.get("target_r", 8) >= values.get("init_r", 12):
        message = f"must be smaller than init_r = {values.get('init_r', 12)}, which the ranks are reduced from"
        raise InputError(Problem(message, "peft.target_r", str(values.get("target_r", 8))))


def _problem(error: BaseException, values: dict[str, Any]) -> Problem:
    """What PEFT says, at the key that it speaks of if it is one of the user's."""
    text = reason(error)
    named = [name for name in values if re.search(rf"\b{re.escape(name)}\b", text)]
    if len(named) == 1:
        return Problem(text, f"peft.{named[0]}", str(values[named[0]]))
    return Problem(text, "peft")


def head_modules(model: PreTrainedModel, head_names: Sequence[str]) -> list[str]:
    """The largest modules of a head that share no weight with the rest of the model.

    PEFT trains a copy of a module. A copy of a decoder that is tied to the embeddings would be another matrix of the
    size of the vocabulary, and not tied any more. For a masked LM with a new head that leaves its dense layer and norm;
    a bias that belongs to no other module stays as it is, zero.
    """
    names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)

    def unshared(name: str) -> Iterator[str]:
        module = model.get_submodule(name)
        owned = {id(parameter) for parameter in module.parameters()}
        if owned and all(other.startswith(f"{name}.") for number in owned for other in names[number]):
            yield name
        elif owned:
            for child, _ in module.named_children():
                yield from unshared(f"{name}.{child}")

    return [found for name in head_names for found in unshared(name)]


@dataclass(frozen=True)
class Adapter:
    """A model with an adapter as it was drawn, or read from an earlier one."""

    model: PeftModel
    tensors: dict[str, Tensor]
    """What PEFT has added to the model, by its name there: parameters and buffers, live."""
    seed: int
    """What it was drawn from."""
    changed_base: bool
    """Drawing it has changed the base weights (PiSSA, OLoRA): they belong to it."""


def draw_adapter(
    model: PreTrainedModel, config: PeftConfig, seed: int, head_names: Sequence[str] = (), source: Path | None = None
) -> Adapter:
    """Give a model an adapter, with weights that follow from the seed. Changes the model.

    Args:
        model: whole, in fp32, on the CPU.
        head_names: the modules of the task's head, which `target_modules: all-linear` leaves alone.
        source: a folder in PEFT's format, to take the weights from.

    Raises:
        InputError: PEFT cannot do this to this model.
    """
    if str(getattr(config, "target_modules", None)).lower() == _ALL_LINEAR:
        config.target_modules = _linear_modules(model, head_names)
    before = {name: _summary(parameter) for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_model, tensors = _build(model, config, seed)
            if source is not None:
                _read_peft_format(peft_model, source)
    except InputError:
        raise
    except Exception as error:
        raise InputError(_refusal(config, model, reason(error))) from error
    changed_base = any(_summary(parameter) != before[name] for name, parameter in parameters.items())
    if changed_base:
        _require_convertible(config)
    return Adapter(peft_model, tensors, seed, changed_base)


def _linear_modules(model: PreTrainedModel, head_names: Sequence[str]) -> list[str]:
    """All linear layers but for the head's. PEFT's own list leaves out the heads of some tasks only."""
    heads = tuple(f"{name}." for name in head_names)
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not f"{name}.".startswith(heads)
    ]


def _summary(parameter: Tensor) -> tuple[float, float]:
    values = parameter.detach().double()
    return float(values.sum()), float(values.square().sum())


def _require_convertible(config: PeftConfig) -> None:
    """Whether the adapter can be expressed for the unchanged base model; see `adapter_export`."""
    kind = config.peft_type.value
    if kind != "LORA":
        message = "changes the weights of the model itself, so what it learns is no adapter; use another method"
        raise InputError(Problem(message, _TYPE_KEY, kind.lower()))
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        message = "cannot be combined with use_rslora and rank_pattern or alpha_pattern"
        raise InputError(Problem(message, "peft.init_lora_weights", str(config.init_lora_weights)))


def _build(model: PreTrainedModel, config: PeftConfig, seed: int) -> tuple[PeftModel, dict[str, Tensor]]:
    """The model with an adapter whose random numbers, wherever PEFT keeps them, follow from the seed, and the tensors
    that are new."""
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng(), _kept_compilers():
        torch.manual_seed(seed)
        peft_model: PeftModel = get_peft_model(model, config)
    if (saved := getattr(config, "modules_to_save", None)) is not None:  # PEFT appends names of heads, each time
        config.modules_to_save = list(dict.fromkeys(saved))
    if config.is_prompt_learning:
        peft_model.register_forward_hook(_drop_virtual_tokens, with_kwargs=True)
    named = (*peft_model.named_parameters(), *peft_model.named_buffers())
    return peft_model, {name: tensor for name, tensor in named if id(tensor) not in base}


@contextmanager
def _kept_compilers() -> Iterator[None]:
    """PEFT 0.21 sets both compilers to gcc for BOFT and, where its extension cannot be built, leaves them so: nothing
    in C++ can be compiled in this process any more, as torch.compile does."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _drop_virtual_tokens(model: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
    """Logits [B, V + S, C] of a token classifier with V virtual tokens -> [B, S, C], one for each real token."""
    input_ids = inputs.get("input_ids", arguments[0] if arguments else None)
    logits = getattr(output, "logits", None)
    if logits is not None and logits.ndim == 3 and input_ids is not None:
        output.logits = logits[:, -input_ids.shape[1] :]
    return output


def _read_peft_format(peft_model: PeftModel, folder: Path) -> None:
    """The weights of an adapter that PEFT has saved, in place of those drawn. Raises InputError if they do not fit."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    key = "peft.adapter_name_or_path"
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    prompt = {name for name in trainable if name.startswith("prompt_encoder.")}
    if len(prompt) > 1:
        message = "cannot be trained further: of an encoder of virtual tokens, PEFT saves what it gives and not itself"
        raise InputError(Problem(message, key, str(folder)))
    try:
        loaded = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # broken files make PEFT raise errors of many kinds
        raise InputError(Problem(f"is no PEFT adapter: {reason(error)}", key, str(folder))) from error
    result = set_peft_model_state_dict(peft_model, loaded)
    missing = sorted(trainable & set(result.missing_keys) - prompt)
    unexpected = sorted(set(result.unexpected_keys) - {"prompt_embeddings"})
    if not loaded or missing or unexpected:
        name = next(iter([*missing, *unexpected]), "no tensor at all")
        message = f"is no adapter of this model: {len(missing)} weights are missing and {len(unexpected)} are too many"
        raise InputError(Problem(f"{message}, such as {name}", key, str(folder)))


def adapter_folder(name_or_path: str) -> tuple[Path, str]:
    """Where an adapter in PEFT's format is, downloaded if it is on the Hub, and PEFT's name of its method.

    Raises InputError if there is none.
    """
    try:
        peft_type = str(PeftType(_read_config(name_or_path).peft_type).value)
        if Path(name_or_path).is_dir():
            return Path(name_or_path), peft_type
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name_or_path)), peft_type
    except Exception as error:  # broken files and the Hub's absence make PEFT raise errors of many kinds
        key = "peft.adapter_name_or_path"
        raise InputError(Problem(f"is no PEFT adapter: {reason(error)}", key, name_or_path)) from error


def _read_config(name_or_path: str) -> PeftConfig:
    """Of an adapter that PEFT has saved. Raises ValueError, and whatever else broken files make PEFT raise."""
    config: PeftConfig = PeftConfig.from_pretrained(name_or_path)
    if getattr(config, "megatron_config", None) is not None:
        raise ValueError("its config names a Python module to import (megatron_core), which is never done")
    return config


def earlier_config(folder: Path, settings: dict[str, Any], config: PeftConfig) -> PeftConfig:
    """The config of an adapter that PEFT has saved, to train it further.

    Args:
        settings: the config's `peft`.
        config: what `adapter_config` makes of it.

    Raises:
        InputError: there is no adapter, or it is not what the settings say, by key.
    """
    key = "peft.adapter_name_or_path"
    try:
        earlier = _read_config(str(folder))
    except Exception as error:
        raise InputError(Problem(f"is no PEFT adapter: {reason(error)}", key, str(folder))) from error
    if earlier.peft_type != config.peft_type:
        message = f"is an adapter of {earlier.peft_type.value}, and the run asks for {settings['peft_type']}"
        raise InputError(Problem(message, key, str(folder)))
    problems = []
    for name in sorted(settings.keys() - {"peft_type", "modules_to_save", *_SCHEDULE}):
        wanted, found = getattr(config, name), getattr(earlier, name)
        is_resolved = str(wanted).lower() == _ALL_LINEAR  # in the earlier one it stands as a list of names
        if not is_resolved and _comparable(wanted) != _comparable(found):
            message = f"the adapter in {folder} has {found}; set the same or leave it out"
            problems.append(Problem(message, f"peft.{name}", str(settings[name])))
    if problems:
        raise InputError(*problems)
    earlier.inference_mode = False
    earlier.base_model_name_or_path = None
    earlier.task_type = config.task_type
    if hasattr(earlier, "init_lora_weights"):
        earlier.init_lora_weights = True  # its weights are read, and the base model must stay as it is
    if getattr(config, "modules_to_save", None) is not None:
        earlier.modules_to_save = list(dict.fromkeys([*(earlier.modules_to_save or ()), *config.modules_to_save]))
    for name in _SCHEDULE:
        if hasattr(config, name):
            setattr(earlier, name, getattr(config, name))
    return earlier


def _comparable(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (list, tuple, set)) else value


def save_initial(adapter: Adapter, init: Path) -> None:
    """Write init/adapter, and init/model anew where drawing the adapter has changed it. Uses the adapter's model up."""
    config = adapter.model.peft_config["default"]
    config.base_model_name_or_path = None  # a folder of this run; an export names the model that the user knows
    kind = str(getattr(config, "init_lora_weights", ""))
    if adapter.changed_base:
        config.init_lora_weights = True  # done, once for all
    metadata = {"seed": str(adapter.seed), "changed_base": json.dumps(adapter.changed_base), "init_lora_weights": kind}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in adapter.tensors.items()}
    with whole_folder(init / "adapter") as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / WEIGHTS_NAME, metadata=metadata)
    if adapter.changed_base:
        base = adapter.model.unload()
        with whole_folder(init / "model", replace=True) as temporary:
            base.save_pretrained(temporary, save_original_format=False)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Give the model of init/model the adapter of init/adapter; in training mode, the adapter and the head trainable.

    Works at every ZeRO stage: under stage 3 the model is already partitioned, and the adapter will be, by the engine.

    Raises:
        CheckpointError: the folder is damaged, or of another model or version of PEFT.
    """
    try:
        config = _read_config(str(folder))
        saved = InitialTensors(folder)
        config.inference_mode = False
        with warnings.catch_warnings(), _whole_weights(model):
            warnings.simplefilter("ignore")
            peft_model, tensors = _build(model, config, saved.seed)
        saved.copy_to(tensors)
        _gather_base_with_layer(peft_model)
    except CheckpointError:
        raise
    except Exception as error:  # broken files make PEFT raise errors of many kinds
        raise CheckpointError(f"the adapter in {folder} cannot be loaded: {reason(error)}") from error
    if config.peft_type == "ADALORA":
        add_orthogonality_gradients(peft_model)
    return peft_model.train()


class InitialTensors:
    """The file of init/adapter: every tensor that PEFT has added to a model, in the module's own names."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a folder without such a file."""
        self._path = folder / WEIGHTS_NAME
        try:
            with safe_open(self._path, "pt") as file:
                metadata = file.metadata()
                self.names = set(file.keys())
            self.seed = int(metadata["seed"])
            self.changed_base: bool = json.loads(metadata["changed_base"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path} cannot be read: {reason(error)}") from error

    def copy_to(self, tensors: dict[str, Tensor]) -> None:
        """Fill the tensors. Raises CheckpointError unless they are those of the file, by name, shape and dtype."""
        if differing := sorted(self.names ^ tensors.keys()):
            where = "model" if differing[0] in tensors else "file"
            raise CheckpointError(f"{self._path}: {len(differing)} tensors differ; only the {where} has {differing[0]}")
        for name, saved in self:
            live = tensors[name]
            if live.shape != saved.shape or live.dtype != saved.dtype:
                found = f"{list(saved.shape)} {saved.dtype} in it and {list(live.shape)} {live.dtype} in the model"
                raise CheckpointError(f"{self._path}: {name} is {found}")
            live.data.copy_(saved)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self._path, "pt") as file:
            for name in sorted(self.names):
                yield name, file.get_tensor(name)


@contextmanager
def _whole_weights(model: nn.Module) -> Iterator[None]:
    """Under ZeRO-3, have every rank hold all weights of the model meanwhile: many methods compute from them.

    Not by `deepspeed.zero.GatheredParameters`, which may not be nested, and PEFT uses it in some methods.
    """
    parameters: list[Any] = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if parameters:
        parameters[0].all_gather(param_list=parameters)
    try:
        yield
    finally:
        if parameters:
            parameters[0].partition(param_list=parameters)


def _gather_base_with_layer(peft_model: PeftModel) -> None:
    """Have ZeRO-3 gather the weights of an adapted layer for the adapter around it as well: some methods (DEFT) read
    them after the layer has computed, when ZeRO-3 has given them up."""
    import deepspeed

    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters():
                if hasattr(parameter, "ds_id"):
                    deepspeed.zero.register_external_parameter(module, parameter)


def rehearse(peft_model: PeftModel, max_seq_length: int) -> None:
    """Have the model compute gradients of full samples, so that whatever it cannot do is found before any worker
    starts.

    Raises:
        InputError: it cannot compute a sample, gives no finite numbers, or has weights that are not trained.
    """
    config = peft_model.peft_config["default"]
    trainable = {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise InputError(_refusal(config, peft_model, "it has no parameter to train"))
    try:
        _train_on_one_sample(peft_model, max_seq_length)
    except Exception as error:
        raise InputError(_refusal(config, peft_model, reason(error), max_seq_length)) from error
    gradients = {name: parameter.grad for name, parameter in trainable.items()}
    peft_model.zero_grad()
    unused = [name for name, gradient in gradients.items() if gradient is None]
    if unused:
        message = f"{len(unused)} of its {len(trainable)} trainable tensors are not used, such as {unused[0]}"
        raise InputError(_refusal(config, peft_model, message))
    if infinite := [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]:
        raise InputError(_refusal(config, peft_model, f"the gradient of {infinite[0]} is not finite"))
    # In many methods the gradient of one factor is zero in the first step, because the other factor is zero then.
    adapter = [gradient for name, gradient in gradients.items() if ".modules_to_save." not in name]
    if not any(gradient.any() for gradient in adapter):
        raise InputError(_refusal(config, peft_model, "it gets no gradient"))


def _train_on_one_sample(peft_model: PeftModel, max_seq_length: int) -> None:
    """Leaves gradients. Raises ValueError and whatever the model raises."""
    model_config = peft_model.get_base_model().config
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, model_config.get_text_config().vocab_size, (2, max_seq_length), generator=generator)
    if (padding := model_config.pad_token_id) is not None:
        input_ids[input_ids == padding] = 1 if padding != 1 else 2
    input_ids = input_ids.to(peft_model.device)
    peft_model.zero_grad()
    with torch.enable_grad():
        logits = peft_model.train()(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits.float()
        if not torch.isfinite(logits).all():
            raise ValueError("its logits are not finite")
        expected = (2,) if peft_model.active_peft_config.task_type == "SEQ_CLS" else (2, max_seq_length)
        if logits.shape[:-1] != expected:
            raise ValueError(f"it gives logits of the shape {list(logits.shape)} for {max_seq_length} tokens")
        direction = torch.randn(logits.shape, generator=generator).to(logits.device)
        (logits * direction).sum().backward()


def _refusal(config: PeftConfig, model: Any, reason: str, max_seq_length: int | None = None) -> Problem:
    """Why a method cannot be used with a model, in the words of the library that found out."""
    kind = config.peft_type.value
    positions = getattr(model.config, "max_position_embeddings", None)
    virtual = getattr(config, "num_virtual_tokens", None) if config.is_prompt_learning else None
    if virtual and positions and max_seq_length and virtual + max_seq_length > positions:
        reason = (
            f"{virtual} virtual tokens and data.max_seq_length = {max_seq_length} are more than its {positions} "
            f"positions ({reason})"
        )
    message = f"{kind} does not work with this {model.config.model_type}: {reason}"
    return Problem(message, _TYPE_KEY, kind.lower())
