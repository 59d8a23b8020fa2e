"""Arithmetic on a valid config: what several keys say about each other, and what follows from them for the workers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from typing_extensions import TypeIs

from distlm.config.metrics import METRICS
from distlm.config.schema import RunConfig, Task
from distlm.errors import Problem

MAY_CHANGE_ON_RESUME = (
    "resources.",
    "ray.",
    "slurm.",
    "kubernetes.",
    "deepspeed.",
    "recovery.",
    "tracking.",
    "profile.",
    "env",
    "training.torch_compile",
    "data.num_proc",
    "training.max_steps",
    "training.num_train_epochs",
    "training.save_steps",
    "training.save_total_limit",
    "training.metric_for_best_model",
    "training.load_best_model_at_end",
    "training.early_stopping_",
    "training.async_save",
    "training.on_save_error",
    "training.eval_steps",
    "training.max_eval_samples",
    "training.per_device_eval_batch_size",
    "training.logging_steps",
)
"""Keys (or beginnings of keys) that another attempt of the same run may set anew; all others make another run."""

NOT_SEMANTICS = (
    "name",
    "resources.",
    "ray.",
    "slurm.",
    "kubernetes.",
    "deepspeed.",
    "recovery.",
    "tracking.",
    "profile.",
    "runs_dir",
    "env",
    "data.num_proc",
)
"""Keys that say where and how a run is computed and what it is called, not what is trained."""

MIN_BPE_VOCABULARY = 256 + 5
"""Tokens of a byte-level BPE without any merge: the bytes and the special tokens."""

# BertConfig's keys as of transformers 5.23, so that a typo is found without importing transformers; a test holds them
# equal. Other architectures are checked against their own class by the controller's preflight.
BERT_KEYS = frozenset(
    (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "type_vocab_size",
        "initializer_range",
        "layer_norm_eps",
        "pad_token_id",
        "use_cache",
        "classifier_dropout",
        "is_decoder",
        "add_cross_attention",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    )
)
# LoraConfig's keys as of PEFT 0.21 that are the user's, in the same way; `adapter_name_or_path` is ours.
LORA_KEYS = frozenset(
    (
        "peft_type",
        "adapter_name_or_path",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "use_dora",
        "velora_config",
        "alora_invocation_tokens",
        "use_qalora",
        "qalora_group_size",
        "monteclora_config",
        "layer_replication",
        "lora_bias",
        "target_parameters",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "ensure_weight_tying",
    )
)
_BERT_DEFAULTS = {"hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 512}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


_ONE_OF_SEVERAL = ("single_label_classification", "token-classification")


def profiled_steps(config: RunConfig) -> range:
    """The steps of `profile.steps`; none where the first is after the last."""
    if config.profile.steps is None:
        return range(0)
    first, _, last = str(config.profile.steps).partition("-")
    return range(int(first), int(last or first) + 1)


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of one optimizer step are divided. All numbers are exact:
    global_batch = micro_batch x micro_batches, micro_batches = world_size x accumulation_steps."""

    global_batch: int
    """Samples per optimizer step over all workers."""
    micro_batch: int
    """Samples per forward pass on one worker."""
    world_size: int
    """Number of workers."""

    @property
    def micro_batches(self) -> int:
        """Forward passes per step over all workers; micro batch m covers the samples from m x micro_batch on."""
        return self.global_batch // self.micro_batch

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per step on one worker."""
        return self.micro_batches // self.world_size


def batch_plan(config: RunConfig) -> BatchPlan:
    """Of a config that has one world size. Raises TypeError for an elastic one: see `at_world_size`."""
    training = config.training
    return BatchPlan(
        training.global_train_batch_size, training.per_device_train_batch_size, config.resources.world_size
    )


def at_world_size(config: RunConfig, num_workers: int) -> RunConfig:
    """The same config with so many workers, whatever range it allows."""
    resources = config.resources.model_copy(update={"num_workers": num_workers})
    return config.model_copy(update={"resources": resources})


def legal_world_sizes(micro_batches: int) -> list[int]:
    """Numbers of workers that divide the micro batches of a step evenly."""
    small = [size for size in range(1, math.isqrt(micro_batches) + 1) if micro_batches % size == 0]
    return sorted({*small, *(micro_batches // size for size in small)})


def possible_world_sizes(config: RunConfig) -> list[int]:
    """Numbers of workers that the config allows and that divide the micro batches of a step, the smallest first. A
    valid config has one at least."""
    training, resources = config.training, config.resources
    legal = legal_world_sizes(training.global_train_batch_size // training.per_device_train_batch_size)
    return [size for size in legal if resources.min_workers <= size <= resources.max_workers]


def warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Warm-up in steps: as given, or (below 1) as a share of all steps."""
    given = config.training.warmup_steps
    return round(given * total_steps) if given < 1 else int(given)


def contradictions(config: RunConfig, gpu_count: int | None = None) -> Iterator[Problem]:
    """What is wrong between keys that are each legal. `gpu_count`: GPUs of this machine; None: not known here."""
    training, deepspeed, resources = config.training, config.deepspeed, config.resources
    yield from _batch(config)
    yield from _model(config)
    yield from _task(config)
    yield from _adapter(config)
    yield from _data(config)
    if config.task.type == "masked-lm":
        yield from _no_labels(config)

    if (training.max_steps is None) == (training.num_train_epochs is None):
        which = "neither is" if training.max_steps is None else "both are"
        yield Problem(
            f"give exactly one of training.max_steps and training.num_train_epochs; {which} given", "training.max_steps"
        )
    if training.warmup_steps >= 1 and training.warmup_steps != int(training.warmup_steps):
        yield Problem("must be a whole number of steps, or a share below 1", "training.warmup_steps")
    if training.lr_scheduler_type == "constant" and training.warmup_steps:
        yield Problem(
            "the schedule constant has no warm-up; use constant_with_warmup, or set this to 0", "training.warmup_steps"
        )
    if training.lr_scheduler_type in ("constant", "constant_with_warmup") and training.lr_scheduler_kwargs:
        yield Problem(f"the schedule {training.lr_scheduler_type} takes no arguments", "training.lr_scheduler_kwargs")
    if training.max_steps is not None and training.warmup_steps > training.max_steps:
        yield Problem(f"is longer than training.max_steps = {training.max_steps}", "training.warmup_steps")

    if deepspeed.offload_param_device != "none" and deepspeed.zero_stage != 3:
        yield Problem(
            f"parameters can be offloaded at deepspeed.zero_stage 3 only, not {deepspeed.zero_stage}",
            "deepspeed.offload_param_device",
        )
    if deepspeed.offload_optimizer_device != "none" and deepspeed.zero_stage == 0:
        yield Problem(
            "the optimizer can be offloaded at deepspeed.zero_stage 1, 2 or 3, not 0",
            "deepspeed.offload_optimizer_device",
        )

    if training.torch_compile and deepspeed.zero_stage == 3:
        yield Problem(
            "works at deepspeed.zero_stage 0, 1 and 2; at 3 the weights are gathered module by module, which breaks "
            "the graph, and compiled code is slower",
            "training.torch_compile",
        )

    on_cpu = resources.device == "cpu" or (resources.device == "auto" and gpu_count == 0)
    if training.mixed_precision == "fp16" and on_cpu:
        yield Problem("fp16 needs a GPU, and the workers run on CPUs; use bf16 or no", "training.mixed_precision")
    elif training.mixed_precision == "fp16" and deepspeed.zero_stage == 0:
        yield Problem(
            "fp16 needs deepspeed.zero_stage 1, 2 or 3; at stage 0 use bf16 or no", "training.mixed_precision"
        )
    if config.model.attn_implementation == "flash_attention_2" and on_cpu:
        yield Problem(
            "flash_attention_2 needs a GPU, and the workers run on CPUs; use sdpa or eager", "model.attn_implementation"
        )
    if config.model.attn_implementation == "flash_attention_2" and training.mixed_precision == "no":
        yield Problem(
            "flash_attention_2 computes in bf16 or fp16, not in fp32; set training.mixed_precision",
            "model.attn_implementation",
        )
    if config.model.quantization is not None and on_cpu:
        yield Problem("needs GPUs and bitsandbytes, and the workers run on CPUs; leave it out", "model.quantization")
    if resources.device == "cuda" and gpu_count == 0:
        yield Problem("this machine has no GPU; use auto or cpu", "resources.device")
    elif not on_cpu and gpu_count and min(possible_world_sizes(config), default=resources.min_workers) > gpu_count:
        yield Problem(f"this machine has {gpu_count} GPUs, and each worker needs one", "resources.num_workers")
    if resources.time_limit_s is not None and resources.time_limit_s <= resources.time_to_save_s:
        yield Problem(
            f"nothing could be trained: the run is stopped resources.time_to_save_s = {resources.time_to_save_s:g} "
            "before that; raise the limit, or lower the time to save",
            "resources.time_limit_s",
            f"{resources.time_limit_s:g}",
        )

    if config.tokenizer.name_or_path and config.tokenizer.train:
        yield Problem("give tokenizer.name_or_path or tokenizer.train, not both", "tokenizer.name_or_path")
    if config.model.config is not None and not (config.tokenizer.name_or_path or config.tokenizer.train):
        yield Problem(
            "a model from scratch needs a tokenizer: give tokenizer.name_or_path (a folder or Hub name) or "
            "tokenizer.train: {vocab_size: ...}",
            "tokenizer",
        )
    if not config.data.validation and not config.data.validation_fraction:
        asked = [key for key in ("eval_steps", "early_stopping_patience") if getattr(training, key)]
        if training.load_best_model_at_end and training.early_stopping_patience is None:  # which brings it along
            asked.append("load_best_model_at_end")
        for key in asked:
            message = "there is nothing to evaluate on: give data.validation or data.validation_fraction"
            yield Problem(message, f"training.{key}")
    if training.early_stopping_patience and training.eval_steps is None:
        yield Problem(
            "needs training.eval_steps, the steps between two evaluations", "training.early_stopping_patience"
        )
    if training.early_stopping_threshold and not training.early_stopping_patience:
        yield Problem("has no meaning without training.early_stopping_patience", "training.early_stopping_threshold")
    if config.profile.steps is not None and not profiled_steps(config):
        yield Problem("the first step is after the last; write FIRST-LAST, such as 10-12", "profile.steps")
    elif training.max_steps is not None and config.profile.steps and profiled_steps(config)[-1] > training.max_steps:
        yield Problem(f"is beyond training.max_steps = {training.max_steps}", "profile.steps")
    if config.tracking.registered_model_name and not config.tracking.log_model:
        yield Problem("a model is registered only if tracking.log_model is true", "tracking.registered_model_name")


def _batch(config: RunConfig) -> Iterator[Problem]:
    training, resources = config.training, config.resources
    budget = training.per_device_train_batch_tokens
    if budget is not None and config.task.type == "masked-lm":
        message = "samples of masked-lm are all of one length; use training.per_device_train_batch_size"
        yield Problem(message, "training.per_device_train_batch_tokens")
    elif budget is not None and budget < config.data.max_seq_length:
        yield Problem(
            f"a sample may have data.max_seq_length = {config.data.max_seq_length} tokens; give that or more",
            "training.per_device_train_batch_tokens",
        )
    global_batch, micro_batch = training.global_train_batch_size, training.per_device_train_batch_size
    if global_batch % micro_batch:
        yield Problem(
            f"{global_batch} samples per step are no multiple of training.per_device_train_batch_size = {micro_batch}",
            "training.global_train_batch_size",
        )
    elif not possible_world_sizes(config):
        sizes = ", ".join(map(str, legal_world_sizes(global_batch // micro_batch)[:12]))
        yield Problem(
            f"{global_batch} samples per step cannot be divided by training.per_device_train_batch_size = "
            f"{micro_batch} x resources.num_workers = {resources.num_workers}; workers that divide it: {sizes}",
            "training.global_train_batch_size",
        )


def _task(config: RunConfig) -> Iterator[Problem]:
    task, metric = config.task, config.training.metric_for_best_model
    metrics = METRICS[problem_kind(config)]
    if metric not in metrics:
        message = f"no metric of this task; {nearest_name(metric, metrics)}"
        yield Problem(message, "training.metric_for_best_model", metric)
    if task.type == "masked-lm":
        return
    if config.tokenizer.train is not None:
        message = (
            "is for masked-lm only; leave it out where the model has a tokenizer, else give tokenizer.name_or_path, or "
            "pretrain a model with it and fine-tune that (model.name_or_path: run:RUN)"
        )
        yield Problem(message, "tokenizer.train")
    if task.labels is not None and len(set(task.labels)) < len(task.labels):
        yield Problem("names a label twice", "task.labels")
    elif task.labels is not None and len(task.labels) == 1 and problem_kind(config) in _ONE_OF_SEVERAL:
        yield Problem("names one label, so there is nothing to tell apart; name all, or leave it out", "task.labels")
    if isinstance(task.class_weights, dict) and task.labels is not None:
        for name in task.class_weights:
            if name not in task.labels:
                yield Problem(
                    f"no label of task.labels; {nearest_name(name, task.labels)}", f"task.class_weights.{name}"
                )
    for split, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for number, source in enumerate(sources):
            if source.document_column is not None and not looks_at_documents(task):
                message = "has a meaning only with task.context: document (token-classification); leave it out"
                yield Problem(message, f"data.{split}.{number}.document_column")
    if task.type == "text-classification":
        if task.label_separator is not None and task.problem_type != "multi_label_classification":
            yield Problem("is for problem_type multi_label_classification only", "task.label_separator")
        if task.label_smoothing_factor and task.problem_type != "single_label_classification":
            yield Problem("is for problem_type single_label_classification only", "task.label_smoothing_factor")
        if task.problem_type == "regression":
            for name in ("labels", "class_weights"):
                if getattr(task, name) is not None:
                    yield Problem("a regression predicts a number and has no labels; leave it out", f"task.{name}")


def problem_kind(config: RunConfig) -> str:
    """What the metrics of a run are those of: the task, or of a classification of texts the type of problem."""
    return config.task.problem_type if config.task.type == "text-classification" else config.task.type


def looks_at_documents(task: Task) -> bool:
    """Whether it matters which document a row of the data belongs to."""
    return task.type == "token-classification" and task.context == "document"


def has_adapter(config: RunConfig) -> bool:
    """Whether an adapter is trained, not the model's own weights."""
    return config.peft is not None and str(config.peft.get("peft_type", "")).lower() != "full"


def _adapter(config: RunConfig) -> Iterator[Problem]:
    """What can be told without PEFT; its own config classes check the rest before any worker starts."""
    settings = config.peft
    if settings is not None and not (settings.get("peft_type") or settings.get("adapter_name_or_path")):
        message = "needs peft_type, the method by PEFT's name, such as lora, adalora, ia3 or prefix-tuning; or full"
        yield Problem(message, "peft")
    elif settings is not None and not has_adapter(config) and len(settings) > 1:
        yield Problem("all weights are trained, so no other key has a meaning here", "peft.peft_type", "full")
    elif settings is not None and str(settings.get("peft_type", "")).lower() == "lora":
        for name in settings:
            if name not in LORA_KEYS:
                yield Problem(f"unknown key of PEFT's LoraConfig; {nearest_name(name, LORA_KEYS)}", f"peft.{name}")
    is_adalora = str((settings or {}).get("peft_type")).lower() == "adalora"
    if is_adalora and config.training.mixed_precision == "fp16":
        message = "its penalty is not scaled with the loss, as fp16 needs it; set training.mixed_precision to bf16"
        yield Problem(message, "peft.peft_type", "adalora")
    if has_adapter(config) and config.model.config is not None:
        message = "an adapter is trained beside pretrained weights; give model.name_or_path, or leave peft out"
        yield Problem(message, "peft")
    if config.model.quantization is not None:
        if not has_adapter(config):
            yield Problem("weights in few bits cannot be trained; give peft, too", "model.quantization")
        if config.deepspeed.zero_stage == 3:
            message = "weights in few bits cannot be sharded; set deepspeed.zero_stage to 0, 1 or 2"
            yield Problem(message, "model.quantization")


def _data(config: RunConfig) -> Iterator[Problem]:
    data, trained = config.data, config.tokenizer.train
    if data.validation and data.validation_fraction:
        yield Problem(
            "has no meaning beside data.validation; give one of the two, or set this to 0", "data.validation_fraction"
        )
    if any(source.weight is not None for source in data.train):
        for number, source in enumerate(data.train):
            if source.weight is None:
                message = "other sources have a weight, so this one needs one, too (or none has one)"
                yield Problem(message, f"data.train.{number}.weight")
    for number, source in enumerate(data.validation):
        if source.weight is not None:
            message = "validation sources have no weight: all their samples are evaluated; leave it out"
            yield Problem(message, f"data.validation.{number}.weight")
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for number, source in enumerate(sources):
            if source.source == "datasets" and source.streaming and "[" in source.split:
                message = "a part of a split cannot be streamed; set streaming: false, or use max_documents"
                yield Problem(message, f"data.{split}.{number}.split")
    if trained and trained.type == "bpe" and trained.vocab_size < MIN_BPE_VOCABULARY:
        message = f"bpe needs {MIN_BPE_VOCABULARY} or more: 256 bytes and 5 special tokens"
        yield Problem(message, "tokenizer.train.vocab_size")


def _no_labels(config: RunConfig) -> Iterator[Problem]:
    """Of a task that reads text alone: what sources say about labels."""
    for split, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for number, source in enumerate(sources):
            key = f"data.{split}.{number}"
            for name in ("label_column", "text_pair_column", "document_column"):
                if getattr(source, name) is not None:
                    message = f"has no meaning for the task {config.task.type}, which reads text alone; leave it out"
                    yield Problem(message, f"{key}.{name}")
            if source.source == "parallel":
                message = (
                    f"is for tasks with labels, and {config.task.type} reads text alone; use a source of files, with "
                    "format: txt where the suffix does not tell"
                )
                yield Problem(message, f"{key}.source")
            elif source.source == "files" and source.format in ("conll", "conllu"):
                message = f"holds words with labels, and the task {config.task.type} reads text"
                yield Problem(message, f"{key}.format")


def _model(config: RunConfig) -> Iterator[Problem]:
    keys = config.model.config
    if (keys is None) == (config.model.name_or_path is None):
        which = "neither is" if keys is None else "both are"
        yield Problem(
            f"give exactly one of model.name_or_path (pretrained) and model.config (from scratch); {which} given",
            "model",
        )
    if keys is None:
        return
    model_type = keys.get("model_type")
    if not isinstance(model_type, str):
        yield Problem("needs model_type, the transformers name of the architecture, such as bert", "model.config")
        return
    counts = {name: value for name in _COUNTS if (value := keys.get(name)) is not None}
    bad = {name for name, value in counts.items() if not _is_count(value)}
    for name in sorted(bad):
        yield Problem("must be a whole number above 0", f"model.config.{name}")
    if model_type == "bert":
        for name in keys:
            if name not in BERT_KEYS and name != "model_type":
                yield Problem(f"unknown key; {nearest_name(str(name), BERT_KEYS)}", f"model.config.{name}")
        keys = {**_BERT_DEFAULTS, **keys}
    hidden, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    if _is_count(hidden) and _is_count(heads) and hidden % heads:
        yield Problem(
            f"{hidden} is no multiple of model.config.num_attention_heads = {heads}", "model.config.hidden_size"
        )
    positions = keys.get("max_position_embeddings")
    if _is_count(positions) and config.data.max_seq_length > positions:
        yield Problem(
            f"{config.data.max_seq_length} tokens are more than model.config.max_position_embeddings = {positions}",
            "data.max_seq_length",
        )
    vocab_size, trained = keys.get("vocab_size"), config.tokenizer.train
    if _is_count(vocab_size) and trained and trained.vocab_size > vocab_size:
        yield Problem(
            f"is smaller than tokenizer.train.vocab_size = {trained.vocab_size}; leave it out and it follows "
            "the tokenizer",
            "model.config.vocab_size",
        )


def _is_count(value: Any) -> TypeIs[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def nearest_name(name: str, legal: Any) -> str:
    """Advice on a name that is not one of the legal ones."""
    close = difflib.get_close_matches(name, list(legal), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(sorted(legal))}"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"training": {"seed": 1}} -> {"training.seed": 1}. Lists are one value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, inner in tree.items()
        for key, value in flatten(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def resolved_tree(config: RunConfig, raw: dict[str, Any]) -> dict[str, Any]:
    """Every key with its value, defaults included, but `${VAR}` as the user wrote it: what run.yaml holds."""

    def keep_variables(value: Any, written: Any) -> Any:
        if isinstance(value, dict):
            under = written if isinstance(written, dict) else {}
            return {name: keep_variables(item, under.get(name)) for name, item in value.items()}
        if isinstance(value, list) and isinstance(written, list):
            return [keep_variables(*pair) for pair in zip(value, written, strict=True)]
        return written if isinstance(written, str) and "${" in written else value

    kept: dict[str, Any] = keep_variables(config.model_dump(mode="json"), raw)
    return kept


def without_defaults(tree: Any, section: type[BaseModel] = RunConfig) -> Any:
    """A resolved tree as a user might have written it: without the keys that have their default value."""
    if not isinstance(tree, dict):
        return tree
    written = {}
    for name, value in tree.items():
        field = section.model_fields.get(name)
        if field and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            written[name] = without_defaults(value, field.annotation)
        elif not field or value != field.get_default(call_default_factory=True, validated_data={}):
            written[name] = value
    return written


def refuse_changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Problem]:
    """What a resume would change though it makes another run; `old` and `new` are resolved trees."""
    before, after = flatten(old), flatten(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or key.startswith(MAY_CHANGE_ON_RESUME):
            continue
        if key == "runs_dir":
            message = "cannot be changed on resume: to move runs, move that whole folder, and distlm resume NEW/RUN_ID"
        else:
            message = f"cannot be changed on resume (the run has {before.get(key)}): submit a new run instead"
        yield Problem(message, key)


def semantic_params(tree: dict[str, Any]) -> dict[str, str]:
    """The training semantics of a resolved tree as flat text, for MLflow's parameters."""
    return {
        key: "" if value is None else str(value)
        for key, value in flatten(tree).items()
        if not key.startswith(NOT_SEMANTICS)
    }
