"""README.md of an exported model: what it is and how it came about, from the records of its run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from distlm import __version__
from distlm.checkpoint.manifest import Manifest
from distlm.config.attempt import Attempt, accepted_attempts
from distlm.config.metrics import METRICS
from distlm.config.resolve import NOT_SEMANTICS, semantic_params
from distlm.errors import InputError
from distlm.redact import redact_uri
from distlm.run_folder import RunFolder, read_json, read_yaml

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_PIPELINES = {
    "masked-lm": "fill-mask",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
}
"""Transformers' pipeline for what a task trains."""
_LEARNED_BY = {
    "masked-lm": "with masked language modelling",
    "text-classification": "for text classification",
    "token-classification": "for token classification",
}


def model_card(run: RunFolder, manifest: Manifest, merged: bool = False) -> str:
    """The text, for a checkpoint with that manifest. `merged`: the adapter is in the model.

    Values are those of run.yaml, where `${VAR}` stands as the user wrote it. Raises InputError if the run's files are
    damaged.
    """
    try:
        tree, prepared = read_yaml(run.run_yaml), read_json(run.init / "prepared.json")
        model_type = read_json(run.init / "model" / "config.json")["model_type"]
        name = _line(tree["name"])
        written = tree | {"peft": None} if merged else tree  # as the folder has it, not as it was trained
        metadata = _metadata(name, written, prepared, model_type, manifest)
        labels = _labels(tree, prepared)
        sections = (
            f"---\n{metadata.to_yaml()}\n---",
            f"# {name}",
            _what_it_is(run, written, prepared, model_type, manifest),
            f"## Use\n\n{snippet(written, prepared)}",
            *([f"## Labels\n\n{labels}"] if labels else []),
            f"## Data\n\n{_data(tree, prepared)}",
            f"## Training\n\n{_training(run, tree, manifest)}",
            f"## Evaluation\n\n{_evaluation(tree, prepared, manifest)}",
            f"## Versions\n\n{_versions(manifest)}",
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{run.run_yaml} or a file in {run.init} is damaged: {type(error).__name__}: {error}"
        ) from error
    return "\n\n".join(sections) + "\n"


def _metadata(
    name: str, tree: Mapping[str, Any], prepared: Mapping[str, Any], model_type: str, manifest: Manifest
) -> ModelCardData:
    task = _task_type(tree)
    results = [
        EvalResult(
            task_type=_PIPELINES[task],
            dataset_type="text",
            dataset_name="held-out text",
            dataset_split="validation",
            metric_type=name,
            metric_value=value,
        )
        for name, value in _metrics(tree, manifest).items()
    ]
    adapter = _adapter(tree)
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=_PIPELINES[task],
        base_model=_repository(tree["model"]["name_or_path"]) if prepared.get("is_from_hub") else None,
        tags=["distlm", task, model_type, *([adapter] if adapter else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _task_type(tree: Mapping[str, Any]) -> str:
    return str(tree["task"].get("type", "masked-lm"))


def _kind(tree: Mapping[str, Any]) -> str:
    """See `distlm.config.resolve.problem_kind`."""
    task = tree["task"]
    return str(task["problem_type"]) if _task_type(tree) == "text-classification" else _task_type(tree)


def _adapter(tree: Mapping[str, Any]) -> str | None:
    """PEFT's method, such as lora; None: all weights were trained."""
    settings = tree.get("peft")
    method = str(settings.get("peft_type") or "adapter").lower() if settings else "full"
    return None if method == "full" else method


def _metrics(tree: Mapping[str, Any], manifest: Manifest) -> dict[str, float]:
    """Those of the evaluation at the checkpoint's step, by name."""
    metrics = manifest.metrics
    return {name: metrics[f"eval/{name}"] for name in METRICS[_kind(tree)] if f"eval/{name}" in metrics}


def _repository(name_or_path: str | None) -> str | None:
    """A name that the Hub can have; None for others, such as an unexpanded ${VAR}."""
    return name_or_path if name_or_path and _REPOSITORY.fullmatch(name_or_path) else None


def _what_it_is(
    run: RunFolder, tree: Mapping[str, Any], prepared: Mapping[str, Any], model_type: str, manifest: Manifest
) -> str:
    num_parameters = sum(parameter.numel for parameter in manifest.parameters)
    origin, task, adapter = tree["model"]["name_or_path"], _task_type(tree), _adapter(tree)
    start = f"starting from the weights of {_code(origin)}" if origin else "from scratch"
    what = f"A {model_type} {'encoder' if task == 'masked-lm' else 'model'}"
    if adapter:
        what, start = f"An adapter ({adapter}) of a {model_type} model", f"on top of {_code(origin)}"
    if prepared.get("drawn_weights") and task != "masked-lm":
        start += " with a new head"
    position, length = manifest.progress.sample_position, f"{prepared['data_info']['max_seq_length']:,}"
    tokens = f"{length} tokens each" if task == "masked-lm" else f"at most {length} tokens"
    return (
        f"{what} with {num_parameters:,} trained parameters (fp32), trained by distlm {_LEARNED_BY[task]}, {start}.\n\n"
        "| | |\n|---|---|\n"
        f"| run | {_code(run.run_id)} |\n"
        f"| step | {manifest.step:,} |\n"
        f"| samples seen | {position:,} of {tokens} |\n"
        f"| epochs | {position / prepared['num_train_samples']:.4g} |"
    )


def snippet(tree: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    """Python that uses the model, run in its folder; of an adapter together with its base model."""
    task, adapter = _task_type(tree), _adapter(tree)
    name, options, call = {
        "masked-lm": ("fill_mask", "", 'fill_mask(f"This is a {fill_mask.tokenizer.mask_token}.")'),
        "text-classification": _use_of_text(tree),
        "token-classification": _use_of_words(prepared),
    }[task]
    if not adapter:
        lines = ["from transformers import pipeline", ""]
        model = f'"."{options})  # the folder of this file'
    else:
        lines = _loading_adapter(tree, prepared)
        model = f'model, tokenizer=AutoTokenizer.from_pretrained("."){options})'
    lines += [f'{name} = pipeline("{_PIPELINES[task]}", model={model}', f"print({call})"]
    return "\n".join(["```python", *lines, "```"])


def _use_of_text(tree: Mapping[str, Any]) -> tuple[str, str, str]:
    """Name of the pipeline, its further arguments, and a call of it."""
    has_pair = tree["data"]["train"][0].get("text_pair_column")
    example = '{"text": "A text.", "text_pair": "Another one."}' if has_pair else '"A text."'
    kind = _kind(tree)
    if kind == "regression":
        return "predict", "", f'predict({example})["score"]' if has_pair else f'predict({example})[0]["score"]'
    options = ", top_k=None" if kind == "multi_label_classification" else ""
    return "classify", options, f"classify({example})"


def _use_of_words(prepared: Mapping[str, Any]) -> tuple[str, str, str]:
    options = "" if prepared.get("tag_scheme", "none") == "none" else ', aggregation_strategy="first"'
    return "tag", options, 'tag("Ann lives in New York.")'


def _loading_adapter(tree: Mapping[str, Any], prepared: Mapping[str, Any]) -> list[str]:
    task, kind = _task_type(tree), _kind(tree)
    auto_class = {
        "masked-lm": "AutoModelForMaskedLM",
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
    }[task]
    labels = _known_labels(prepared)
    lines = ["from peft import PeftModel", f"from transformers import {auto_class}, AutoTokenizer, pipeline", ""]
    settings: list[str] = []
    if labels:
        lines.append(f"labels = {labels!r}")
        settings += ["id2label=dict(enumerate(labels))", "label2id={name: i for i, name in enumerate(labels)}"]
    elif task != "masked-lm":
        settings.append("num_labels=1")
    if task == "text-classification":
        settings.append(f'problem_type="{kind}"')
    if task != "masked-lm":  # the base may have a head for other labels
        settings.append("ignore_mismatched_sizes=True")
    lines += [f"base = {auto_class}.from_pretrained(", f"    {json.dumps(_line(tree['model']['name_or_path']))},"]
    lines += [f"    {setting}," for setting in settings]
    lines += [")", 'model = PeftModel.from_pretrained(base, ".")  # the folder of this file']
    return lines


def _known_labels(prepared: Mapping[str, Any]) -> list[str]:
    """Those that the model tells apart, by id; none for a regression and for masked-lm."""
    labels: list[str] = prepared.get("labels", [])[: prepared.get("num_labels", 0)]
    return labels


def _labels(tree: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    names = _known_labels(prepared)
    if not names:
        return ""
    counts = prepared["data_info"]["labels"]["counts"]
    words = "words" if _task_type(tree) == "token-classification" else "texts"
    counted = enumerate(zip(names, counts, strict=True))
    rows = [f"| {number} | {_code(name)} | {count:,} |" for number, (name, count) in counted]
    lines = [f"| id | label | {words} in the training data |", "|---:|---|---:|", *rows]
    if prepared.get("tag_scheme", "none") != "none":
        lines += ["", "They spell entities as IOB2 does: B- at the beginning of each, I- inside, O outside."]
    return "\n".join(lines)


def _data(tree: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    info = prepared["data_info"]
    lines = ["| split | documents | tokens | samples |", "|---|---|---|---|"]
    for split in ("train", "validation"):
        if counts := info[split]:
            numbers = (counts["num_documents"], counts["num_tokens"], counts["num_blocks"])
            lines.append(f"| {split} | {' | '.join(f'{number:,}' for number in numbers)} |")
    lines.append("")
    for split in ("train", "validation"):
        lines += [f"- {split}: {_source(source)}" for source in tree["data"][split]]
    if info["validation"] and not tree["data"]["validation"]:
        lines.append(
            f"- validation: a share of {tree['data']['validation_fraction']} of the training documents, held out"
        )
    lines += ["", f"The tokenizer has {info['vocab_size']:,} tokens; {_tokenizer(tree)}."]
    return "\n".join(lines)


def _source(source: Mapping[str, Any]) -> str:
    settings = (f"{key}: {_code(value)}" for key, value in source.items() if key != "source" and value is not None)
    return ", ".join((_code(source["source"]), *settings))


def _tokenizer(tree: Mapping[str, Any]) -> str:
    if name := tree["tokenizer"]["name_or_path"]:
        return f"it is that of {_code(name)}"
    if tree["tokenizer"]["train"]:
        return "it was trained on the training text"
    return f"it is that of {_code(tree['model']['name_or_path'])}"


def _training(run: RunFolder, tree: Mapping[str, Any], manifest: Manifest) -> str:
    def is_shown(key: str) -> bool:
        return not key.startswith(("data.train", "data.validation", "name"))

    rows = [
        f"| {key} | {_code(value)} |" for key, value in semantic_params(dict(tree)).items() if is_shown(key) and value
    ]
    precision = "fp32" if manifest.mixed_precision == "no" else manifest.mixed_precision
    workers = "1 worker" if manifest.world_size == 1 else f"{manifest.world_size} workers"
    lines = [
        f"This checkpoint was written by {workers} at ZeRO stage {manifest.zero_stage}, {_line(precision)}. The config "
        "that the run was submitted with:",
        "",
        "| key | value |",
        "|---|---|",
        *rows,
    ]
    if changes := list(_changes(run)):
        lines += ["", "Changed when the run was resumed:", "", *changes]
    return "\n".join(lines)


def _changes(run: RunFolder) -> Iterator[str]:
    for folder in accepted_attempts(run):
        attempt = Attempt.read(folder)
        overrides = [item for item in attempt.overrides if not item.startswith(NOT_SEMANTICS)]
        if attempt.changes and overrides:  # those of the first attempt are in run.yaml
            yield f"- attempt {folder.number}: {', '.join(map(_code, overrides))}"


def _evaluation(tree: Mapping[str, Any], prepared: Mapping[str, Any], manifest: Manifest) -> str:
    rows = [f"| {name} | {value:.6g} |" for name, value in _metrics(tree, manifest).items()]
    if not rows:
        return f"Step {manifest.step:,} was not evaluated."
    how = ""
    if _task_type(tree) == "masked-lm":
        how = f", with a share of {tree['task']['eval_mlm_probability']} of the tokens hidden"
    return "\n".join(
        [
            f"At step {manifest.step:,}, on {prepared['num_validation_samples']:,} held-out samples (or on "
            f"`training.max_eval_samples` of them){how}:",
            "",
            "| metric | value |",
            "|---|---|",
            *rows,
            *_explained(tree, prepared),
        ]
    )


def _explained(tree: Mapping[str, Any], prepared: Mapping[str, Any]) -> list[str]:
    """What the metrics' names leave open."""
    kind, labels = _kind(tree), _known_labels(prepared)
    if kind == "token-classification" and prepared.get("tag_scheme", "none") != "none":
        return ["", "precision, recall and f1 count whole entities, as seqeval does; accuracy counts words."]
    if kind == "token-classification":
        return ["", "precision, recall and f1 are averages over the labels."]
    if kind == "single_label_classification":
        return ["", f"f1 is that of {_code(labels[1])}." if len(labels) == 2 else "f1 is f1_macro."]
    if kind == "multi_label_classification":
        return ["", "A label is predicted where its probability is 0.5 or more; accuracy: all labels of a text right."]
    return []


def _versions(manifest: Manifest) -> str:
    written = ", ".join(f"{_line(package)} {_line(version)}" for package, version in manifest.versions.items())
    return f"Written with {written}; exported by distlm {__version__}."


def _line(text: object) -> str:
    """Text in one line, without passwords."""
    return redact_uri(" ".join(str(text).split()))


def _code(value: object) -> str:
    """A value in a cell of a Markdown table."""
    text = _line(value).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
