"""What is made once for a run before any worker starts: tokenizer, tokenised data, initial weights.

Runs as one task on the cluster. It is also the second half of preflight: whatever the data, the tokenizer and the model
refuse is refused here, with the config's key. Calling it again (a resume) finds everything there and checks that the
data is still the same.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.config.reproduce import original_of
from distlm.config.resolve import has_adapter
from distlm.config.schema import RunConfig
from distlm.errors import InputError, Problem
from distlm.run_folder import RunFolder, read_json, whole_folder, write_json
from distlm.run_reference import PREFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distlm.data.notes import Report
    from distlm.data.order import SampleOrder
    from distlm.data.prepare import DataInfo
    from distlm.worker.adapter import Adapter, TaskType
    from distlm.worker.model import Head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The result, kept in init/prepared.json."""

    train_paths: list[str]
    """Packed training samples (Arrow), a file for each source."""
    validation_path: str | None
    """Packed validation samples; None: there is nothing to evaluate on."""
    num_train_samples: int
    num_validation_samples: int
    total_steps: int
    """Optimizer steps of the whole run, for this attempt's config."""
    vocab_size: int
    """Tokens of the tokenizer."""
    mask_token_id: int | None
    """None: the tokenizer has none, and the task needs none."""
    pad_token_id: int
    special_token_ids: list[int]
    num_parameters: int
    forward_flops_per_sample: float
    """Floating-point operations of one forward pass over one sample of `max_seq_length` tokens, as it is computed."""
    masked_only_head: bool
    """The model's prediction head can compute the masked positions alone."""
    data_info: dict[str, Any]
    """`distlm.data.prepare.DataInfo`: counts, sources and digests of the data."""
    train_mixture: list[dict[str, Any]]
    """For each training source: `name`, `num_samples`, `share` of the samples of an epoch, `passes_per_epoch`."""
    data_was_cached: bool
    """Nothing was tokenised for this attempt."""
    is_from_hub: bool = False
    """`model.name_or_path` names a model on the Hub, not a folder."""
    num_trainable_parameters: int = 0
    labels: list[str] = field(default_factory=list)
    """By their ids: those that the model knows, then those that only held-out data has."""
    num_labels: int = 0
    """How many the model knows."""
    label_weights: list[float] | None = None
    """In the loss, of each label that the model knows; None: all the same."""
    tag_scheme: str = "none"
    """Of the labels of words as the model learns them: iob2, or none."""
    base_name_or_path: str = ""
    """The pretrained model: its name on the Hub, or the folder that it was read from."""
    drawn_weights: list[str] = field(default_factory=list)
    """Weights of a pretrained model that it did not have: its head for this task."""

    @property
    def max_seq_length(self) -> int:
        return int(self.data_info["max_seq_length"])


def sample_order(config: RunConfig, sizes: Sequence[int]) -> SampleOrder:
    """The order of the training samples, of which source i has `sizes[i]`."""
    from distlm.data.order import SampleOrder

    weights = [source.weight for source in config.data.train if source.weight is not None]
    return SampleOrder(sizes, weights or None, config.seed)


def prepare_run(config: RunConfig, run: RunFolder, report: Report = lambda progress: None) -> Prepared:
    """Make what is missing in init/ and the cache, and write init/prepared.json. `report` is told how far the data is.

    Raises InputError for data, tokenizers, model configs and schedules that cannot be used.
    """
    from distlm.data.cache import LOCK
    from distlm.data.labelled import prepare_labelled
    from distlm.data.labels import LabelInfo, label_weights
    from distlm.data.prepare import DataInfo, prepare_data
    from distlm.data.tokenize import load_tokenizer
    from distlm.worker.model import Head, labels_of, pretrained_config
    from distlm.worker.model_source import with_local_weights

    is_from_hub = bool(config.model.name_or_path) and not _is_local(config.model.name_or_path or "")
    config = with_local_weights(config, run)
    tokenizer_config = config.tokenizer
    if not (tokenizer_config.name_or_path or tokenizer_config.train):
        tokenizer_config = tokenizer_config.model_copy(update={"name_or_path": config.model.name_or_path})
    labels_of_model: list[str] = []
    # Fail on the model and the tokenizer before the corpus is tokenised, which may take hours.
    if config.model.name_or_path:
        labels_of_model = labels_of(pretrained_config(config.model.name_or_path, config.task.type), config.task.type)
    if tokenizer_config.name_or_path:
        _model_config(config, _existing_tokenizer(config, tokenizer_config.name_or_path))
    before = read_json(run.init / "prepared.json")
    if before is not None:
        _check_same_format(config, before["data_info"])
        kept = run.init / "tokenizer"
        if tokenizer_config.train and kept.exists():  # the cache may be gone, and training again may give another
            tokenizer_config = tokenizer_config.model_copy(update={"name_or_path": str(kept), "train": None})
    commits = _commits(before) if before is not None else _commits_to_reproduce(config, run)
    if config.task.type == "masked-lm":
        data = prepare_data(config.data, tokenizer_config, run.cache, report, commits)
    else:
        assert tokenizer_config.name_or_path  # resolve.contradictions
        name = tokenizer_config.name_or_path
        data = prepare_labelled(config.data, config.task, name, labels_of_model, run.cache, report, commits)
    tokenizer = load_tokenizer(str(data.tokenizer_path), needs_mask=config.task.type == "masked-lm")
    labels = LabelInfo(**data.info.labels) if data.info.labels else LabelInfo([], 0, [])
    head = None
    if config.task.type != "masked-lm":
        problem_type = config.task.problem_type if config.task.type == "text-classification" else None
        head = Head(labels.names[: labels.num_known], problem_type)
    model_config = _model_config(config, tokenizer, head)
    if config.task.type == "masked-lm" and config.task.whole_word_masking:
        _check_words(data.tokenizer_path)
    if before is not None:
        _check_same_data(DataInfo.from_json(before["data_info"]), data.info)

    run.init.mkdir(exist_ok=True)
    num_train_samples = data.info.train.num_blocks
    total_steps = _total_steps(config, num_train_samples)
    if before is None or not (run.init / "model").exists():  # the last one to be written is prepared.json
        drawn_weights, num_trainable = _make_initial_weights(config, model_config, run, total_steps)
    else:
        drawn_weights, num_trainable = before.get("drawn_weights", []), before.get("num_trainable_parameters", 0)
    if not (run.init / "tokenizer").exists():
        with whole_folder(run.init / "tokenizer") as folder:
            shutil.copytree(data.tokenizer_path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LOCK))

    mean_length = config.data.max_seq_length
    if config.task.type != "masked-lm":
        mean_length = max(1, round(data.info.train.num_tokens / num_train_samples))
    flops, masked_only_head = forward_flops(config, model_config, mean_length)
    prepared = Prepared(
        train_paths=[str(path) for path in data.train_paths],
        validation_path=str(data.validation_path) if data.validation_path else None,
        num_train_samples=num_train_samples,
        num_validation_samples=data.info.validation.num_blocks if data.info.validation else 0,
        total_steps=total_steps,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        special_token_ids=sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}),
        num_parameters=_count_parameters(run.init / "model") + _count_parameters(run.init / "adapter"),
        num_trainable_parameters=num_trainable,
        forward_flops_per_sample=flops,
        masked_only_head=masked_only_head,
        data_info=asdict(data.info),
        train_mixture=_mixture(config, data.info),
        data_was_cached=data.cached,
        is_from_hub=is_from_hub,
        labels=labels.names,
        num_labels=labels.num_known or int(config.task.type != "masked-lm"),
        label_weights=None if config.task.type == "masked-lm" else label_weights(config.task.class_weights, labels),
        tag_scheme="none" if labels.tag_scheme == "none" else "iob2",
        base_name_or_path=_base(config, run),
        drawn_weights=drawn_weights,
    )
    _check_schedule(config, prepared.total_steps)
    write_json(run.init / "prepared.json", asdict(prepared))
    return prepared


def _is_local(name_or_path: str) -> bool:
    return os.path.isdir(name_or_path) or name_or_path.startswith(PREFIX)


def _base(config: RunConfig, run: RunFolder) -> str:
    """The model that an exported adapter is for."""
    if config.task.type == "token-classification" and config.task.case_feature:  # it has more token types now
        return str(run.init / ("base" if (run.init / "base").exists() else "model"))
    name = config.model.name_or_path or ""
    return str(Path(name).absolute()) if os.path.isdir(name) else name


def _check_words(tokenizer: Path) -> None:
    from distlm.tasks.words import word_parts

    try:
        word_parts(tokenizer)
    except ValueError as error:
        raise InputError(Problem(f"{error}; set it to false", "task.whole_word_masking", "true")) from error


def forward_flops(config: RunConfig, model_config: Any, length: int) -> tuple[float, bool]:
    """FLOPs of the forward pass over that many tokens, and whether the head computes the masked positions only."""
    from distlm.worker.metrics import forward_flops_per_sample
    from distlm.worker.model import MODEL_KINDS

    auto_class = MODEL_KINDS[config.task.type].auto_class
    if config.task.type == "masked-lm" and config.task.masked_only_head:
        try:
            return forward_flops_per_sample(model_config, length, config.task.mlm_probability * length), True
        except Exception as error:  # noqa: BLE001 - whatever an unusual head raises when it is given some positions
            logger.warning("the head computes every position: %s", error)
    return forward_flops_per_sample(model_config, length, auto_class=auto_class), False


def _existing_tokenizer(config: RunConfig, name_or_path: str) -> Any:
    from distlm.data.tokenize import load_tokenizer

    try:
        tokenizer = load_tokenizer(name_or_path, needs_mask=config.task.type == "masked-lm")
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            # transformers makes such a one, without a word, for a folder that has nothing but a model's config.json.
            raise InputError(
                Problem(
                    "it knows special tokens only; tokenizer.json is missing", "tokenizer.name_or_path", name_or_path
                )
            )
    except InputError as error:
        if config.tokenizer.name_or_path:
            raise
        key = "model.name_or_path"  # the only one that the user has written
        raise InputError(
            *(replace(p, key=key, message=f"its tokenizer: {p.message}") for p in error.problems)
        ) from error
    return tokenizer


_NOT_THE_SAME = "is not what this run began with, so its samples cannot be continued; submit a new run"


def _check_same_format(config: RunConfig, info: dict[str, Any]) -> None:
    from distlm.data import labelled, prepare

    version = (prepare if config.task.type == "masked-lm" else labelled).FORMAT_VERSION
    if info["format_version"] != version:
        message = (
            f"as this version of distlm prepares it (format {version}, the run has {info['format_version']}) "
            f"{_NOT_THE_SAME}, or resume with the version that it began with"
        )
        raise InputError(Problem(message, "data"))


def _commits(before: dict[str, Any]) -> dict[str, str]:
    """Config keys of the sources on the Hub, and the commits that the run has begun with and keeps."""
    return {
        f"data.{split}.{number}": source["commit"]
        for split, sources in before["data_info"]["sources"].items()
        for number, source in enumerate(sources)
        if source.get("commit")
    }


def _commits_to_reproduce(config: RunConfig, run: RunFolder) -> dict[str, str]:
    """The commits of the run that this one is to equal, for those sources that are the same in both configs."""
    original = original_of(run)
    before = read_json(original.init / "prepared.json") if original else None
    if before is None:
        return {}

    def is_same(key: str) -> bool:
        _, split, number = key.split(".")
        sources = getattr(config.data, split)
        told = before["data_info"]["sources"][split][int(number)]
        return int(number) < len(sources) and all(
            told.get(name) == getattr(sources[int(number)], name, None) for name in ("source", "path", "revision")
        )

    return {key: commit for key, commit in _commits(before).items() if is_same(key)}


def _mixture(config: RunConfig, info: DataInfo) -> list[dict[str, Any]]:
    """See `Prepared.train_mixture`. Raises InputError for a source that has a weight and no sample."""
    sizes = [source["num_train_blocks"] for source in info.sources["train"]]
    problems = [
        _no_sample(number, info.sources["train"][number], config)
        for number, source in enumerate(config.data.train)
        if source.weight is not None and not sizes[number]
    ]
    if problems:
        raise InputError(*problems)
    order = sample_order(config, sizes)
    return [
        {
            "name": source["name"],
            "num_samples": size,
            "share": round(count / order.num_samples, 6),
            "passes_per_epoch": round(count / size, 6) if size else 0.0,
        }
        for source, size, count in zip(info.sources["train"], sizes, order.samples_per_epoch, strict=True)
    ]


def _no_sample(number: int, source: dict[str, Any], config: RunConfig) -> Problem:
    if not source["num_tokens"]:
        message = "the source has a weight, and gives no training sample: it holds no text"
        return Problem(message, f"data.train.{number}.weight")
    message = (
        f"all of the {source['num_documents']} documents of data.train.{number}, which has a weight, were held out; "
        "lower data.validation_fraction or name sources under data.validation"
    )
    return Problem(message, "data.validation_fraction", str(config.data.validation_fraction))


def _check_same_data(before: DataInfo, now: DataInfo) -> None:
    """Raise InputError if a resume would train or evaluate on other samples than the run began with."""

    def content(info: DataInfo, split: str) -> str | None:
        found = getattr(info, split)
        return found.content_sha256 if found else None

    different = [f"data.{split}" for split in ("train", "validation") if content(before, split) != content(now, split)]
    if before.tokenizer_fingerprint != now.tokenizer_fingerprint:
        different.append("tokenizer")
    if different:
        raise InputError(*(Problem(_NOT_THE_SAME, key) for key in different))


def _model_config(config: RunConfig, tokenizer: Any, head: Head | None = None) -> Any:
    from distlm.worker.model import build_model_config, check_positions

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    model_config = build_model_config(config, len(tokenizer), ids, head)
    check_positions(model_config, config.data.max_seq_length)
    return model_config


def _total_steps(config: RunConfig, num_train_samples: int) -> int:
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_train_epochs is not None  # resolve.contradictions
    return max(1, math.ceil(training.num_train_epochs * num_train_samples / training.global_train_batch_size))


def _check_schedule(config: RunConfig, total_steps: int) -> None:
    from distlm.worker.schedule import learning_rate_schedule

    if config.training.warmup_steps > total_steps:
        message = f"is longer than the {total_steps} steps of training.num_train_epochs"
        raise InputError(Problem(message, "training.warmup_steps", f"{config.training.warmup_steps:g}"))
    learning_rate_schedule(config, total_steps)


def _make_initial_weights(
    config: RunConfig, model_config: Any, run: RunFolder, total_steps: int
) -> tuple[list[str], int]:
    """Write init/model and, with an adapter, init/adapter. Names of the pretrained weights that were drawn anew, and
    the number of parameters that are trained."""
    from distlm.worker.model import enable_gradient_checkpointing, head_names, initial_model, save_initial_model

    model, drawn = initial_model(config, model_config)
    save_initial_model(model, run.init / "model")
    trained: Any = model
    if has_adapter(config):
        from distlm.worker.adapter import rehearse, save_initial

        if config.training.gradient_checkpointing:
            enable_gradient_checkpointing(model)  # which some methods cannot do
        adapter = _draw_adapter(config, model, head_names(model, drawn), bool(drawn), total_steps)
        rehearse(adapter.model, config.data.max_seq_length)
        trained = adapter.model
    num_trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    if has_adapter(config):
        if adapter.changed_base:  # what the exported adapter is for
            shutil.copytree(run.init / "model", run.init / "base", dirs_exist_ok=True)
        save_initial(adapter, run.init)  # uses the model up
    if (config.peft or {}).get("adapter_name_or_path"):
        drawn = []  # an earlier adapter brings all that is trained, the head with it
    return drawn, num_trainable


def _draw_adapter(config: RunConfig, model: Any, head: list[str], head_is_new: bool, total_steps: int) -> Adapter:
    """The adapter of the config on a model, or an earlier one that is trained further."""
    from distlm.worker.adapter import adapter_config, adapter_folder, draw_adapter, earlier_config, head_modules

    settings = dict(config.peft or {})
    source = None
    if (name := settings.pop("adapter_name_or_path", None)) is not None:
        source, peft_type = adapter_folder(str(name))
        settings.setdefault("peft_type", peft_type)
    task_types: dict[str, TaskType] = {"text-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}
    peft_config = adapter_config(
        settings,
        task_types.get(config.task.type),
        head_modules(model, head),
        head_is_new=head_is_new,
        total_steps=total_steps,
    )
    if source is not None:
        peft_config = earlier_config(source, settings, peft_config)
    return draw_adapter(model, peft_config, config.seed, head, source)


def _count_parameters(folder: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total
